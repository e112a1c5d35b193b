"""Plans: which samples every client trains on in a phase, drawn on the host from (seed, round, client, purpose).

A client's minibatch is cut by stream into *rows* of s samples (the microbatch). The plan is plain numpy; the
compiled program is the same for every plan of the same capacity.

Letters: K clients of a cohort shard, τ steps, N rows of a family that fit in one step, s samples of a row.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import struct

from tap_jax.data.families import Family

# Draws are seeded by a purpose's place: add at the end.
PURPOSES = ("cohort", "federated", "personal", "local", "post", "post_again", "distil", "held_out", "probe", "noise")


@dataclasses.dataclass(frozen=True)
class ClientData:
    """What one client trains on.

    Attributes:
      streams: stream name -> int64 ids into its task's training set.
      tokens: stream name -> int32 target tokens per sample (1 where the loss is not per token).
    """

    streams: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]

    @property
    def samples(self) -> int:
        """|D_i|."""
        return sum(len(ids) for ids in self.streams.values())


class Table(struct.PyTreeNode):
    """Rows of one family, per step; entries past the real ones are padding of weight 0.

    Attributes:
      client: int32 [τ, N], position in the cohort shard.
      variant: int32 [τ, N], which of the family's streams all samples of the row are of.
      ids: int32 [τ, N, s], samples of the family's arrays.
      weights: float32 [τ, N, s]; over one client's minibatch and task they add up to 1.
      share: float32 [τ, N], λ_o: the task's share of the client's minibatch.
      part: int32 [τ, N], number of the row among those of its client, family and step (for dropout keys).
    """

    client: np.ndarray
    variant: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    share: np.ndarray
    part: np.ndarray


class Rows(struct.PyTreeNode):
    """A table and how many of its rows are real: count int32 [τ]; the first `lead` int32 [τ] are of leading clients."""

    table: Table
    count: np.ndarray
    lead: np.ndarray


class Plan(struct.PyTreeNode):
    """A phase of local training for one cohort shard.

    Attributes:
      rows: family name -> `Rows`.
      clients: int32 [K], client numbers (-1: no client at this position).
      active: bool [τ, K], client k takes a step.
      first: int32, the step to begin with.
      steps: int32, the last step in which anybody is active, plus one.
    """

    rows: Mapping[str, Rows]
    clients: np.ndarray
    active: np.ndarray
    first: np.ndarray
    steps: np.ndarray


def generator(seed: int, round_: int, client: int, purpose: str, draw: int = 0) -> np.random.Generator:
    """The random stream of one (seed, round, client, purpose, draw); independent of everything else."""
    return np.random.default_rng([seed, round_, client, PURPOSES.index(purpose), *([draw] if draw else [])])


def sample_cohort(seed: int, round_: int, clients: int, size: int) -> np.ndarray:
    """`size` of `clients` clients, uniformly without replacement, in increasing order; int64 [size]."""
    return np.sort(generator(seed, round_, 0, "cohort").choice(clients, size, replace=False))


def hold_out(data: ClientData, part: float, seed: int, client: int) -> tuple[ClientData, ClientData]:
    """(training, held-out) samples of a client: `part` of each of its streams is held out, but never all of one."""
    rng, kept, held = generator(seed, 0, client, "held_out"), {}, {}
    for name, ids in data.streams.items():
        order = rng.permutation(len(ids))
        cut = min(round(part * len(ids)), len(ids) - 1)
        kept[name], held[name] = np.sort(order[cut:]), np.sort(order[:cut])

    def chosen(places: Mapping[str, np.ndarray]) -> ClientData:
        parts = ({n: part[n][at] for n, at in places.items() if len(at)} for part in (data.streams, data.tokens))
        return ClientData(*parts)

    return chosen(kept), chosen(held)


def minibatches(
    rng: np.random.Generator, samples: int, *, batch: int, steps: int, passes: int | None
) -> list[np.ndarray]:
    """Positions 0..samples-1 cut into at most `steps` minibatches, each pass over them without replacement.

    Args:
      rng: shuffles every pass anew.
      samples: how many there are. batch, steps: at most so many in a minibatch, and minibatches.
      passes: how often the data may be used; 1 in local training, None (as often as needed) after it.

    Returns:
      A list of int64 arrays of at most `batch` entries; the last one of a pass may be shorter.
    """
    drawn: list[np.ndarray] = []
    while len(drawn) < steps and passes != 0:
        order = rng.permutation(samples)
        drawn += [order[start : start + batch] for start in range(0, samples, batch)]
        passes = None if passes is None else passes - 1
    return drawn[:steps]


def rows_needed(data: ClientData, family: Family, *, batch: int, microbatch: int) -> int:
    """Rows that one minibatch of the client can need for the family; a row holds one stream."""
    sizes = [len(data.streams[stream.name]) for stream in family.streams if stream.name in data.streams]
    full = sum(-(-min(batch, size) // microbatch) for size in sizes)
    # However the minibatch falls, each stream leaves at most one row unfilled.
    return min(full, batch // microbatch + len(sizes))


def capacities(
    data: Sequence[ClientData],
    families: Sequence[Family],
    *,
    positions: int,
    batch: int,
    microbatch: int,
    multiple: int = 1,
) -> dict[str, int]:
    """Family name -> N, the rows that one step of any `positions` clients can need, a `multiple` and at least that."""
    out = {}
    for family in families:
        rows = sorted(rows_needed(client, family, batch=batch, microbatch=microbatch) for client in data)
        out[family.name] = max(1, -(-sum(rows[-positions:]) // multiple)) * multiple
    return out


def share_out(plan: Plan, parts: int) -> Plan:
    """The rows of every shard dealt round by round to `parts` devices; what is not rows is the same for all of them.

    Args:
      plan: stacked over shards, leaves [D, ...]; the rows' capacity is a multiple of `parts`.

    Returns:
      Leaves [D, parts, ...]; leading rows are still the first ones.
    """
    turn = np.arange(parts, dtype=np.int32)

    def rows(found: Rows) -> Rows:
        before = (slice(None),) * found.count.ndim
        pieces = [jax.tree.map(lambda leaf, at=at: leaf[(*before, slice(at, None, parts))], found.table) for at in turn]

        def dealt(count: np.ndarray) -> np.ndarray:
            return np.stack([(np.maximum(count - at, 0) + parts - 1) // parts for at in turn], axis=1).astype(np.int32)

        return Rows(jax.tree.map(lambda *x: np.stack(x, axis=1), *pieces), dealt(found.count), dealt(found.lead))

    same = {
        field.name: np.repeat(getattr(plan, field.name)[:, None], parts, axis=1)
        for field in dataclasses.fields(plan)
        if field.name != "rows"
    }
    return Plan(rows={name: rows(found) for name, found in plan.rows.items()}, **same)


def draw_plan(
    data: Sequence[ClientData],
    clients: np.ndarray,
    families: Sequence[Family],
    *,
    seed: int,
    round_: int | Sequence[int] | np.ndarray,
    purpose: str,
    batch: int,
    microbatch: int,
    steps: int,
    capacities: Mapping[str, int],
    starts: Mapping[str, int],
    length: int | None = None,
    passes: int | None = 1,
    draw: int = 0,
    lead: Collection[int] = (),
) -> Plan:
    """The plan of one cohort shard.

    Args:
      data: of all clients of the federation.
      clients: int [K], client numbers, -1 for an empty position.
      families: of all tasks of the federation, in order.
      seed, round_, purpose: with the client's number and `draw` they determine its minibatches; see `generator`. The
        round may be given for every position, [K].
      batch: samples of a client's minibatch. microbatch: s.
      steps: at most so many are taken; fewer where `passes` over a client's samples are over before.
      capacities: N per family, a multiple of the rows that a chunk takes on every device of the shard.
      starts: task name -> where its samples start in its family's arrays.
      length: τ of the arrays (>= steps), so that phases of different length share one program.
      passes: see `minibatches`.
      draw: number of the draw, where a step takes several independent ones.
      lead: client numbers whose rows come first.
    """
    length, rounds = steps if length is None else length, np.broadcast_to(round_, len(clients))
    rows = {family.name: _empty(length, capacities[family.name], microbatch) for family in families}
    active = np.zeros((length, len(clients)), bool)
    order = sorted(range(len(clients)), key=lambda position: clients[position] not in lead)
    for position in order:
        client = int(clients[position])
        if client < 0:
            continue
        mine = data[client]
        if not mine.streams:
            continue
        owner = np.repeat(np.arange(len(mine.streams)), [len(ids) for ids in mine.streams.values()])
        pool = _Pool(
            list(mine.streams), owner, *(np.concatenate(list(part.values())) for part in (mine.streams, mine.tokens))
        )
        rng = generator(seed, int(rounds[position]), client, purpose, draw)
        drawn = minibatches(rng, mine.samples, batch=batch, steps=steps, passes=passes)
        for step, chosen in enumerate(drawn):
            active[step, position] = True
            for family in families:
                _add_rows(rows[family.name], family, starts, pool, position, step, chosen)
                if client in lead:
                    rows[family.name].lead[step] = rows[family.name].count[step]
    used = np.flatnonzero(active.any(1))
    last = np.int32(used[-1] + 1 if len(used) else 0)
    return Plan(rows, np.asarray(clients, np.int32), active, np.int32(0), last)


class _Pool(NamedTuple):
    """The union of a client's data: stream names, and per sample its stream's number, its id, its target tokens."""

    streams: list[str]
    owner: np.ndarray
    ids: np.ndarray
    tokens: np.ndarray


def _empty(length: int, rows: int, microbatch: int) -> Rows:
    whole = lambda dtype, *shape: np.zeros((length, rows, *shape), dtype)  # noqa: E731
    table = Table(
        client=whole(np.int32),
        variant=whole(np.int32),
        ids=whole(np.int32, microbatch),
        weights=whole(np.float32, microbatch),
        share=whole(np.float32),
        part=whole(np.int32),
    )
    return Rows(table, np.zeros(length, np.int32), np.zeros(length, np.int32))


def _add_rows(rows: Rows, family: Family, starts, pool: _Pool, position: int, step: int, chosen: np.ndarray) -> None:
    table, part = rows.table, 0
    microbatch = table.ids.shape[-1]
    of = {name: chosen[pool.owner[chosen] == number] for number, name in enumerate(pool.streams)}
    for task in family.tasks:
        by_domain = [(stream, of[stream.name]) for stream in task.streams if stream.name in of]
        size = sum(len(samples) for _, samples in by_domain)
        total = sum(pool.tokens[samples].sum(dtype=np.float64) for _, samples in by_domain)
        for stream, samples in by_domain:
            for start in range(0, len(samples), microbatch):
                row, n = samples[start : start + microbatch], rows.count[step]
                table.client[step, n] = position
                table.variant[step, n] = family.streams.index(stream)
                table.ids[step, n, : len(row)] = starts[task.name] + pool.ids[row]
                table.weights[step, n, : len(row)] = pool.tokens[row] / total
                table.share[step, n] = size / len(chosen)
                table.part[step, n] = part
                rows.count[step] += 1
                part += 1
