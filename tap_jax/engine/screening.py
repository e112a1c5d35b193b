"""Screening: whose update reaches the server, decided inside the compiled aggregation.

An update is Δ_i = W̃[i] after local training - W̃[i] as received, over all blocks that client i sends. One that is not
finite, or longer than it may be, is dropped: its weight is 0. A block that no other client sent keeps
the server's bits.

Letters: P positions of a cohort, R blocks, O tasks.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from tap_jax.engine.local_training import Losses
from tap_jax.engine.packed import Layout, Packed

# Why an update is dropped; `Verdicts.reason` is one more than the place here.
REASONS = ("blocks not finite", "loss not finite", "norm too large")


@dataclasses.dataclass(frozen=True)
class Screening:
    """What is done about hostile or broken updates; those that are not finite are always dropped.

    Attributes:
      max_norm: largest ‖Δ_i‖ that is heard; 0: any finite one.
      stop: the run ends in an error at the first update that is dropped.
    """

    max_norm: float = 0.0
    stop: bool = False


class Verdicts(struct.PyTreeNode):
    """What screening found.

    Attributes:
      reason: int32 [P]; 0 where nothing is wrong (a client without samples sends nothing, and nothing is wrong).
      norm: ‖Δ_i‖, float32 [P], or None where it is not asked for.
    """

    reason: Array
    norm: Array | None


def update_norms(server: Packed, cohort: Packed, server_layout: Layout, layout: Layout, sent: Array) -> Array:
    """‖Δ_i‖_2 of every client over all its sent blocks, float32 [P].

    Args:
      server: W̃ as it was broadcast, params of `server_layout`.
      cohort: params of `layout`.
      sent: bool [P, R], client k sends block r.
    """
    padded, place = jnp.pad(sent, ((0, 1), (0, 0))), jnp.asarray(server_layout.slot)[0]
    squares = jnp.zeros(len(sent) + 1, jnp.float32)
    for name, matrix in cohort.items():
        client, block = layout.owner[name], layout.block[name]
        length = jnp.square(matrix - server[name][place[block]]).sum(1)
        squares = squares.at[client].add(jnp.where(padded[client, block], length, 0))
    return jnp.sqrt(squares[:-1])


def screen(
    cohort: Packed, layout: Layout, sent: Array, losses: Losses, norm: Array | None, max_norm: float
) -> tuple[Array, Verdicts]:
    """(heard bool [P], `Verdicts`): whose update counts, and why others' do not.

    Args:
      cohort: params of `layout`. sent: bool [P, R].
      losses: of the local training. A client that took no step is not heard either: it has nothing to say.
      norm: `update_norms`, or None. max_norm: see `Screening`.
    """
    padded, broken = jnp.pad(sent, ((0, 1), (0, 0))), jnp.zeros(len(sent) + 1, bool)
    for name, matrix in cohort.items():
        client, block = layout.owner[name], layout.block[name]
        broken = broken.at[client].max(padded[client, block] & ~jnp.isfinite(matrix).all(1))
    lost = ~jnp.isfinite(losses.plain).all(1)
    # Of finite blocks, too, the difference or its square may overflow.
    long = jnp.zeros(len(sent), bool) if norm is None else ~(norm <= (max_norm or jnp.finfo(jnp.float32).max))
    reason = jnp.select([broken[:-1], lost, long], [1, 2, 3], 0)
    return losses.seen.any(1) & (reason == 0), Verdicts(reason, norm)


def dropped(verdicts: Sequence[Verdicts], clients: np.ndarray, labels: Sequence[int | str]) -> list[dict]:
    """The dropped updates of a round as JSON-ready entries {"client", "why"}, with "norm" where that is why.

    Args:
      verdicts: of the round's aggregations. clients: int [P], client numbers, -1 at an empty position.
      labels: what each client is called.
    """
    found = []
    for verdict in jax.device_get(list(verdicts)):
        for position in np.flatnonzero((verdict.reason > 0) & (clients >= 0)):
            why = REASONS[verdict.reason[position] - 1]
            entry = {"client": labels[clients[position]], "why": why}
            if why == REASONS[2]:
                norm = float(verdict.norm[position])
                entry["norm"] = norm if np.isfinite(norm) else None
            found.append(entry)
    return sorted(found, key=lambda entry: entry["client"])


def norms(verdicts: Sequence[Verdicts], clients: np.ndarray, labels: Sequence[int | str]) -> dict[str, float | None]:
    """What a client is called -> ‖Δ_i‖ in this round, where it was asked for; None where it is no number."""
    return {
        str(labels[client]): float(norm) if np.isfinite(norm) else None
        for verdict in jax.device_get(list(verdicts))
        if verdict.norm is not None
        for client, norm in sorted(zip(clients.tolist(), verdict.norm, strict=True))
        if client >= 0
    }


def describe(entry: Mapping) -> str:
    """One entry of `dropped` in words: "client 3 (norm too large: 1.2e+04)"."""
    norm = f": {entry['norm']:.3g}" if entry.get("norm") is not None else ""
    return f"client {entry['client']} ({entry['why']}{norm})"


def totals(lines: Iterable[Mapping]) -> dict | None:
    """Of a run's lines: {"updates", "dropped", "clients": client -> why -> count}; None where no client sent any."""
    lines = [line for line in lines if "dropped" in line]
    if not lines:
        return None
    clients: dict[str, collections.Counter] = {}
    for line in lines:
        for entry in line["dropped"]:
            clients.setdefault(str(entry["client"]), collections.Counter()).update([entry["why"]])
    return {
        "updates": sum(len(line["clients"]) for line in lines),
        "dropped": sum(len(line["dropped"]) for line in lines),
        "clients": {client: dict(clients[client]) for client in sorted(clients, key=_in_order)},
    }


def _in_order(label: str) -> tuple:
    """Numbers by size, and behind them names."""
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)
