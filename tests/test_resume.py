"""A run that is killed or stopped in the middle and started again ends exactly as one that was left alone.

`python -m tests.faults` does so at many random moments.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.config import to_json
from tap_jax.engine import rounds
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.errors import Preempted, UserError
from tap_jax.runs import runner as runs
from tests.trajectories import run_by

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
from tap_jax.runs import runner as runs
from tap_jax.config import load_config

def progress(line):
    if line["round"] == 4:  # its line is written, its checkpoint is not
        os.kill(os.getpid(), signal.SIGKILL)

runs.run(load_config(sys.argv[1]), sys.argv[2], runs.Reporter(progress=progress))
"""


def environment(config: pathlib.Path) -> dict[str, str]:
    """With a compilation cache beside the configuration."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def experiment(tiny):
    """What all runs of this process share."""
    return experiments.build(tiny(ROWS, SETTINGS))


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """(a configuration file, folder of a run that was left alone)."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.json").write_text(to_json(experiment.config))
    run_by(experiment, folder / "run")
    return folder / "config.json", folder / "run"


def without_time(workdir: pathlib.Path):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((workdir / "results.json").read_text())
    return (
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        results["results"],
        results["replacements"],
    )


def assert_same(experiment, workdir: pathlib.Path, whole: pathlib.Path):
    """What the runs left is the same: lines, scores, replacements, models and the last state."""
    assert without_time(workdir) == without_time(whole)
    files = [path for path in (whole / "models").rglob("*") if path.is_file()]
    models = {str(path.relative_to(whole)): path.read_bytes() for path in files}
    assert all((workdir / name).read_bytes() == content for name, content in models.items())
    assert len(models) == 3 * len(ROWS)
    initial = experiment.init()
    states = [rounds.resume(Checkpoints(run / "checkpoints"), initial) for run in (workdir, whole)]
    assert states[0].round == 6
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))


def test_killed_and_resumed_equals_uninterrupted(experiment, whole, tmp_path):
    config, left_alone = whole
    command = [sys.executable, "-c", PROGRAM, str(config), str(tmp_path / "run")]
    killed = subprocess.run(command, env=environment(config), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] in (2, 4)  # 4 may have been under way
    assert not (tmp_path / "run" / "results.json").exists()
    resumed = run_by(experiment, tmp_path / "run")
    assert {f"resuming after round {done} of 6" for done in (2, 4)} & set(resumed)
    assert_same(experiment, tmp_path / "run", left_alone)


def test_other_numerics_are_noted(experiment, whole):
    checkpoints = Checkpoints(whole[1] / "checkpoints")
    for numerics, noted in ((experiment.engine.numerics, False), ("bfloat16, rows of 32", True)):
        assert rounds.resume(checkpoints, experiment.init(), None, numerics).round == 6
        assert [line.startswith("the run began with float32, rows of ") for line in checkpoints.notes] == [True] * noted


def test_lost_lines_of_rounds_are_noted(experiment, whole, tmp_path):
    """Replacements and the rounds' time are counted from metrics.jsonl: a damaged one must not go unnoticed."""
    _, left_alone = whole
    shutil.copytree(left_alone, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b'{"round": \xff\n', *lines[3:]]))
    run_by(experiment, tmp_path / "run")
    kept, everything = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", left_alone))
    assert kept["replacements"] == [event for event in everything["replacements"] if event["round"] != 2]
    assert any(event["round"] == 2 for event in everything["replacements"])
    note = "metrics.jsonl lacks 1 of 6 rounds"
    assert note in (tmp_path / "run" / "report.md").read_text() and note not in (left_alone / "report.md").read_text()


def test_a_run_without_rounds_can_be_evaluated(tiny, tmp_path):
    config = tiny(ROWS[:1], {"method": "fedavg", "rounds": 0, "cohort_size": 1})
    reporter = runs.Reporter(say=lambda line: None, progress=lambda line: None)
    assert runs.run(config, tmp_path, reporter) == runs.evaluate(tmp_path, reporter)


def test_stopped_and_resumed_equals_uninterrupted(experiment, whole, tmp_path):
    def stopped_in(round_):
        played = []
        with pytest.raises(Preempted) as stopped:
            run_by(
                experiment,
                tmp_path / "run",
                progress=lambda line: played.append(line["round"]),
                stop=lambda: round_ in played,
            )
        return str(stopped.value), played[0]

    message, first = stopped_in(2)
    assert message == "stopped after round 3 of 6, which is saved; the same command goes on there" and first == 0
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 3]
    message, first = stopped_in(5)
    assert message.startswith("stopped after the last round, which is saved; ") and first == 3
    assert not (tmp_path / "run" / "results.json").exists()
    assert "resuming after round 6 of 6" in run_by(experiment, tmp_path / "run")
    assert_same(experiment, tmp_path / "run", whole[1])


def test_sigterm_saves_and_is_status_143(whole, tiny, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(to_json(tiny(ROWS, SETTINGS | {"rounds": 100_000, "checkpoint_every": 0})))
    command = [sys.executable, "-m", "tap_jax", "train", f"--config={config}", f"--workdir={tmp_path}/run"]
    with subprocess.Popen(command, env=environment(whole[0]), stdout=-1, stderr=-1, text=True) as process:
        try:
            next(line for line in process.stdout if line.startswith("round 1/"))
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 143
    said, last = error.splitlines()
    assert said.startswith("SIGTERM: the run stops after what it is doing")
    played = int(re.fullmatch(r"tap-jax: stopped after round (\d+) of 100000, which is saved; .*", last)[1])
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [played]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == played


BUSY = """
import hashlib, os, signal, sys
from tap_jax.cli.preemption import Preemption

before = signal.getsignal(signal.SIGTERM)
with Preemption() as preemption:
    if sys.argv[1] != "early":
        preemption.arm()
    print("ready", flush=True)
    while not preemption.stop:
        pass
    print("asked", flush=True)
    if sys.argv[1] == "again":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which no handler of Python's can run
assert signal.getsignal(signal.SIGTERM) == before
print("left", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("mode", "status"), [("early", 143), ("again", 143), ("once", -signal.SIGTERM)])
def test_an_early_or_second_sigterm_stops_at_once_and_the_handler_is_put_back(mode, status):
    with subprocess.Popen([sys.executable, "-c", BUSY, mode], stdout=-1, stderr=-1, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == ("" if mode == "early" else "asked\n")
            if mode == "again":
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
            out, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == status
    assert out == ("left\n" if mode == "once" else "")
    said = {"again": ["again"], "early": ["before the first round"], "once": []}[mode]
    assert re.findall("SIGTERM (.*); stopped at once", error) == said


def test_a_round_leaves_the_state_before_it_as_it_was(experiment):
    """Its checkpoint may still be being written."""
    state, _ = experiment.round(experiment.init())
    before = jax.tree.map(np.array, jax.device_get(state))
    experiment.round(state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    for clients in ([], [0, 0], [3], [-1], [0, 1, 0]):  # not a round with nobody, or with somebody twice
        with pytest.raises(UserError, match="clients: .*; name at least one and at most 2 "):
            experiment.round(state, clients)
