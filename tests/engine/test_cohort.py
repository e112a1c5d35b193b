"""One program for every cohort, no arithmetic for tasks nobody has, and nothing that is not a number gets out."""

import collections
import dataclasses
import threading

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.blocks import replacement_indicator
from tap_jax.engine import cohort as cohorts
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.local_training import broken_clients, without_broken
from tap_jax.engine.plans import Plans
from tap_jax.engine.preparation import prepare
from tap_jax.methods.base import LocalRule
from tap_jax.models.server_model import ServerModel
from tests.oracle import minibatches
from tests.trajectories import difference, play

ROWS = ({"ag_news": 0.2}, {"ag_news": 0.7, "cifar100": 0.5}, {"cifar100": 0.3}, {"fashion_mnist": 1.0})
SETTINGS = {
    "variants": ("tap", "fedavg"),
    "batch_size": 6,
    "engine.microbatch": 4,
    "post_steps": 4,
    "data.test_size": 24,
    "data.test_split": "personal",
}


class Counting(ServerModel):
    """A model whose forward passes are counted: when they are traced, and when they run."""

    def __init__(self, *args):
        super().__init__(*args)
        self.traced, self.executed = collections.Counter(), collections.Counter()

    def forward(self, frozen, parts, task, batch, *, key=None):
        self.traced[task.name] += 1
        jax.debug.callback(lambda: self.executed.update([task.name]))
        return super().forward(frozen, parts, task, batch, key=key)

    def run(self, function):
        """Forward passes that ran, by the first task of their task group."""
        self.executed.clear()
        jax.block_until_ready(function())
        jax.effects_barrier()
        return dict(self.executed)


@pytest.fixture(scope="module")
def counted(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "ServerModel", Counting)
        experiment = experiments.build(tiny(ROWS, SETTINGS))
    return experiment, experiment.model


def rows_needed(experiment, clients, phase, round_=0, *, post=False) -> dict[str, int]:
    """How many rows of at most 4 samples the clients' minibatches make."""
    config, needed = experiment.config, collections.Counter()
    steps, epochs = (config.post_steps, None) if post else (config.local_steps, 1)
    for i in clients:
        data = experiment.data.clients[i]
        for minibatch in minibatches(data, experiment.model.streams, config, i, round_, phase, steps, epochs):
            for task, samples in minibatch.items():
                needed[task] += -(-len(samples) // 4)
    return dict(needed)


def train(experiment, clients, phase="federated", round_=0, **kwargs):
    cohort = Cohort.of(experiment.engine, clients, round_)
    state = experiment.init()
    return cohort.train(state, cohort.broadcast(state.server), phase, **kwargs)


def test_one_program_and_only_useful_rows(counted):
    """Cohorts, batch mixes, data sizes, phases, with and without a teacher."""
    experiment, counter = counted
    train(experiment, [0, 1])
    traced = dict(counter.traced)
    for clients in ([0, 1], [0, 3], [2, 3], [1, 2], [0], [3]):
        for round_ in (0, 5):
            ran = counter.run(lambda c=clients, r=round_: train(experiment, c, round_=r))
            assert ran == rows_needed(experiment, clients, "federated", round_)
    # A client without the task adds nothing for it, and the other way round.
    rows = [rows_needed(experiment, clients, "federated") for clients in ([0], [3], [0, 3])]
    assert set(rows[0]) == {"ag_news"} and set(rows[1]) == {"fashion_mnist"} and rows[2] == rows[0] | rows[1]

    ran = counter.run(lambda: train(experiment, [1, 3], "post", 3, post=True))
    assert ran == rows_needed(experiment, [1, 3], "post", 3, post=True)
    cohort = Cohort.of(experiment.engine, [1, 3], 3)
    state = experiment.init()
    ran = counter.run(
        lambda: cohort.train(
            state, cohort.broadcast(state.server), "distil", post=True, teacher=cohort.broadcast(state.server)
        )[1:]
    )
    needed = rows_needed(experiment, [1, 3], "distil", 3, post=True)
    assert ran == {task: 2 * count for task, count in needed.items()}, "the teacher's pass, and no other"

    assert dict(counter.traced) == traced
    engine = experiment.engine
    assert engine.train_program.traces == 1


def test_a_small_client_stops_earlier(counted):
    experiment, _ = counted
    assert experiment.data.clients[0].samples == 10
    cohort = Cohort.of(experiment.engine, [0, 3], 0)
    state = experiment.init()
    _, _, losses = cohort.train(state, cohort.broadcast(state.server), "federated")
    steps = dict(zip(cohort.clients, np.asarray(losses.steps).sum(1), strict=True))
    assert steps == {0: 2, 3: 3}


@pytest.mark.parametrize("where", ["before training", "in the last step"])
def test_what_is_not_a_number_does_not_reach_the_server(counted, where):
    experiment, _ = counted
    engine, state = experiment.engine, experiment.init()
    cohort = Cohort.of(engine, [0, 1], 0)
    before = engine.server_blocks(state.server)
    personal = cohort.unload(cohort.broadcast(state.server))
    sick = {k: jax.tree.map(lambda x, k=k: np.full_like(x, np.nan) if k == 1 else x, personal[k]) for k in (0, 1)}
    _, params, losses = cohort.train(
        state, cohort.load([sick[0] if where == "before training" else personal[0], sick[1]]), "local"
    )
    if where == "in the last step":
        _, _, losses = cohort.train(state, cohort.load([personal[0], personal[1]]), "local")
        assert np.isfinite(losses.plain).all()
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), dict(params))
        losses = without_broken(losses, broken_clients(flat, cohort.flat_layout))
    # Nor does it reach the personal blocks.
    indicator = replacement_indicator(losses.mean(), np.inf, 0.0, losses.seen)
    healthy = (cohort.clients == 0)[:, None] & np.asarray(losses.seen)
    np.testing.assert_array_equal(indicator, healthy)
    after = engine.server_blocks(cohort.aggregate(state, params, losses).server)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    # What only client 1 has is as it was; what both have is client 0's.
    trained = cohort.unload(params)[0]
    for name, block in after.items():
        jax.tree.map(np.testing.assert_array_equal, block, trained[name] if name in trained else before[name])


def test_a_personal_loss_that_is_no_number_replaces_nothing(counted):
    """It is no first participation, whose h^(p) is +inf."""
    experiment, _ = counted
    state = experiment.init()
    assert experiment.round(state)[1]["replacements"]
    lost = {"personal": np.full_like(state.personal_loss["personal"], np.nan)}
    assert experiment.round(state.replace(personal_loss=lost))[1]["replacements"] == []


def test_a_nan_in_a_head_takes_the_result_of_its_task_only(counted):
    experiment, _ = counted
    state, head = experiment.init(), "head/ag_news"
    models = [dict(mine) for mine in state.client_models["personal"]]
    client = next(k for k, mine in enumerate(models) if head in mine and len(experiment.federation.tasks_of(k)) > 1)
    models[client][head] = jax.tree.map(lambda x: np.full_like(x, np.nan), models[client][head])
    for row in experiment.evaluate(state.replace(client_models={"personal": tuple(models)})):
        lost = (row["variant"], row["client"], row["task"]) == ("personal", client, "ag_news")
        assert (row["value"] is None) == lost, row


def test_a_dropped_update_takes_no_result_from_a_model_that_is_sound(counted, monkeypatch):
    """The model that is evaluated decides, of every variant; of the server's, whether anybody was heard."""
    experiment, _ = counted
    inputs, state, victim = Cohort.inputs, experiment.init(), 1

    def too_fast(self, now, **kwargs):
        found = inputs(self, now, **kwargs)
        rate = np.where((self.table == victim) & (now == "federated"), np.float32(1e30), found.rate)
        return found._replace(rate=rate)

    monkeypatch.setattr(Cohort, "inputs", too_fast)
    state, line = experiment.round(state, clients=(0, victim))
    monkeypatch.undo()
    (mine,) = [line["losses"]["federated"][str(victim)]]
    assert set(mine.values()) == {None}
    tasks = {task.name for task in experiment.federation.tasks_of(victim)}
    alone = tasks - {task.name for task in experiment.federation.tasks_of(0)}
    for row in experiment.evaluate(experiment.finish(state)):
        server = row["variant"] == "fedavg"
        assert (row["value"] is None) == (server and row["task"] in alone), row


def test_a_model_with_a_nan_has_no_result(counted):
    """As after a last phase that diverged: an argmax over NaN would look like a result."""
    experiment, _ = counted
    state = experiment.init()
    models = list(state.client_models["personal"])
    models[0] = jax.tree.map(lambda x: np.full_like(x, np.nan), models[0])
    rows = experiment.evaluate(state.replace(client_models={"personal": tuple(models)}))
    assert {row["client"] for row in rows if row["value"] is None} == {0}
    assert {row["variant"] for row in rows if row["value"] is None} == {"personal"}


@pytest.mark.parametrize("phase", ["post", "distil"])
def test_a_client_that_diverges_after_the_last_round_loses_its_own_result_only(counted, monkeypatch, phase):
    """As a teacher or as a student; all rounds went well, so the server's blocks have their values."""
    experiment, _ = counted
    inputs, victim = Cohort.inputs, 1

    def too_fast(self, now, **kwargs):
        found = inputs(self, now, **kwargs)
        rate = np.where((self.table == victim) & (now == phase), np.float32(1e30), found.rate)
        return found._replace(rate=rate)

    monkeypatch.setattr(Cohort, "inputs", too_fast)
    rows = experiment.evaluate(experiment.finish(experiment.init()))
    assert {(row["variant"], row["client"]) for row in rows} == {(v, k) for v in ("tap", "fedavg") for k in range(4)}
    for row in rows:
        assert (row["value"] is None) == (row["variant"] == "tap" and row["client"] == victim), row


def test_each_client_has_its_own_part_of_the_test_set(counted):
    """`data.test_split` "personal": models of clients and the server's are scored on it, and on nothing else."""
    experiment, _ = counted
    task = next(task for task in experiment.model.tasks if task.name == "ag_news")
    parts = [experiment.data.personal_tests[k]["ag_news"] for k in (0, 1)]
    assert list(map(len, parts)) == [5, 17] and not set(parts[0]) & set(parts[1]), "20 and 70 % of 24"
    test, rng = experiment.data.test["ag_news"], np.random.default_rng(2)

    def noisy(blocks):
        return jax.tree.map(lambda x: np.float32(x + 0.3 * rng.standard_normal(x.shape)), dict(blocks))

    @jax.jit
    def logits(blocks):
        parts = experiment.model.collect(blocks, task.streams[0])
        return experiment.model.apply(experiment.engine.frozen, parts, task, {"tokens": test.tokens})

    server = noisy(experiment.initial_blocks)
    personal = tuple(noisy(mine) for mine in experiment.init().client_models["personal"])
    state = experiment.init().replace(
        client_models={"personal": personal}, server=experiment.engine.server_params(server)
    )
    found = {(row["variant"], row["client"], row["task"]): row["value"] for row in experiment.evaluate(state)}
    for variant, models in (("personal", personal), ("fedavg", (server, server))):
        for client, ids in enumerate(parts):
            right = np.argmax(logits(models[client]), -1) == test.labels
            assert found[variant, client, "ag_news"] == pytest.approx(100 * right[ids].mean())
            others = (100 * right.mean(), 100 * right[parts[1 - client]].mean())
            assert found[variant, client, "ag_news"] not in map(pytest.approx, others), "would show nothing"


@pytest.mark.parametrize(("method", "phase"), [("local", "local"), ("fedavg", "federated")])
def test_every_round_begins_with_a_plan_that_was_drawn_ahead(tiny, monkeypatch, method, phase):
    """Drawn once, in the background, while the round before it runs; and it is what would be drawn when needed."""
    experiment = experiments.build(tiny(({"ag_news": 0.25},) * 4, SETTINGS | {"method": method, "variants": (method,)}))
    plans, state, ahead, drawn, draw = experiment.engine.plans, experiment.init(), [], [], Plans.training

    def noted(self, table, rounds, *args, **kwargs):
        drawn.append((int(rounds.max()), threading.current_thread() is threading.main_thread()))
        return draw(self, table, rounds, *args, **kwargs)

    monkeypatch.setattr(Plans, "training", noted)
    for round_ in range(3):
        state, line = experiment.round(state)
        assert line["clients"] == sorted(plans.clients(round_))
        ahead.append(plans.ahead(round_ + 1, phase).result())
    assert drawn == [(round_, False) for round_ in range(4)]
    for round_, plan in enumerate(ahead, 1):
        expected = Cohort.of(experiment.engine, plans.clients(round_), round_).plan(phase, post=False)
        jax.tree.map(np.testing.assert_array_equal, plan, expected)


def test_what_is_carried_from_training_to_training_is_in_the_state_alone(tiny):
    """Neither a cohort nor the engine has anything of its own that changes, and a state stays as it is."""
    fields = SETTINGS | {"method": "fedavg", "variants": ("fedavg+post",), "optimizer.state": "persist"}
    experiment = experiments.build(tiny(({"ag_news": 0.5},) * 2, fields))
    engine, before = experiment.engine, dict(vars(experiment.engine))
    cohort, first = Cohort.of(engine, [0, 1], 0), experiment.init()

    def train(state):
        state, params, losses = cohort.train(state, cohort.broadcast(first.server), "federated")
        return cohort.aggregate(state, params, losses), cohort.unload(params)

    (after, once), (again, twice) = train(first), train(first)
    jax.tree.map(np.testing.assert_array_equal, (once, dict(after.server)), (twice, dict(again.server)))
    assert len(after.verdicts) == len(again.verdicts) == 1 and first.verdicts == ()
    assert all(not leaf.any() for leaf in jax.tree.leaves(first.moments["federated"]))
    _, later = train(after)  # goes on with the optimizer states of the state
    assert difference(later[0], once[0]) > 1e-6
    experiment.finish(experiment.round(first)[0])
    assert vars(engine).keys() == before.keys() and all(vars(engine)[name] is before[name] for name in before)
    for field in dataclasses.fields(cohort):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cohort, field.name, None)


def test_no_place_for_a_teacher_where_blocks_are_large(tiny, monkeypatch):
    """Phases without one then have a program of their own; the numbers stay."""
    experiment = experiments.build(tiny(({"ag_news": 0.5}, {"ag_news": 0.5}), {"rounds": 2, "post_steps": 2}))
    kept = play(experiment)
    assert experiment.engine.train_program.traces == 1
    monkeypatch.setattr(cohorts, "TEACHER_RESERVED", 0)
    played, finished = play(experiment)
    assert experiment.engine.train_program.traces == 2
    for (state, line), (expected, expected_line) in zip(played, kept[0], strict=True):
        losses, expected_losses = line.pop("losses"), expected_line.pop("losses")
        assert line == expected_line
        for name, by_client in expected_losses.items():  # of two programs, so but for rounding
            for client, by_task in by_client.items():
                assert losses[name][client] == pytest.approx(by_task, rel=1e-6)
        assert difference(state.server, expected.server) < 1e-6
    for mine, theirs in zip(finished.models["tap"], kept[1].models["tap"], strict=True):
        assert difference(mine, theirs) < 1e-6


@pytest.mark.parametrize(
    ("takes_teacher", "teacher_optional", "programs"), [(False, False, 1), (True, False, 1), (True, True, 2)]
)
def test_a_program_for_each_way_of_training_is_made_ready(
    counted, monkeypatch, takes_teacher, teacher_optional, programs
):
    """A rule that always has a teacher has one only, however large blocks are."""
    experiment, _ = counted
    engine, prepared = experiment.engine, []
    monkeypatch.setattr(cohorts, "TEACHER_RESERVED", 0)
    monkeypatch.setattr(engine, "rule", LocalRule(takes_teacher=takes_teacher, teacher_optional=teacher_optional))
    monkeypatch.setattr(engine.train_program, "prepare", lambda *args: prepared.append(args[4]))
    cohort = Cohort.of(engine, [0, 1], 0)
    prepare(cohort)
    assert len(prepared) == programs
    assert (prepared[0] is None) == (cohort._teacher(None) is None) == (teacher_optional or not takes_teacher)
