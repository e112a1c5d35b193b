"""Plans: which samples every client trains on in a phase, drawn on the host from (seed, round, client, purpose).

A client's minibatch is cut by stream into *rows* of s samples (the microbatch). The plan is plain numpy; the
compiled program is the same for every plan of the same capacity.

Letters: K clients of a cohort shard, τ steps, N rows of a stream that fit in one step, s samples of a row.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tap_jax.federation import Stream

PURPOSES = ("cohort", "federated", "personal", "local", "post", "distil", "post_personal")


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


@dataclasses.dataclass(frozen=True)
class Rows:
    """One stream's rows, a table per step; entries past `count` are padding of weight 0.

    Attributes:
      client: int32 [τ, N], position in the cohort shard.
      ids: int32 [τ, N, s], samples of the task.
      weights: float32 [τ, N, s]; over one client's minibatch and task they add up to 1.
      share: float32 [τ, N], λ_o: the task's share of the client's minibatch.
      part: int32 [τ, N], number of the row among those of its client, stream and step (for dropout keys).
      count: int32 [τ], real rows.
    """

    client: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    share: np.ndarray
    part: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """A phase of local training for one cohort shard.

    Attributes:
      rows: stream name -> `Rows`.
      clients: int32 [K], client numbers (-1: no client at this position).
      active: bool [τ, K], client k takes a step.
      steps: int32, the last step in which anybody is active, plus one.
    """

    rows: Mapping[str, Rows]
    clients: np.ndarray
    active: np.ndarray
    steps: np.ndarray


def generator(seed: int, round_: int, client: int, purpose: str) -> np.random.Generator:
    """The random stream of one (seed, round, client, purpose); independent of everything else."""
    return np.random.default_rng([seed, round_, client, PURPOSES.index(purpose)])


def sample_cohort(seed: int, round_: int, clients: int, size: int) -> np.ndarray:
    """`size` of `clients` clients, uniformly without replacement, in increasing order; int64 [size]."""
    return np.sort(generator(seed, round_, 0, "cohort").choice(clients, size, replace=False))


def minibatches(rng: np.random.Generator, samples: int, *, batch: int, steps: int, passes: int | None):
    """Positions 0..samples-1 cut into at most `steps` minibatches, each pass over them without replacement.

    Args:
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


def capacity(data: Sequence[ClientData], stream: str, *, positions: int, batch: int, microbatch: int) -> int:
    """N: rows of a stream that one step of `positions` clients can need, whoever they are."""
    rows = sorted((-(-min(batch, len(d.streams[stream])) // microbatch) for d in data if stream in d.streams))
    return max(1, sum(rows[-positions:]))


def draw_plan(
    data: Sequence[ClientData],
    clients: np.ndarray,
    streams: Sequence[Stream],
    *,
    seed: int,
    round_: int,
    purpose: str,
    batch: int,
    microbatch: int,
    steps: int,
    capacities: Mapping[str, int],
    length: int | None = None,
    passes: int | None = 1,
) -> Plan:
    """The plan of one cohort shard.

    Args:
      data: of all clients of the federation.
      clients: int [K], client numbers, -1 for an empty position.
      streams: all streams of the federation, in order.
      capacities: N per stream.
      length: τ of the arrays (>= steps), so that phases of different length share one program.
      passes: see `minibatches`.
    """
    length = steps if length is None else length
    rows = {
        stream.name: Rows(
            client=np.zeros((length, n), np.int32),
            ids=np.zeros((length, n, microbatch), np.int32),
            weights=np.zeros((length, n, microbatch), np.float32),
            share=np.zeros((length, n), np.float32),
            part=np.zeros((length, n), np.int32),
            count=np.zeros(length, np.int32),
        )
        for stream, n in ((stream, capacities[stream.name]) for stream in streams)
    }
    active = np.zeros((length, len(clients)), bool)
    for position, client in enumerate(clients):
        if client < 0:
            continue
        mine = [stream for stream in streams if stream.name in data[client].streams]
        ends = np.cumsum([len(data[client].streams[stream.name]) for stream in mine])
        rng = generator(seed, round_, int(client), purpose)
        drawn = minibatches(rng, data[client].samples, batch=batch, steps=steps, passes=passes)
        for step, chosen in enumerate(drawn):
            active[step, position] = True
            _add_minibatch(rows, data[client], mine, ends, position, step, chosen, microbatch)
    used = np.flatnonzero(active.any(1))
    return Plan(rows, np.asarray(clients, np.int32), active, np.int32(used[-1] + 1 if len(used) else 0))


def _add_minibatch(rows, data: ClientData, streams, ends, position, step, chosen, microbatch) -> None:
    owner = np.searchsorted(ends, chosen, side="right")
    parts = {}
    for number, stream in enumerate(streams):
        local = chosen[owner == number] - (ends[number - 1] if number else 0)
        if len(local):
            parts[stream] = (data.streams[stream.name][local], data.tokens[stream.name][local].astype(np.float64))
    sizes: dict[str, int] = {}
    tokens: dict[str, float] = {}
    for stream, (ids, lengths) in parts.items():
        sizes[stream.task.name] = sizes.get(stream.task.name, 0) + len(ids)
        tokens[stream.task.name] = tokens.get(stream.task.name, 0.0) + lengths.sum()
    for stream, (ids, lengths) in parts.items():
        table = rows[stream.name]
        for part, start in enumerate(range(0, len(ids), microbatch)):
            n, cut = table.count[step], slice(start, start + microbatch)
            size = len(ids[cut])
            table.client[step, n] = position
            table.ids[step, n, :size] = ids[cut]
            table.weights[step, n, :size] = lengths[cut] / tokens[stream.task.name]
            table.share[step, n] = sizes[stream.task.name] / len(chosen)
            table.part[step, n] = part
            table.count[step] += 1
