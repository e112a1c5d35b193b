"""Plans: which samples every client trains on in a phase, drawn on the host from (seed, round, client, phase).

A client's minibatch is cut by stream into *rows* (`data.packing`). The plan is plain numpy; the compiled program is the
same for every plan of the same capacity.

Letters: K clients of a cohort shard, τ steps, N rows of one shape that fit in one step, S samples of a row.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import struct

from tap_jax.data import packing
from tap_jax.data.packing import RowShape, pack
from tap_jax.data.task_groups import TaskGroup
from tap_jax.data.text import TaskArrays

# Draws are seeded by a phase's place: add at the end. "unused" keeps the places of those behind it.
PHASES = ("cohort", "federated", "personal", "local", "post", "unused", "distil", "held_out", "probe", "noise")


@dataclasses.dataclass(frozen=True)
class ClientData:
    """What one client trains on.

    Attributes:
      streams: stream name -> int64 ids into its task's training set.
      tokens: stream name -> int32 target tokens per sample (1 where the loss is not per token).
      text_tokens: stream name -> int32 tokens of each sample's text (0 where the task has none).
    """

    streams: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    text_tokens: Mapping[str, np.ndarray]

    @property
    def samples(self) -> int:
        """|D_i|."""
        return sum(len(ids) for ids in self.streams.values())

    def only(self, names: Collection[str]) -> "ClientData":
        """The samples of the named streams."""
        parts = (self.streams, self.tokens, self.text_tokens)
        return ClientData(*({name: part[name] for name in part if name in names} for part in parts))

    def take(self, places: Mapping[str, np.ndarray]) -> "ClientData":
        """Of each stream the samples at these places; streams without any are left out."""
        parts = (self.streams, self.tokens, self.text_tokens)
        return ClientData(*({n: part[n][at] for n, at in places.items() if len(at)} for part in parts))


class Table(struct.PyTreeNode):
    """Rows of one shape and task group, per step; entries past the real ones are padding of weight 0.

    In a program a further axis stands in front, the minibatches of a step: [minibatches_per_step, τ, ...].

    Attributes:
      client: int32 [τ, N], position in the cohort shard.
      stream: int32 [τ, N], which of the group's streams all samples of the row are of.
      ids: int32 [τ, N, S], samples of the group's arrays.
      weights: float32 [τ, N, S]; over one client's minibatch and task they add up to 1.
      share: float32 [τ, N], λ_o: the task's share of the client's minibatch.
      number: int32 [τ, N], of the row among those of its client, task group and step (for dropout keys).
      text_at, answer_at: int32 [τ, N, S], where in the row's sequences a sample's text and answer begin, see
        `packing.Filled`; behind the end where there is no sample. None where the shape has no such sequences.
    """

    client: np.ndarray
    stream: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    share: np.ndarray
    number: np.ndarray
    text_at: np.ndarray | None = None
    answer_at: np.ndarray | None = None


class Rows(struct.PyTreeNode):
    """A table of rows, of which the first are real.

    Attributes:
      table: the rows, [τ, N].
      count: int32 [τ], how many are real.
      with_statistics: int32 [τ], how many of them, the first, are of `first_clients`.
    """

    table: Table
    count: np.ndarray
    with_statistics: np.ndarray


class Plan(struct.PyTreeNode):
    """A phase of local training for one cohort shard.

    Attributes:
      rows: task group -> `Rows` of each shape, largest first.
      clients: int32 [K], client numbers (-1: no client at this position).
      active: bool [τ, K], client k takes a step.
      first: int32, the step to begin with.
      steps: int32, the last step in which anybody is active, plus one.
    """

    rows: Mapping[str, tuple[Rows, ...]]
    clients: np.ndarray
    active: np.ndarray
    first: np.ndarray | np.int32
    steps: np.ndarray | np.int32


def generator(seed: int, round_: int, client: int, phase: str, minibatch: int = 0) -> np.random.Generator:
    """The random stream of one (seed, round, client, phase, minibatch); independent of everything else."""
    return np.random.default_rng([seed, round_, client, PHASES.index(phase), *([minibatch] if minibatch else [])])


def sample_cohort(seed: int, round_: int, clients: int, size: int) -> np.ndarray:
    """`size` of `clients` clients, uniformly without replacement, in increasing order; int64 [size]."""
    return np.sort(generator(seed, round_, 0, "cohort").choice(clients, size, replace=False))


def hold_out(data: ClientData, fraction: float, seed: int, client: int) -> tuple[ClientData, ClientData]:
    """(training, held-out) samples of a client: `fraction` of each of its streams is held out, but never all of one."""
    rng, kept, held = generator(seed, 0, client, "held_out"), {}, {}
    for name, ids in data.streams.items():
        order = rng.permutation(len(ids))
        cut = min(round(fraction * len(ids)), len(ids) - 1)
        kept[name], held[name] = np.sort(order[cut:]), np.sort(order[:cut])
    return data.take(kept), data.take(held)


def minibatches(
    rng: np.random.Generator, samples: int, *, batch: int, steps: int, epochs: int | None
) -> list[np.ndarray]:
    """Positions 0..samples-1 cut into at most `steps` minibatches, each pass over them without replacement.

    Args:
      rng: shuffles every pass anew.
      samples: how many there are. batch, steps: at most so many in a minibatch, and minibatches.
      epochs: how often the data may be used; 1 in local training, None (as often as needed) after it.

    Returns:
      A list of int64 arrays of at most `batch` entries; the last one of a pass may be shorter.
    """
    drawn: list[np.ndarray] = []
    while len(drawn) < steps and epochs != 0:
        order = rng.permutation(samples)
        drawn += [order[start : start + batch] for start in range(0, samples, batch)]
        epochs = None if epochs is None else epochs - 1
    return drawn[:steps]


def row_shapes(
    task_groups: Sequence[TaskGroup],
    arrays: Mapping[str, TaskArrays],
    *,
    packed: bool,
    microbatch: int,
    batch: int,
    image_tokens: int,
    answers: bool = True,
) -> dict[str, tuple[RowShape, ...]]:
    """Task group -> shapes of its rows, largest first.

    Args:
      arrays: task -> the split whose lengths decide.
      packed: several texts share a sequence; else every sample has its own, and there is one shape.
      microbatch, batch, image_tokens: see `packing.packed`.
      answers: there is room for answers where the tasks have them.
    """

    def one(group: TaskGroup) -> tuple[RowShape, ...]:
        if not packed:
            return packing.padded(microbatch)
        splits = [arrays[task.name] for task in group.tasks]
        lengths = [split.answer_lengths for split in splits if answers and split.answer_lengths is not None]
        return packing.packed(
            packing.widths([split.text_lengths for split in splits]),
            packing.widths(lengths),
            microbatch=microbatch,
            batch=batch,
            image_tokens=image_tokens if "image" in group.tasks[0].modalities else 0,
        )

    return {group.name: one(group) for group in task_groups}


def capacities(
    data: Sequence[ClientData],
    task_groups: Sequence[TaskGroup],
    shapes: Mapping[str, Sequence[RowShape]],
    *,
    positions: int,
    batch: int,
    multiple: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Task group -> N of each shape: rows that one step of any `positions` clients can need (`packing.capacities`)."""
    return {
        group.name: packing.capacities(
            [[len(mine.streams[s.name]) for s in group.streams if s.name in mine.streams] for mine in data],
            shapes[group.name],
            positions=positions,
            batch=batch,
            multiple=multiple,
        )
        for group in task_groups
    }


def share_out(plan: Plan, devices: int) -> Plan:
    """The rows of every shard dealt round by round to so many devices; what is not rows is the same for all of them.

    Args:
      plan: stacked over shards, leaves [D, ...]; the rows' capacity is a multiple of `devices`.

    Returns:
      Leaves [D, devices, ...]; leading rows are still the first ones.
    """
    turn = np.arange(devices, dtype=np.int32)

    def rows(found: Rows) -> Rows:
        before = (slice(None),) * found.count.ndim
        pieces = [
            jax.tree.map(lambda leaf, at=at: leaf[(*before, slice(at, None, devices))], found.table) for at in turn
        ]

        def dealt(count: np.ndarray) -> np.ndarray:
            counts = [(np.maximum(count - at, 0) + devices - 1) // devices for at in turn]
            return np.stack(counts, axis=1).astype(np.int32)

        return Rows(
            jax.tree.map(lambda *x: np.stack(x, axis=1), *pieces), dealt(found.count), dealt(found.with_statistics)
        )

    same = {
        field.name: np.repeat(getattr(plan, field.name)[:, None], devices, axis=1)
        for field in dataclasses.fields(plan)
        if field.name != "rows"
    }
    return Plan(rows={name: tuple(map(rows, found)) for name, found in plan.rows.items()}, **same)


def draw_plan(
    data: Sequence[ClientData],
    clients: np.ndarray,
    task_groups: Sequence[TaskGroup],
    *,
    seed: int,
    round_: int | Sequence[int] | np.ndarray,
    phase: str,
    batch: int,
    shapes: Mapping[str, Sequence[RowShape]],
    steps: int,
    capacities: Mapping[str, Sequence[int]],
    starts: Mapping[str, int],
    length: int | None = None,
    epochs: int | None = 1,
    minibatch: int = 0,
    first_clients: Collection[int] = (),
) -> Plan:
    """The plan of one cohort shard.

    Args:
      data: of all clients of the federation.
      clients: int [K], client numbers, -1 for an empty position.
      task_groups: of all tasks of the federation, in order.
      seed, round_, phase: with the client's number and `minibatch` they determine its minibatches; see `generator`. The
        round may be given for every position, [K].
      batch: samples of a client's minibatch.
      shapes: task group -> shapes of its rows.
      steps: at most so many are taken; fewer where `epochs`, passes over a client's samples, are over before.
      capacities: task group -> N of each shape, a multiple of the devices of the shard.
      starts: task name -> where its samples start in its group's arrays.
      length: τ of the arrays (>= steps), so that phases of different length share one program.
      epochs: see `minibatches`.
      minibatch: its number, where a step takes several independent ones.
      first_clients: numbers of those whose rows come first.
    """
    length, rounds = steps if length is None else length, np.broadcast_to(round_, len(clients))
    rows = {
        group.name: tuple(map(_empty, shapes[group.name], capacities[group.name], itertools.repeat(length)))
        for group in task_groups
    }
    active = np.zeros((length, len(clients)), bool)
    order = sorted(range(len(clients)), key=lambda position: clients[position] not in first_clients)
    for position in order:
        client = int(clients[position])
        if client < 0:
            continue
        mine = data[client]
        if not mine.streams:
            continue
        pool = _Pool.of(mine)
        rng = generator(seed, int(rounds[position]), client, phase, minibatch)
        drawn = minibatches(rng, mine.samples, batch=batch, steps=steps, epochs=epochs)
        for step, chosen in enumerate(drawn):
            active[step, position] = True
            for group in task_groups:
                found = rows[group.name]
                _add_rows(found, shapes[group.name], group, starts, pool, position, step, chosen)
                if client in first_clients:
                    for one in found:
                        one.with_statistics[step] = one.count[step]
    used = np.flatnonzero(active.any(1))
    last = np.int32(used[-1] + 1 if len(used) else 0)
    return Plan(rows, np.asarray(clients, np.int32), active, np.int32(0), last)


class _Pool(NamedTuple):
    """The union of a client's data: stream names, and per sample its stream's number, its id and its tokens."""

    streams: list[str]
    owner: np.ndarray
    ids: np.ndarray
    tokens: np.ndarray
    text_tokens: np.ndarray

    @classmethod
    def of(cls, mine: ClientData) -> "_Pool":
        names = list(mine.streams)
        owner = np.repeat(np.arange(len(names)), [len(mine.streams[name]) for name in names])
        parts = (mine.streams, mine.tokens, mine.text_tokens)
        return cls(names, owner, *(np.concatenate([part[name] for name in names]) for part in parts))


def _empty(shape: RowShape, rows: int, length: int) -> Rows:
    def whole(dtype: type, *axes: int, value: int = 0) -> np.ndarray:
        return np.full((length, rows, *axes), value, dtype)

    table = Table(
        client=whole(np.int32),
        stream=whole(np.int32),
        ids=whole(np.int32, shape.samples),
        weights=whole(np.float32, shape.samples),
        share=whole(np.float32),
        number=whole(np.int32),
        text_at=whole(np.int32, shape.samples, value=shape.texts.total) if shape.texts else None,
        answer_at=whole(np.int32, shape.samples, value=shape.answers.total) if shape.answers else None,
    )
    return Rows(table, np.zeros(length, np.int32), np.zeros(length, np.int32))


def _add_rows(
    rows: Sequence[Rows],
    shapes: Sequence[RowShape],
    group: TaskGroup,
    starts: Mapping[str, int],
    pool: _Pool,
    position: int,
    step: int,
    chosen: np.ndarray,
) -> None:
    count = 0
    owner = pool.owner[chosen]
    of = {name: chosen[owner == number] for number, name in enumerate(pool.streams)}
    for task in group.tasks:
        by_domain = [(stream, of[stream.name]) for stream in task.streams if stream.name in of]
        size = sum(len(samples) for _, samples in by_domain)
        total = sum(pool.tokens[samples].sum(dtype=np.float64) for _, samples in by_domain)
        for stream, samples in by_domain:
            number = group.streams.index(stream)
            for filled in pack(shapes, len(samples), pool.text_tokens[samples], pool.tokens[samples]):
                row, found = samples[filled.samples], rows[filled.size]
                table, n = found.table, found.count[step]
                table.client[step, n] = position
                table.stream[step, n] = number
                table.ids[step, n, : len(row)] = starts[task.name] + pool.ids[row]
                table.weights[step, n, : len(row)] = pool.tokens[row] / total
                table.share[step, n] = size / len(chosen)
                table.number[step, n] = count
                if filled.text_at is not None and table.text_at is not None:
                    table.text_at[step, n, : len(row)] = filled.text_at
                if filled.answer_at is not None and table.answer_at is not None:
                    table.answer_at[step, n, : len(row)] = filled.answer_at
                found.count[step] += 1
                count += 1
