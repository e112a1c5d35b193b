"""Plans: every drawn sample once, weights and shares as in equation 2, pure functions of their seeds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax.data.packing import RowShape, Sequences, padded
from tap_jax.data.sampling import ClientData, capacities, draw_plan, hold_out, minibatches, sample_cohort
from tap_jax.data.task_groups import TaskGroup
from tap_jax.tasks import TASKS

NEWS, MMLU, GEN = TASKS["ag_news"], TASKS["mmlu"], TASKS["common_gen"]
GROUPS = (TaskGroup((NEWS,)), TaskGroup((MMLU, GEN)))
STARTS = {"ag_news": 0, "mmlu": 0, "common_gen": 1000}


def client(rng, sizes):
    streams = {name: rng.choice(1000, size, replace=False) for name, size in sizes.items() if size}
    tokens = {name: rng.integers(1, 9, len(ids)) for name, ids in streams.items()}
    text_tokens = {name: rng.integers(1, 30, len(ids)) for name, ids in streams.items()}
    return ClientData(streams, tokens, text_tokens)


PADDED = {group.name: padded(4) for group in GROUPS}
PACKED = {
    group.name: (
        RowShape(7, Sequences(3, 32), Sequences(2, 16), cost=96),
        RowShape(3, Sequences(1, 32), Sequences(1, 16), cost=32),
    )
    for group in GROUPS
}


def plan_of(
    data,
    clients,
    *,
    batch=16,
    shapes=PADDED,
    steps=5,
    epochs=1,
    phase="federated",
    seed=3,
    round_=2,
    minibatch=0,
    first_clients=(),
):
    rows = capacities(data, GROUPS, shapes, positions=len(clients), batch=batch)
    return draw_plan(
        data,
        np.array(clients),
        GROUPS,
        seed=seed,
        round_=round_,
        phase=phase,
        batch=batch,
        shapes=shapes,
        steps=steps,
        capacities=rows,
        starts=STARTS,
        epochs=epochs,
        minibatch=minibatch,
        first_clients=first_clients,
    )


def drawn(plan, position):
    """Per step: [(task group, stream name, id, weight, share)] of a position."""
    out = []
    for step in range(len(plan.active)):
        found = []
        for group in GROUPS:
            for rows in plan.rows[group.name]:
                for n in range(rows.count[step]):
                    if rows.table.client[step, n] == position:
                        real = rows.table.weights[step, n] > 0
                        stream = group.streams[rows.table.stream[step, n]]
                        for id_, weight in zip(
                            rows.table.ids[step, n][real], rows.table.weights[step, n][real], strict=True
                        ):
                            at = int(id_) - STARTS[stream.task.name]
                            found.append((stream, at, weight, rows.table.share[step, n]))
        out.append(found)
    return out


sizes = st.fixed_dictionaries(
    {
        "ag_news": st.integers(0, 40),
        "mmlu/law": st.integers(0, 20),
        "mmlu/moral": st.integers(1, 20),
        "common_gen": st.integers(0, 30),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=4), st.integers(0, 10**6), st.sampled_from([PADDED, PACKED]))
def test_a_pass_uses_every_sample_at_most_once_and_weighs_it_as_equation_2(all_sizes, seed, shapes):
    rng = np.random.default_rng(seed)
    data = [client(rng, found) for found in all_sizes]
    plan = plan_of(data, range(len(data)), steps=20, shapes=shapes)
    for position, mine in enumerate(data):
        steps = drawn(plan, position)
        used = [(stream.name, id_) for found in steps for stream, id_, *_ in found]
        assert len(used) == len(set(used)) == mine.samples  # 20 steps of 16 are more than anybody has
        assert set(used) == {(name, int(id_)) for name, ids in mine.streams.items() for id_ in ids}
        for step, found in enumerate(steps):
            assert plan.active[step, position] == bool(found)
            for task in {stream.task for stream, *_ in found}:
                rows = [row for row in found if row[0].task == task]
                lengths = {
                    (name, int(id_)): n
                    for name in mine.streams
                    for id_, n in zip(mine.streams[name], mine.tokens[name], strict=True)
                }
                total = sum(lengths[stream.name, id_] for stream, id_, *_ in rows)
                for stream, id_, weight, share in rows:
                    assert np.isclose(weight, lengths[stream.name, id_] / total)  # a mean over the task's tokens
                    assert np.isclose(share, len(rows) / len(found))  # λ_o


def test_a_small_client_takes_fewer_steps_and_a_long_phase_reuses_its_data():
    rng = np.random.default_rng(0)
    data = [client(rng, {"ag_news": 20}), client(rng, {"ag_news": 100})]
    assert plan_of(data, [0, 1]).active.sum(0).tolist() == [2, 5]
    again = plan_of(data, [0, 1], epochs=None)
    assert again.active.sum(0).tolist() == [5, 5] and again.steps == 5
    ids = [[id_ for _, id_, *_ in found] for found in drawn(again, 0)]
    assert sorted(ids[0] + ids[1]) == sorted(ids[2] + ids[3]) == sorted(data[0].streams["ag_news"].tolist())


def test_a_client_draws_the_same_whoever_is_with_it_and_otherwise_for_every_seed_round_and_phase():
    rng = np.random.default_rng(1)
    data = [client(rng, {"ag_news": 60, "mmlu/law": 9, "common_gen": 30}) for _ in range(3)]
    alone = drawn(plan_of(data, [2]), 0)
    assert drawn(plan_of(data, [0, -1, 2]), 2) == alone == drawn(plan_of(data, [2]), 0)
    for change in ({"seed": 4}, {"round_": 3}, {"phase": "personal"}, {"minibatch": 1}):
        assert drawn(plan_of(data, [2], **change), 0) != alone


def test_rows_of_leading_clients_come_first_and_are_counted():
    rng = np.random.default_rng(2)
    data = [client(rng, {"ag_news": 40, "common_gen": 20}) for _ in range(3)]
    plain, led = plan_of(data, [0, 1, 2]), plan_of(data, [0, 1, 2], first_clients={2})
    for group in GROUPS:
        (rows,) = led.rows[group.name]
        for step in range(led.steps):
            clients = rows.table.client[step, : rows.count[step]]
            assert (clients[: rows.with_statistics[step]] == 2).all() and (
                clients[rows.with_statistics[step] :] != 2
            ).all()
        assert rows.with_statistics.sum() > 0 and not plain.rows[group.name][0].with_statistics.any()
    for position in range(3):
        assert drawn(led, position) == drawn(plain, position)


def test_positions_of_several_rounds():
    """Each draws what it draws in its own round."""
    rng = np.random.default_rng(0)
    data = [client(rng, {"ag_news": n, "common_gen": 30 - n}) for n in (5, 11, 25)]
    mixed = plan_of(data, [2, 0, 1], round_=np.array([7, 2, 3]))
    for position, (number, round_) in enumerate(((2, 7), (0, 2), (1, 3))):
        assert drawn(mixed, position) == drawn(plan_of(data, [number], round_=round_), 0)
        assert drawn(mixed, position) != drawn(plan_of(data, [number], round_=round_ + 1), 0)


@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(0, 0.99), st.integers(0, 10**6))
def test_what_is_held_out_is_not_trained_on(sizes, part, seed):
    mine = client(np.random.default_rng(seed), sizes)
    kept, held = hold_out(mine, part, seed, 3)
    for name, ids in mine.streams.items():
        ours, theirs = kept.streams[name], held.streams.get(name, np.zeros(0, int))
        assert sorted([*ours, *theirs]) == sorted(ids) and len(ours) >= 1
        assert len(theirs) == min(round(part * len(ids)), len(ids) - 1)
        tokens = dict(zip(ids.tolist(), mine.tokens[name].tolist(), strict=True))
        for found in (kept, held):
            if name in found.streams:
                assert found.tokens[name].tolist() == [tokens[id_] for id_ in found.streams[name].tolist()]
    again, _ = hold_out(mine, part, seed, 3)
    assert all(np.array_equal(kept.streams[name], again.streams[name]) for name in kept.streams)


def test_minibatches_and_cohorts():
    parts = minibatches(np.random.default_rng(0), 10, batch=4, steps=9, epochs=1)
    assert [len(part) for part in parts] == [4, 4, 2] and sorted(np.concatenate(parts)) == list(range(10))
    cohorts = {tuple(sample_cohort(0, round_, 30, 2)) for round_ in range(400)}
    assert len(cohorts) > 200 and all(a < b for a, b in cohorts)
    assert {k for pair in cohorts for k in pair} == set(range(30))
