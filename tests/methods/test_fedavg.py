"""FedAvg on the standard backbone against its oracle, and on pooled data."""

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.engine.cohort import Cohort, client_batches
from tap_jax.methods.base import LocalRule, plain_step
from tap_jax.methods.fedavg import fedavg
from tests.methods.oracles import FedAvg
from tests.oracle import minibatches
from tests.trajectories import alive, check_federated, play

ROWS = ({"ag_news": 0.2}, {"cifar100": 0.5, "ag_news": 0.5}, {"cifar100": 0.4})
SETTINGS = {
    "method": "fedavg",
    "variants": ("fedavg", "fedavg+post", "fedavg+2p"),
    "model.backbone": "standard",
    "batch_size": 6,
    "engine.microbatch": 4,
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.post_learning_rate": 3e-5,
}


@pytest.fixture(scope="module")
def experiment(tiny):
    return alive(experiments.build(tiny(ROWS, SETTINGS)))


@pytest.fixture(scope="module")
def run(experiment):
    return play(experiment)


def test_standard_backbone_equals_oracle(experiment, run):
    """One block that all clients send and receive; rounds, +post, +2p."""
    assert "backbone" in experiment.partition.names and not any("mote" in name for name in experiment.partition.names)
    check_federated(experiment, run, FedAvg(experiment))


def test_one_program_serves_p_and_2p_iterations(experiment):
    cohort = client_batches(experiment.engine, 0)[0]
    once, twice = (cohort.plan("post", post=True, twice=twice) for twice in (False, True))
    assert jax.tree.map(np.shape, once) == jax.tree.map(np.shape, twice)
    assert (2 * once.steps).tolist() == twice.steps.tolist() == [2 * experiment.config.post_steps] * len(once.steps)
    same = lambda a, b: np.testing.assert_array_equal(a[..., :n, :], b[..., :n, :])  # noqa: E731
    n = experiment.config.post_steps
    same(once.active, twice.active)


def test_a_step_is_told_each_task_s_share_of_the_minibatch(tiny):
    """λ_o, into however many rows a task's samples are cut; a step that gives it as its loss shows its sum."""

    def step(tools, params, state, teacher):
        params, state, losses = plain_step(tools, params, state, teacher)
        return params, state, losses._replace(plain=losses.share)

    settings = SETTINGS | {"engine.microbatch": 2}
    config = tiny(ROWS, settings)
    built = experiments.build(config, method=fedavg(rule=LocalRule(step)), variants=("fedavg",))
    cohort = Cohort.of(built.engine, [0, 1], 0)
    state = built.init()
    _, _, losses = cohort.train(state, cohort.broadcast(state.server), "federated")
    found, tasks = np.asarray(losses.plain).reshape(-1, len(built.model.tasks)), [t.name for t in built.model.tasks]
    for place, i in enumerate(np.ravel(cohort.clients)):
        if i < 0:
            continue
        expected = dict.fromkeys(tasks, 0.0)
        streams, steps = built.model.streams, config.local_steps
        for drawn in minibatches(built.engine.data[i], streams, config, int(i), 0, "federated", steps, 1):
            for task, samples in drawn.items():
                expected[task] += len(samples) / sum(map(len, drawn.values()))
        np.testing.assert_allclose(found[place], [expected[task] for task in tasks], rtol=1e-6)
    assert (found % 1 > 0).any()  # there was something to share


@pytest.mark.parametrize("fault", ["clip", "uniform", "lambda"])
def test_the_comparison_notices(experiment, run, fault):
    with pytest.raises(AssertionError):
        check_federated(experiment, run, FedAvg(experiment, fault))


def test_centralised_is_fedavg_of_one_client_with_all_the_data(tiny):
    """It takes as many steps a round as a whole cohort, and its server's blocks are what the client trained."""
    config = tiny(({"ag_news": 0.3}, {"ag_news": 0.7}), {"method": "centralised", "cohort_size": 2, "rounds": 1})
    experiment = experiments.build(config)
    engine = experiment.engine
    assert [client.samples for client in engine.data] == [config.data.train_size]
    assert engine.settings.local_steps == config.local_steps * config.cohort_size
    cohort = Cohort.of(engine, [0], 0)
    state = experiment.init()
    _, trained, losses = cohort.train(state, cohort.broadcast(state.server), "federated")
    assert int(losses.steps.sum()) == 6
    state, _ = experiment.round(state)
    same = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # noqa: E731
    jax.tree.map(same, engine.server_blocks(state.server), cohort.unload(trained)[0])
    rows = experiment.evaluate(experiment.finish(state))
    assert [(row["variant"], row["client"], row["task"]) for row in rows] == [("centralised", 0, "ag_news")]
