"""FedAvg on the standard backbone against its oracle."""

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
    "optimizer.post_learning_rate": 1e-4,
}


@pytest.fixture(scope="module")
def experiment(tiny):
    return alive(experiments.build(tiny(ROWS, SETTINGS)))


@pytest.fixture(scope="module")
def run(experiment):
    return play(experiment)


def test_standard_backbone_equals_oracle(experiment, run):
    """One stack that all clients send and receive; rounds, +post, +2p."""
    assert "backbone" in experiment.partition.names and not any("mote" in name for name in experiment.partition.names)
    check_trunk(experiment, run, FedAvg(experiment))


@pytest.mark.parametrize("fault", ["clip", "uniform", "lambda"])
def test_the_comparison_notices(experiment, run, fault):
    with pytest.raises(AssertionError):
        check_trunk(experiment, run, FedAvg(experiment, fault))
