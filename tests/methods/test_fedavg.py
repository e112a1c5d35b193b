"""FedAvg on the standard backbone against its oracle, and on pooled data."""

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tests.methods.oracles import FedAvg
from tests.trajectories import alive, check_trunk, play

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
    check_trunk(experiment, run, FedAvg(experiment))


@pytest.mark.parametrize("fault", ["clip", "uniform", "lambda"])
def test_the_comparison_notices(experiment, run, fault):
    with pytest.raises(AssertionError):
        check_trunk(experiment, run, FedAvg(experiment, fault))


def test_centralised_is_fedavg_of_one_client_with_all_the_data(tiny):
    """It takes as many steps a round as a whole cohort, and its server's blocks are what the client trained."""
    config = tiny(({"ag_news": 0.3}, {"ag_news": 0.7}), {"method": "centralised", "cohort_size": 2, "rounds": 1})
    experiment = experiments.build(config)
    engine = experiment.engine
    assert [client.samples for client in engine.data] == [config.data.train_size]
    assert engine.settings.local_steps == config.local_steps * config.cohort_size
    cohort = engine.cohort([0], 0)
    trained, losses = cohort.train(cohort.broadcast(experiment.init().server), "federated")
    assert int(losses.steps.sum()) == 6
    state, _ = experiment.round(experiment.init())
    same = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # noqa: E731
    jax.tree.map(same, engine.server_blocks(state.server), cohort.unload(trained)[0])
    rows = experiment.evaluate(experiment.finish(state))
    assert [(row["variant"], row["client"], row["task"]) for row in rows] == [("centralised", 0, "ag_news")]
