"""The same run on meshes of eight devices, by pmap and shard_map: the numbers of one device, by vmap.

A mesh of 2 x 2, of two processes, is in tests/test_processes.py.
"""

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tests.test_oracle import SETTINGS
from tests.trajectories import alive, check_same, play

ROWS = ({"ag_news": 0.2}, {"cifar100": 0.5, "ag_news": 0.7}, {"cifar100": 0.3})
VARIANTS = ("tap", "fedavg+post")
# Dropout is on: its keys must not depend on where a row is computed.
FIELDS = SETTINGS | {
    "variants": VARIANTS,
    "cohort_size": 2,
    "model.lora_dropout": 0.2,
    "model.head_dropout": 0.2,
    "engine.microbatch": 2,
}
# Of the cohort's two clients none, some or most of the shards are free, and rows lie on one, two or all devices.
# A mesh of one device per shard by shard_map is in tests/engine/test_windows.py and in tests/test_oracle.py.
MESHES = {
    "pmap": {"mesh.clients": 8, "mesh.parallel": "pmap"},
    "4x2": {"mesh.clients": 4, "mesh.data": 2},
    "1x8": {"mesh.clients": 1, "mesh.data": 8},
}


@pytest.fixture(scope="module")
def alone(tiny):
    experiment = alive(experiments.build(tiny(ROWS, FIELDS)))
    assert experiment.engine.devices.size == 1
    return *play(experiment), experiment


@pytest.mark.parametrize("mesh", MESHES)
def test_as_on_one_device(tiny, alone, mesh):
    """To 1e-5, over three rounds, both stages and the evaluation."""
    experiment = alive(experiments.build(tiny(ROWS, FIELDS | MESHES[mesh])))
    assert experiment.engine.devices.size == len(jax.devices()) == 8
    played, finished = play(experiment)
    check_same((played, finished), alone, VARIANTS)
    values = [[row["value"] for row in run.evaluate(end)] for run, end in ((experiment, finished), alone[2:0:-1])]
    np.testing.assert_allclose(*values, rtol=1e-4)
