"""A run that is killed and resumed equals an uninterrupted one to the bit; one program serves every cohort."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.data.sampling import sample_cohort
from tap_jax.engine import rounds
from tap_jax.engine.checkpointing import Checkpoints

ROWS = ({"ag_news": 0.2}, {"ag_news": 0.7}, {"common_gen": 1.0})
SETTINGS = {"rounds": 4, "variants": ("tap", "local", "fedavg"), "checkpoint_every": 2}

SCRIPT = """
    import json, os, signal, sys
    sys.path.insert(0, {root!r})
    import tests.conftest  # flags, devices
    import jax
    from tap_jax import config, experiment
    jax.config.update("jax_compilation_cache_dir", {cache!r})
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def progress(line):
        if line["round"] == {kill_after}:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = config.from_json(open({config!r}).read())
    experiment.run(settings, sys.argv[1], experiment.Reporter(print, progress))
"""


def outcome(workdir):
    """All that a run says it found, without the clock."""
    results = json.loads((workdir / "results.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return results["results"], results["replacements"], lines


def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny):
    root = os.fspath(pathlib.Path(__file__).parents[2])
    settings = tiny(ROWS, SETTINGS)
    path = tmp_path / "settings.json"
    path.write_text(experiments.configuration.to_json(settings))

    def play(workdir, kill_after=-1):
        fields = {"root": root, "cache": os.fspath(tmp_path / "cache"), "config": os.fspath(path)}
        code = textwrap.dedent(SCRIPT).format(kill_after=kill_after, **fields)
        return subprocess.run(
            [sys.executable, "-c", code, os.fspath(workdir)], capture_output=True, text=True, timeout=500, cwd=root
        )

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = play(whole)
    assert done.returncode == 0, done.stderr
    assert play(broken, kill_after=2).returncode == -signal.SIGKILL  # a checkpoint after round 2, killed in the third
    assert not (broken / "results.json").exists()
    resumed = play(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after round 2 of 4" in resumed.stdout
    assert outcome(whole) == outcome(broken)

    one = experiments.build(settings)
    states = [rounds.resume(Checkpoints(folder / "checkpoints"), one.init()) for folder in (whole, broken)]
    leaves = [experiments.jax.tree.leaves(experiments.jax.device_get(state)) for state in states]
    assert len(leaves[0]) == len(leaves[1]) > 20
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def experiment(tiny):
    return experiments.build(tiny(ROWS, SETTINGS))


def test_one_program_serves_rounds_post_training_and_distillation_of_every_cohort(experiment):
    state, cohorts = experiment.init(), set()
    for round_ in range(4):
        cohorts.add(tuple(sample_cohort(experiment.config.seed, round_, 3, 2)))
        state, _ = experiment.round(state)
    experiment.finish(state)
    assert len(cohorts) > 1
    assert experiment.engine._train.traces == 1


def test_tasks_that_nobody_has_cost_no_rows(experiment):
    """The loop over rows runs as often as there are rows: none for a family that the cohort lacks."""
    for clients, absent in (([0, 1], "common_gen"), ([2], "ag_news")):
        plan = experiment.engine.cohort(clients, 0).plan("federated", post=False)
        assert plan.rows[absent].count.sum() == 0
        samples = sum((rows.table.weights > 0).sum() for rows in plan.rows.values())
        s = experiment.engine.settings.microbatch
        useful = sum(
            -(-len(experiment.data.clients[k].streams[name]) // s)
            for k in clients
            for name in experiment.data.clients[k].streams
        )
        executed = sum(rows.count.sum() for rows in plan.rows.values())
        assert samples > 0 and executed <= useful + plan.active.sum()


def test_a_client_that_diverges_is_flagged_and_does_not_reach_the_server(experiment):
    engine = experiment.engine
    state = experiment.init()
    cohort = engine.cohort([0, 1], 0)
    stack = cohort.broadcast(state.server)
    broken = int(np.flatnonzero(cohort.clients == 0)[0])
    shard, local = divmod(broken, cohort.positions)
    seats = np.asarray(cohort.seats.client["head/4"][shard])
    slot = int(np.flatnonzero(seats == local)[0])
    stack = stack | {"head/4": stack["head/4"].at[shard, slot].set(np.nan)}
    trained, losses = cohort.train(stack, "federated")
    finite = np.isfinite(np.asarray(losses.mean()))
    assert not finite[broken].all() and finite[np.flatnonzero(cohort.clients == 1)[0]].all()
    server = engine.server_blocks(cohort.aggregate(state.server, trained, losses))
    alone = engine.cohort([1], 0)
    only, its_losses = alone.train(alone.broadcast(state.server), "federated")
    expected = engine.server_blocks(alone.aggregate(state.server, only, its_losses))
    for name in server:
        for a, b in zip(*map(experiments.jax.tree.leaves, (server[name], expected[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
