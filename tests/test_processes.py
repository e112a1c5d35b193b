"""Runs on two processes of two devices each, over loopback: the numbers of one, and resumed by one.

Personal blocks are in memory of both, or in a store on disk into which both write.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.config import to_json
from tap_jax.runs import runner as runs
from tests.trajectories import difference, run_by

ROWS = ({"ag_news": 0.2}, {"ag_news": 0.5}, {"ag_news": 0.3})
SETTINGS = {
    "variants": ("tap", "fedavg", "fedavg+post"),
    "rounds": 3,
    "checkpoint_every": 1,
    "model.lora_dropout": 0.2,
    # As in tests/test_oracle.py: steps of AdamW that are made of rounding noise must stay small.
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.post_learning_rate": 1e-4,
}
PROCESSES = 2


def start(config: pathlib.Path, workdir: pathlib.Path, *arguments: str) -> subprocess.Popen:
    """`tap-jax train` on two devices, with a compilation cache beside the configuration."""
    command = [sys.executable, "-m", "tap_jax", "train", f"--config={config}", f"--workdir={workdir}", *arguments]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(folder: pathlib.Path, name: str, *arguments: str) -> None:
    """A run on two processes, from its beginning."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--config.mesh.clients=2", "--config.mesh.data=2", *arguments]
    flags += [f"--coordinator=localhost:{port}", f"--processes={PROCESSES}"]
    several = [
        start(folder / "config.json", folder / name, *flags, f"--process={number}") for number in range(PROCESSES)
    ]
    said = []
    for process in several:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-3000:]
        said.append(out)
    assert "4 x cpu" in said[0] and not said[1], "only the first process speaks"


@pytest.fixture(scope="module")
def experiment(tiny):
    """On one device."""
    found = experiments.build(tiny(ROWS, SETTINGS))
    assert found.engine.devices.size == 1
    return found


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """A folder with runs on two processes, "memory" and "disk", and on "one"."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.json").write_text(to_json(experiment.config))
    together(folder, "memory")
    together(folder, "disk", "--config.engine.host_gigabytes=1e-9")
    run_by(experiment, folder / "one")
    return folder


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_two_processes_do_what_one_does(experiment, finished, kept):
    assert (finished / kept / "store").exists() == (kept == "disk")
    same(experiment, finished / kept, finished / "one")


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_what_two_processes_saved_one_resumes(experiment, finished, kept):
    resumed = finished / f"{kept} resumed"
    shutil.copytree(finished / kept, resumed)
    shutil.rmtree(resumed / "checkpoints" / "3")
    shutil.rmtree(resumed / "models")
    (resumed / "results.json").unlink()
    assert "resuming after round 2 of 3" in run_by(experiment, resumed)
    same(experiment, resumed, finished / "one")


def same(experiment, workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """Losses and finished models to 1e-5; replacements and the keys of all results exactly."""
    for variant in ("tap", "fedavg+post"):
        for client in range(len(ROWS)):
            ours, theirs = (runs.stored_model(experiment, folder, variant, client) for folder in (workdir, expected))
            assert difference(ours, theirs) < 1e-5, (variant, client)
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, expected)
    )
    assert len(ours) == len(theirs) == experiment.config.rounds
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["replacements"] == other["replacements"]
        for model, by_client in other["losses"].items():
            for client, by_task in by_client.items():
                assert mine["losses"][model][client] == pytest.approx(by_task, rel=1e-5)
    ours, theirs = (json.loads((folder / "results.json").read_text())["results"] for folder in (workdir, expected))
    keys = [[{name: row[name] for name in row if name != "value"} for row in rows] for rows in (ours, theirs)]
    assert keys[0] == keys[1]
    # A label may turn where two logits are equal but for rounding: one of six test samples.
    np.testing.assert_allclose([row["value"] for row in ours], [row["value"] for row in theirs], atol=100 / 6)
