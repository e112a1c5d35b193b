"""FedDAT: three sets of adapters, two turns on every minibatch, and the teacher of two of them."""

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.engine.cohort import client_batches
from tap_jax.experiment import Finished
from tests.methods.oracles import FedDAT
from tests.trajectories import agree, alive, check_federated, play

ROWS = ({"ag_news": 0.2}, {"fashion_mnist": 0.3, "ag_news": 0.5}, {"fashion_mnist": 0.4})
SETTINGS = {
    "method": "feddat",
    "variants": ("feddat", "feddat+post"),
    "batch_size": 5,
    "engine.microbatch": 4,
    "feddat.bottleneck": 3,
    "feddat.weight": 2.0,
    "optimizer.learning_rate_initial": 1e-3,
    "optimizer.learning_rate": 2e-3,
    "optimizer.post_learning_rate": 5e-4,
}


@pytest.fixture(scope="module", params=["fresh", "persist"])
def experiment(request, tiny):
    """With AdamW afresh at every local training, and with a client's own of before for A1, A0 and heads."""
    fields = {"optimizer.state": request.param}
    if request.param == "persist":  # and on two devices
        fields |= {"mesh.clients": 2}
    return alive(experiments.build(tiny(ROWS, SETTINGS | fields)))


@pytest.fixture(scope="module")
def run(experiment):
    return play(experiment)


def check(experiment, run, reference):
    """Losses, what the server has, the finished teachers, and every client's A0 after every round."""
    private = []
    play_round = reference.round

    def round_(t, cohort):
        found = play_round(t, cohort)
        private.append(list(reference.private))
        return found

    reference.round = round_
    check_federated(experiment, run, reference)
    for (state, _), expected in zip(run[0], private, strict=True):
        for mine, blocks in zip(state.client_models["private"], expected, strict=True):
            named = {f"private/{b}": tree for b, tree in blocks.items()}
            assert agree(mine, named, experiment.initial_blocks)


def test_run_equals_oracle(experiment, run):
    cohorts = [line["clients"] for _, line in run[0]]
    assert any(sum(i in cohort for cohort in cohorts) > 1 for i in range(len(ROWS))), "somebody must take part twice"
    check(experiment, run, FedDAT(experiment))


@pytest.mark.parametrize("fault", ["never refreshed", "forgetful", "late", "heads once", "clip"])
@pytest.mark.parametrize("experiment", ["fresh"], indirect=True)
def test_the_comparison_notices(experiment, run, fault):
    """A2 of the first round for ever, A0 anew every time, z_1 of after A1's step, heads that step in one turn only."""
    with pytest.raises(AssertionError):
        check(experiment, run, FedDAT(experiment, fault))


def test_held_out_losses_are_those_of_both_adapters_side_by_side(tiny):
    """Twice the same adapters, ½ each, are the adapters: the finished model's losses are the server's."""
    built = experiments.build(tiny(ROWS, SETTINGS | {"data.held_out": 0.3}))
    blocks, partition = alive(built).initial_blocks, built.partition
    dual = [
        built.model.dual(mine, mine)
        for k in range(len(ROWS))
        for mine in [{name: blocks[name] for name in partition.blocks_of(k) if not name.startswith("private/")}]
    ]
    losses, server = {}, built.engine.server_params(blocks)
    for cohort in client_batches(built.engine, 0):
        found = np.asarray(cohort.held_out_loss(cohort.broadcast(server)))
        losses |= dict(zip(cohort.clients.tolist(), found, strict=True))
    rows = built.held_out_loss(Finished(built.init(), {"feddat": tuple(dual)}))
    names = [task.name for task in built.model.tasks]
    assert rows and {row["task"] for row in rows} == set(names)
    for row in rows:
        assert row["value"] == pytest.approx(losses[row["client"]][names.index(row["task"])], rel=1e-5)


def test_only_the_communicated_adapters_travel(experiment, run):
    """The server's twins of private blocks stay what they were; a client pays for its A1 and heads alone."""
    last, line = run[0][-1]
    for name, tree in last.server.items():
        if name.startswith("private/"):
            jax.tree.map(np.testing.assert_array_equal, tree, experiment.initial_blocks[name])
    reference = FedDAT(experiment)
    for i, sent in line["bytes_sent"].items():
        leaves = jax.tree.leaves(reference.received(int(i)))
        assert sent == sum(4 * leaf.size for leaf in leaves)
