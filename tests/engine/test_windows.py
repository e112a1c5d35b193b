"""Rounds in windows: the numbers of one round after the other, whatever happens in between."""

import dataclasses

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.engine import windows
from tests.trajectories import difference

# Clients with different blocks; one runs out of data. Both tasks are of one family, so that there is less to compile.
ROWS = ({"tiny_imagenet": 0.1}, {"cifar100": 0.5, "tiny_imagenet": 0.6}, {"cifar100": 0.1}, {"cifar100": 0.3})
FIELDS = {
    "variants": ("tap", "local"),
    "margins": (0.01, 0.5),
    "rounds": 5,
    "batch_size": 4,
    "engine.microbatch": 2,
    "post_steps": 2,
    "model.lora_dropout": 0.2,
    "model.head_dropout": 0.2,
    # Another rate in every round; small, since AdamW makes whole steps of gradients that are rounding noise around 0.
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_rounds": 4,
}
WINDOW_OF_3 = FIELDS | {"engine.window": 3}


def play(experiment, state=None):
    """(the last state, its server's blocks by name; all lines)."""
    state, lines = state or experiment.init(), []
    while state.round < FIELDS["rounds"]:
        state, more = experiment.window(state)
        lines += more
    return state.replace(server=experiment.engine.server_blocks(state.server)), lines


def same(played, expected, tolerance=1e-5):
    (state, lines), (expected_state, expected_lines) = played, expected
    for line, other in zip(lines, expected_lines, strict=True):
        assert line.keys() == other.keys()
        assert all(line[key] == other[key] for key in line if key != "losses")
        assert line["losses"].keys() == other["losses"].keys()
        for chain, by_client in other["losses"].items():
            assert line["losses"][chain].keys() == by_client.keys()
            for client, by_task in by_client.items():
                assert line["losses"][chain][client] == pytest.approx(by_task, rel=tolerance)
    assert difference(state.server, expected_state.server) <= tolerance
    for chains, others in ((state.chains, expected_state.chains), (state.moments, expected_state.moments)):
        assert chains.keys() == others.keys()
        for name in others:
            for k in range(len(ROWS)):
                assert difference(chains[name][k], others[name][k]) <= tolerance
    for table in ("local_loss", "personal_loss", "replacements", "seen", "finite"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance),
            getattr(state, table),
            getattr(expected_state, table),
        )


def without_windows(experiment):
    """Played by the same engine, round by round."""
    settings = experiment.engine.settings
    experiment.engine.settings = dataclasses.replace(settings, window=1)
    try:
        return play(experiment)
    finally:
        experiment.engine.settings = settings


def with_window(experiment, window):
    settings = experiment.engine.settings
    experiment.engine.settings = dataclasses.replace(settings, window=window)
    experiment.engine.shape_of.cache_clear()
    try:
        return play(experiment)
    finally:
        experiment.engine.settings = settings


@pytest.fixture(scope="module")
def experiment(tiny):
    return experiments.build(tiny(ROWS, WINDOW_OF_3))


@pytest.fixture(scope="module")
def expected(experiment):
    state, lines = without_windows(experiment)
    trained = sum(len(by_task) for line in lines for by_task in line["losses"]["federated"].values())
    assert 0 < sum(len(line["replacements"]) for line in lines) < 2 * trained, "of two margins"
    return state, lines


def test_waves():
    """A client's trainings in the order of its rounds, one in each wave."""
    drawn = [(0, 1), (1, 2), (2, 1), (3, 0)]
    first, second, third = windows.waves(drawn)
    assert first == [(0, 0), (0, 1), (1, 2), (3, 3)]
    assert second == [(1, 1), (2, 2), (3, 0)]
    assert third == [(2, 1)]
    assert windows.waves([]) == []


def test_as_one_round_after_the_other(experiment, expected, monkeypatch):
    trained, train = [], experiment.engine._train

    def counted(*args):
        trained.append(int((np.asarray(args[6].clients) >= 0).sum()))
        return train(*args)

    monkeypatch.setattr(experiment.engine, "_train", counted)
    same(play(experiment), expected)
    drawn = [line["clients"] for line in expected[1]]
    assert any(len(windows.waves(part)) > 1 for part in (drawn[:3], drawn[3:])), "a client comes twice in a window"
    parts = []
    for part in (drawn[:3], drawn[3:]):
        parts += [len(clients) for clients in part]
        parts += [size for wave in windows.waves(part) for size in 3 * [len(wave)]]  # two margins and the local chain
    assert trained == parts
