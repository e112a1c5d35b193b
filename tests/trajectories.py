"""Runs and oracles side by side."""

import dataclasses

import jax
import numpy as np
import pytest

from tap_jax.runs import runner as runs

TOLERANCE = 1e-4


def alive(experiment):
    """No zeros in the adapters, so that every path counts.

    The image head's ReLUs are moved away from their kink: of a million pixels one would fall on its other side.
    """
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda leaf: (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), dict(experiment.initial_blocks)
    )
    for name, head in noisy.get("head/image_generation", {}).items():
        head["bias"] += 0.0 if name == "deconv_2" else 1.0
    return dataclasses.replace(experiment, initial_blocks=noisy)


def difference(blocks, expected, start=None) -> float:
    """‖a - b‖ / ‖b‖ of the worst block; with `start` (before any training), as a part of the change: / ‖b - start‖.

    A block that has not changed must be the same to the bit. Left out is the key bias of the text head: a softmax does
    not see it, so its whole gradient is rounding noise.
    """

    def flat(name, tree):
        if name == "head/text_generation":
            bias = tree["block"]["attn_c_attn"]["bias"]
            bias = np.concatenate([part for n, part in enumerate(np.split(np.asarray(bias), 3)) if n != 1])
            tree = tree | {"block": tree["block"] | {"attn_c_attn": tree["block"]["attn_c_attn"] | {"bias": bias}}}
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    assert set(blocks) == set(expected)
    worst = 0.0
    for name in expected:
        ours, theirs = flat(name, blocks[name]), flat(name, expected[name])
        gap, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        if start is not None:
            size = np.linalg.norm(theirs - flat(name, start[name]))
        worst = max(worst, np.inf if gap > 0 and size == 0 else gap / max(size, 1e-30))
    return worst


def agree(blocks, expected, start) -> bool:
    """To 1e-4 of the parameters, and to 2 % of what training did to them."""
    return difference(blocks, expected) < TOLERANCE and difference(blocks, expected, start) < 0.02


def play(experiment):
    """Every state and line of a run, and its finished models."""
    state, played = experiment.init(), []
    for _ in range(experiment.config.rounds):
        state, line = experiment.round(state)
        played.append((state.replace(server=experiment.engine.server_blocks(state.server)), line))
    return played, experiment.finish(state)


def check_same(run, other, variants) -> None:
    """Two runs are alike to 1e-5, replacements exactly; a run is what `play` gives."""
    for (state, line), (expected, expected_line) in zip(run[0], other[0], strict=True):
        assert line["replacements"] == expected_line["replacements"]
        for model, by_client in expected_line["losses"].items():
            for client, by_task in by_client.items():
                assert line["losses"][model][client] == pytest.approx(by_task, rel=1e-5)
        assert difference(state.server, expected.server) < 1e-5
        for model in expected.client_models:
            for mine, theirs in zip(state.client_models[model], expected.client_models[model], strict=True):
                assert difference(mine, theirs) < 1e-5
    for variant in variants:
        for mine, theirs in zip(run[1].models[variant], other[1].models[variant], strict=True):
            assert difference(mine, theirs) < 1e-5


def check_federated(experiment, run, reference) -> None:
    """A run of a method without personal models against its oracle: losses and server's blocks of every round, and
    the finished model of every client."""
    played, finished = run
    start = experiment.initial_blocks
    for t, (state, line) in enumerate(played):
        losses = reference.round(t, line["clients"])["federated"]
        found = line["losses"]["federated"]
        assert {int(i): set(by_task) for i, by_task in found.items()} == {i: set(x) for i, x in losses.items()}
        for i, by_task in losses.items():
            assert found[str(i)] == pytest.approx(by_task, rel=TOLERANCE), (t, i)
        assert agree({b: state.server[b] for b in reference.server}, reference.server, start), t
    trained = {variant: models for variant, models in finished.models.items() if models is not None}
    for i in range(len(reference.mine)):
        expected = reference.finish(i, len(played))
        for variant, models in trained.items():
            assert agree(models[i], expected[variant], reference.start_of(i)), (variant, i)


def run_by(experiment, workdir, *, progress=lambda line: None, stop=lambda: False) -> list[str]:
    """`tap-jax train` in this process, by an experiment that is built already: nothing is compiled for a second run.

    Returns:
      What the run says.
    """
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "build", lambda config, **given: experiment)
        runs.run(experiment.config, workdir, runs.Reporter(say=said.append, progress=progress), stop)
    return said
