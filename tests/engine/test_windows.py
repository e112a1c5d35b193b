"""Rounds in windows: the numbers of one round after the other, whatever happens in between."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.assembly import cut
from tap_jax.config import config_hash, default_config, override, validate
from tap_jax.engine import windows
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.memory_plan import LAST, ROUND, WINDOW
from tap_jax.engine.rounds import resume, run_rounds
from tap_jax.errors import Preempted, UserError
from tap_jax.methods.base import Method
from tap_jax.planning.outline import outline
from tap_jax.planning.planned_memory import plan
from tests.trajectories import difference

# Clients with different blocks; one runs out of data. Both tasks are of one group, so that there is less to compile.
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
        for model, by_client in other["losses"].items():
            assert line["losses"][model].keys() == by_client.keys()
            for client, by_task in by_client.items():
                assert line["losses"][model][client] == pytest.approx(by_task, rel=tolerance)
    assert difference(state.server, expected_state.server) <= tolerance
    for models, others in (
        (state.client_models, expected_state.client_models),
        (state.moments, expected_state.moments),
    ):
        assert models.keys() == others.keys()
        for name in others:
            for k in range(len(ROWS)):
                assert difference(models[name][k], others[name][k]) <= tolerance
    for table in ("local_loss", "personal_loss", "replacements", "seen", "heard"):
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
    trained, train = [], experiment.engine.train_program

    def counted(*args):
        trained.append(int((np.asarray(args[6].clients) >= 0).sum()))
        return train(*args)

    monkeypatch.setattr(experiment.engine, "train_program", counted)
    same(play(experiment), expected)
    drawn = [line["clients"] for line in expected[1]]
    assert any(len(windows.waves(part)) > 1 for part in (drawn[:3], drawn[3:])), "a client comes twice in a window"
    parts = []
    for part in (drawn[:3], drawn[3:]):
        parts += [len(clients) for clients in part]
        parts += [size for wave in windows.waves(part) for size in 3 * [len(wave)]]  # two margins and the local models
    assert trained == parts


def test_two_programs_for_everything(experiment, monkeypatch):
    """Those that were made ready at the start: of a round's clients, and of a window's."""

    def compile_now(*args):
        raise AssertionError("not made ready")

    experiment.prepare()
    monkeypatch.setattr(experiment.engine.train_program, "_jitted", compile_now)
    play(experiment)


@pytest.mark.parametrize("mesh", [{"mesh.clients": 0}, {"mesh.clients": 4}], ids=["2 x 4", "4 x 1"])
def test_over_devices(tiny, expected, mesh):
    """Left to itself the mesh is for the clients of a round; with more of it those of a window fill it."""
    built = experiments.build(tiny(ROWS, WINDOW_OF_3 | mesh))
    assert (built.engine.devices.shards, built.engine.devices.per_shard) == ((4, 1) if mesh["mesh.clients"] else (2, 4))
    same(play(built), expected)


def test_where_optimizer_states_persist(tiny):
    """Those of W̃ go on from round to round, those of X from wave to wave."""
    built = experiments.build(tiny(ROWS, WINDOW_OF_3 | {"optimizer.state": "persist", "margins": 0.01}))
    same(play(built), without_windows(built))


def run(experiment, folder, rounds=FIELDS["rounds"], *, every=1, stop=lambda: False, state=None):
    """-> (the last state, the lines that were shown)."""
    folder.mkdir(exist_ok=True)
    shown, checkpoints = [], Checkpoints(folder / "checkpoints")
    state = state or experiment.init(folder)
    state = run_rounds(
        experiment.engine,
        experiment.method,
        resume(checkpoints, state) or state,
        rounds=rounds,
        workdir=folder,
        every=every,
        config_hash="",
        checkpoints=checkpoints,
        progress=shown.append,
        stop=stop,
    )
    return state, shown


def bits(state):
    return jax.device_get(state.replace(server=dict(state.server)))


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_resumed_at_a_windows_end(experiment, expected, tmp_path):
    whole, shown = run(experiment, tmp_path / "whole", every=0)
    assert [line["round"] for line in shown] == list(range(FIELDS["rounds"]))
    assert lines_of(tmp_path / "whole") == [{k: v for k, v in line.items() if k != "seconds"} for line in shown]
    assert Checkpoints(tmp_path / "whole" / "checkpoints").steps() == [5]
    # Asked in the midst of the second window: that one is dropped.
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 7

    with pytest.raises(Preempted, match="stopped after round 3 of 5, which is saved"):
        run(experiment, tmp_path / "run", every=0, stop=stop)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3]
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")[:3]
    state, _ = run(experiment, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, bits(state), bits(whole))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    # From a state in the midst of a window it is played to that window's end.
    state, line = experiment.round(experiment.init())
    state, lines = play(experiment, state)
    same((state, [line, *lines]), expected)


def test_a_run_stopped_in_its_first_window_begins_again(experiment, tmp_path):
    asked = []

    def stop():
        asked.append(True)
        return len(asked) > 3

    with pytest.raises(Preempted, match="stopped before the first round; the same command starts again"):
        run(experiment, tmp_path, stop=stop)
    assert len(asked) == 4 and Checkpoints(tmp_path / "checkpoints").steps() == [] and lines_of(tmp_path) == []


def test_checkpoints_are_of_the_ends_of_windows(experiment, tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *args: (saved.append(step), save(self, step, *args)))

    def without_training(engine, method, state, rounds, stop):
        last = min(rounds, state.round // 3 * 3 + 3)
        return state.replace(round=last), [{"round": t} for t in range(state.round, last)]

    monkeypatch.setattr("tap_jax.engine.rounds.play_window", without_training)
    for every, steps in ((4, [6, 9, 12, 16]), (2, [3, 6, 9, 12, 15, 16]), (6, [6, 12, 16]), (0, [16])):
        saved.clear()
        run(experiment, tmp_path / str(every), 16, every=every)
        assert saved == steps, every


def test_personal_blocks_in_a_store(tiny, experiment, expected, tmp_path):
    sections = cut(tiny(ROWS, WINDOW_OF_3 | {"engine.host_gigabytes": 1e-9}))
    stored = dataclasses.replace(experiment, sections=sections)
    state, lines = run(stored, tmp_path)
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    same((state.replace(server=experiment.engine.server_blocks(state.server)), lines), expected)
    assert (tmp_path / "store").is_dir()


def test_broken_updates_stop_the_run(tiny, experiment):
    built = experiments.build(
        tiny(ROWS, WINDOW_OF_3 | {"screening.on_broken": "stop", "screening.max_norm": 1e-9, "margins": 0.01})
    )
    built.engine.train_program = experiment.engine.train_program  # screening is of the aggregate's program
    with pytest.raises(UserError, match="screening.on_broken: 'stop', and round 1 has a broken update: client "):
        built.window(built.init())


def test_what_does_not_go_with_it_is_refused(tiny):
    config = override(default_config(), {"engine.window": 4})
    validate(config)
    assert config_hash(config) == config_hash(default_config())
    for fields, message in (
        ({"method": "fedavg"}, "engine.window: method 'fedavg' trains nothing that can wait for later rounds; use 0"),
        ({"engine.window": -1}, "engine.window: -1"),
        ({"engine.window": 1.5}, "engine.window: 1.5"),
    ):
        with pytest.raises(UserError) as error:
            validate(override(config, fields))
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    own = Method((), round=lambda cohort, state: (state, {}), finish=lambda cohort, state, variants: iter(()))
    with pytest.raises(UserError, match="engine.window: the method's round is not a SplitRound"):
        experiments.build(tiny(ROWS, WINDOW_OF_3), method=own, variants=("own",))
    assert experiments.build(tiny(ROWS, FIELDS | {"engine.window": 1}), method=own, variants=("own",))


def test_clients_of_several_rounds_have_no_aggregate(experiment):
    cohort, state = Cohort.of(experiment.engine, (0, 1), (0, 1)), experiment.init()
    state, params, losses = cohort.train(state, cohort.broadcast(state.server), "federated")
    with pytest.raises(ValueError, match="clients of several rounds have no aggregate"):
        cohort.aggregate(state, params, losses)


def test_memory_is_planned_for_the_clients_of_a_window(tiny):
    plain, windowed = (plan(outline(tiny(ROWS, fields | {"margins": 0.01}))) for fields in (FIELDS, WINDOW_OF_3))
    assert windowed.phases[LAST] == plain.phases[LAST] and WINDOW not in plain.phases
    one, window = windowed.phases[ROUND], windowed.phases[WINDOW]
    assert (one.clients, window.clients) == (2, 4), "no more than the federation has"
    assert one.parts["blocks in training"] == plain.phases[ROUND].parts["blocks in training"]
    assert one.parts["federated blocks of other rounds, at most"] == 2 * one.parts["blocks in training"]
    assert window.parts["blocks in training"] > one.parts["blocks in training"]
    assert windowed.on_device(WINDOW) > windowed.on_device(ROUND) > plain.on_device(ROUND)
