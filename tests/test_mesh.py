"""The same run on meshes of eight devices, by pmap and shard_map: the numbers of one device, by vmap.

A mesh of 2 x 2, of two processes, is in tests/test_processes.py.
"""

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tests.test_oracle import SETTINGS
from tests.trajectories import alive, difference, play

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
    for (state, line), (expected, expected_line) in zip(played, alone[0], strict=True):
        assert line["replacements"] == expected_line["replacements"]
        for model, by_client in expected_line["losses"].items():
            for client, by_task in by_client.items():
                assert line["losses"][model][client] == pytest.approx(by_task, rel=1e-5)
        assert difference(state.server, expected.server) < 1e-5
        for model in expected.client_models:
            for mine, theirs in zip(state.client_models[model], expected.client_models[model], strict=True):
                assert difference(mine, theirs) < 1e-5
    for variant in VARIANTS:
        for mine, theirs in zip(finished.models[variant], alone[1].models[variant], strict=True):
            assert difference(mine, theirs) < 1e-5
    values = [[row["value"] for row in run.evaluate(end)] for run, end in ((experiment, finished), alone[2:0:-1])]
    np.testing.assert_allclose(*values, rtol=1e-4)
