"""X of a round beside W̃ of the next: the numbers of one after the other, whatever happens in between."""

import dataclasses

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.config import config_hash, default_config, override, validate
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.memory_plan import LAST, ROUND
from tap_jax.engine.rounds import resume, run_rounds
from tap_jax.errors import UserError
from tap_jax.outline import outline
from tap_jax.planned_memory import plan
from tests.trajectories import difference

# Clients with different blocks; one runs out of data. Both tasks are of one family, so that there is less to compile.
ROWS = ({"tiny_imagenet": 0.1}, {"cifar100": 0.5, "tiny_imagenet": 0.6}, {"cifar100": 0.3})
FIELDS = {
    "variants": ("tap", "local"),
    "margins": (0.01, 0.5),
    "rounds": 4,
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
PIPELINED = FIELDS | {"engine.pipeline_rounds": True}
ROUNDS = range(FIELDS["rounds"])


def play(experiment, state=None):
    """Every state (server's blocks by name) and line."""
    state, played = state or experiment.init(), []
    while state.round < len(ROUNDS):
        state, line = experiment.round(state)
        played.append((state.replace(server=experiment.engine.server_blocks(state.server)), line))
    return played


def same(played, expected, tolerance):
    for (state, line), (expected_state, expected_line) in zip(played, expected, strict=True):
        assert line["clients"] == expected_line["clients"]
        assert line["replacements"] == expected_line["replacements"]
        for chain, by_client in expected_line["losses"].items():
            for client, by_task in by_client.items():
                assert line["losses"][chain][client] == pytest.approx(by_task, rel=max(tolerance, 1e-12))
        assert difference(state.server, expected_state.server) <= tolerance
        for chain, blocks in expected_state.chains.items():
            for mine, theirs in zip(state.chains[chain], blocks, strict=True):
                assert difference(mine, theirs) <= tolerance
        for table in ("local_loss", "personal_loss", "replacements", "seen", "finite"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance),
                getattr(state, table),
                getattr(expected_state, table),
            )


@pytest.fixture(scope="module")
def pipelined(tiny):
    experiment = experiments.build(tiny(ROWS, PIPELINED))
    cohort = experiment.engine.cohort((0, 1), 0)
    cohort.prepare()
    experiment.engine.pipeline.prepare(cohort)
    return experiment


@pytest.fixture(scope="module")
def expected(pipelined):
    """One after the other, by the same engine."""
    settings = pipelined.engine.settings
    pipelined.engine.settings = dataclasses.replace(settings, pipelined=0)
    played = play(pipelined)
    pipelined.engine.settings = settings
    lines = [line for _, line in played]
    trained = sum(len(by_task) for line in lines for by_task in line["losses"]["federated"].values())
    assert 0 < sum(len(line["replacements"]) for line in lines) < 2 * trained, "of two margins"
    assert any(set(a["clients"]) & set(b["clients"]) for a, b in zip(lines, lines[1:], strict=False))
    return played


@pytest.fixture
def positions(pipelined, monkeypatch):
    """Positions of every local training, in turn."""
    trained, train = [], pipelined.engine._train

    def counted(*args):
        trained.append(args[7].size)  # a rate for each
        return train(*args)

    monkeypatch.setattr(pipelined.engine, "_train", counted)
    return trained


def test_as_one_after_the_other(expected, pipelined, positions):
    same(play(pipelined), expected, 1e-5)
    # The first W̃ beside nobody; the others beside the last margin's X of the round before.
    rounds = [[4, 2, 4, 2], *[[2, 4, 2]] * (len(ROUNDS) - 2), [2, 2, 2]]
    assert positions == sum(rounds, [])
    assert pipelined.engine.pipeline._waiting is None


def test_two_programs_for_everything(pipelined, monkeypatch):
    """Those that were made ready at the start."""

    def compile_now(*args):
        raise AssertionError("not made ready")

    monkeypatch.setattr(pipelined.engine._train, "_jitted", compile_now)
    play(pipelined)
    assert pipelined.engine._train.traces == 2


def test_another_round_than_the_one_expected_trains_alone(pipelined, positions):
    """One that is played again, of another state, or of clients given by hand; to the bits of the others."""
    state, _ = pipelined.round(pipelined.init())
    after, line = pipelined.round(state)  # takes what was trained ahead
    assert positions == [4, 2, 4, 2, 2, 4, 2]
    again, line_again = pipelined.round(state)
    assert positions[7:] == [4, 2, 4, 2]
    assert line == line_again
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), jax.device_get(again))
    other = state.replace(server=jax.tree.map(lambda leaf: leaf + 1, dict(state.server)))
    assert pipelined.round(other)[1]["losses"]["federated"] != line["losses"]["federated"]
    positions.clear()
    pipelined.round(state)  # what it trains ahead is for the clients drawn
    by_hand = tuple(reversed(pipelined.engine.drawn(2)))
    _, line = pipelined.round(after, by_hand)
    assert positions == [4, 2, 4, 2] + [4, 2, 2, 2]
    assert line["losses"]["federated"] == pipelined.round(after)[1]["losses"]["federated"]


def test_resumed_in_the_middle(pipelined, tmp_path):
    def run(state, rounds):
        return run_rounds(
            pipelined.engine,
            pipelined.method,
            state,
            rounds=rounds,
            workdir=tmp_path,
            every=1,
            config_hash="",
            checkpoints=Checkpoints(tmp_path / "checkpoints"),
            progress=lambda line: None,
        )

    whole = play(pipelined)[-1][0]
    run(pipelined.init(), 2)
    state = run(resume(Checkpoints(tmp_path / "checkpoints"), pipelined.init()), len(ROUNDS))
    state = state.replace(server=pipelined.engine.server_blocks(state.server))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))


def test_over_all_devices(tiny, expected):
    """Left to itself the mesh serves both cohorts: 4 shards of 2 devices for 2 clients and 2 of the next round."""
    experiment = experiments.build(tiny(ROWS, PIPELINED | {"mesh.clients": 0}))
    engine = experiment.engine
    assert (engine.devices.shards, engine.devices.parts) == (4, 2)
    played = play(experiment)
    same(played, expected, 1e-5)
    for round_ in ROUNDS[1:]:
        tables = [engine.cohort(engine.drawn(n), n).table for n in (round_ - 1, round_)]
        assert ((np.hstack(tables) >= 0).sum(1) == 1).all(), "every device has something to do"
    # A run that begins anew has the same layout.
    state = experiment.init()
    for _ in range(2):
        state, _ = experiment.round(state)
    state = state.replace(server=dict(state.server))
    again = play(experiment, state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again[-1][0]), jax.device_get(played[-1][0]))


def test_what_does_not_go_with_it_is_refused():
    config = override(default_config(), {"engine.pipeline_rounds": True})
    validate(config)
    assert config_hash(config) == config_hash(default_config())
    for field, value in (("method", "fedavg"), ("optimizer.state", "persist")):
        with pytest.raises(UserError, match="^engine.pipeline_rounds: .*use False"):
            validate(override(default_config(), {"engine.pipeline_rounds": True, field: value}))


def test_memory_is_planned_for_both_cohorts(tiny):
    plain, both = (plan(outline(tiny(ROWS, fields | {"margins": 0.01}))) for fields in (FIELDS, PIPELINED))
    assert both.phases[LAST] == plain.phases[LAST]
    assert both.phases[ROUND].clients == 2 * plain.phases[ROUND].clients
    for name, size in plain.phases[ROUND].parts.items():
        twice = name in ("blocks in training", "their gradients", "AdamW's two moments")
        assert both.phases[ROUND].parts[name] == size * (1 + twice)
