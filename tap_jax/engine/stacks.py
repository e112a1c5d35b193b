"""Pure functions of a cohort's stacks [D, G, n] of all shards together, to be compiled by the engine.

Letters: D shards (devices), K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a group.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax import blocks
from tap_jax.blocks import Seats, Stack
from tap_jax.engine.local_training import Losses
from tap_jax.engine.privacy import Privacy, private_aggregate
from tap_jax.engine.screening import Screening, Verdicts, screen, update_norms


def flatten_seats(shards: Sequence[Seats]) -> Seats:
    """One `Seats` over all P positions for stacks whose shard axis is flattened, [D·G, n]; numpy."""
    positions = len(shards[0].slot)
    total = positions * len(shards)

    def flat(group):
        parts = [
            np.where(shard.client[group] < positions, shard.client[group] + number * positions, total)
            for number, shard in enumerate(shards)
        ]
        return np.concatenate(parts).astype(np.int32)

    return Seats(
        np.concatenate([shard.slot for shard in shards]),
        {group: flat(group) for group in shards[0].client},
        {group: np.concatenate([shard.block[group] for shard in shards]) for group in shards[0].block},
    )


def flat(stack: Stack) -> Stack:
    """Without the axis of shards, [D·G, n]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stack)


def train(sharded: Callable, *args: Any) -> tuple[Stack, Stack | None, Losses]:
    """`local_training` over all shards -> (stack, moments, losses [P, O])."""
    stack, moments, losses = sharded(*args)
    return stack, moments, jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), losses)


def aggregate(
    screening: Screening,
    privacy: Privacy | None,
    expected: np.ndarray,
    server_seats: Seats,
    server: Stack,
    stack: Stack,
    seats: Seats,
    weights: Array,
    losses: Losses,
    key: Array | None,
) -> tuple[Stack, Verdicts]:
    """The server's blocks after a round, and what screening found.

    Args:
      expected: see `private_aggregate`; `key`, too.
      stack: [D, G, n]. seats: of its flattened form. weights: [P, R], 0 where nothing is sent. losses: [P, O].
    """
    stack, sent = flat(stack), weights > 0
    norm = update_norms(server, stack, server_seats, seats, sent) if screening.max_norm or privacy else None
    heard, found = screen(stack, seats, sent, losses, norm, screening.max_norm)
    if privacy is None:
        weights = jnp.where(heard[:, None], weights, 0)
        return blocks.aggregate(server, stack, server_seats, seats, weights), found
    sent = sent & heard[:, None]
    after = private_aggregate(
        server, stack, server_seats, seats, sent, norm, expected=expected, privacy=privacy, key=key
    )
    return after, found


def replace(personal: Stack, federated: Stack, seats: Seats, indicator: Array, replaceable: Array) -> Stack:
    """Equation 4 on stacks [D, G, n]; `seats` of their flattened form, `indicator` [P, O], `replaceable` [P, O, R]."""
    chosen = blocks.chosen_blocks(indicator, replaceable)
    out = blocks.replace(flat(personal), flat(federated), seats, chosen)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), out, dict(personal))
