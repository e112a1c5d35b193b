"""A run that is killed in the middle and started again ends exactly as one that was left alone."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np

from tap_jax import experiment as experiments
from tap_jax.config import load_config, to_json
from tap_jax.engine import rounds
from tap_jax.engine.checkpointing import Checkpoints

ROWS = ({"ag_news": 0.3}, {"ag_news": 0.3}, {"ag_news": 0.4})
# With all that can be carried from round to round.
SETTINGS = {
    "variants": ("tap", "local", "fedavg+post"),
    "rounds": 6,
    "checkpoint_every": 2,
    "model.lora_dropout": 0.2,
    "optimizer.state": "persist",
}

PROGRAM = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
from tap_jax import runs
from tap_jax.config import load_config

config, workdir, kill_in = sys.argv[1], sys.argv[2], int(sys.argv[3])

def progress(line):
    if line["round"] == kill_in:  # its line is written, its checkpoint is not
        os.kill(os.getpid(), signal.SIGKILL)

runs.run(load_config(config), workdir, runs.Reporter(say=print, progress=progress))
"""


def run(config: pathlib.Path, workdir: pathlib.Path, kill_in: int = -1) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", PROGRAM, str(config), str(workdir), str(kill_in)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def without_time(workdir: pathlib.Path):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((workdir / "results.json").read_text())
    return (
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        results["results"],
        results["replacements"],
    )


def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(to_json(tiny(ROWS, SETTINGS)))
    whole = run(config, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    killed = run(config, tmp_path / "killed", kill_in=4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert Checkpoints(tmp_path / "killed" / "checkpoints").steps()[-1] == 4
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = run(config, tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after round 4 of 6" in resumed.stdout

    assert without_time(tmp_path / "killed") == without_time(tmp_path / "whole")
    initial = experiments.build(load_config(config)).init()
    states = [rounds.resume(Checkpoints(tmp_path / name / "checkpoints"), initial) for name in ("whole", "killed")]
    assert states[0].round == 6
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))
