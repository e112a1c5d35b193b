"""Pure functions of a cohort's parameters [D, G, n] of all shards together, to be compiled by the engine.

Letters: D shards, K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a shape class.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.blocks import chosen_blocks
from tap_jax.engine import packed
from tap_jax.engine.local_training import Losses
from tap_jax.engine.packed import Layout, Packed, flat
from tap_jax.engine.privacy import Privacy, private_aggregate
from tap_jax.engine.screening import Screening, Verdicts, screen, update_norms


def train(sharded: Callable, *args: Any) -> tuple[Packed, Packed | None, Losses]:
    """`local_training` over all shards -> (params, moments, losses [P, O])."""
    params, moments, losses = sharded(*args)
    return params, moments, jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), losses)


def aggregate(
    screening: Screening,
    privacy: Privacy | None,
    expected: np.ndarray,
    server_layout: Layout,
    server: Packed,
    params: Packed,
    layout: Layout,
    weights: Array,
    losses: Losses,
    key: Array | None,
) -> tuple[Packed, Verdicts]:
    """The server's blocks after a round, and what screening found.

    Args:
      expected: see `private_aggregate`; `key`, too.
      params: [D, G, n]. layout: of its flattened form. weights: [P, R], 0 where nothing is sent. losses: [P, O].
    """
    params, sent = flat(params), weights > 0
    norm = update_norms(server, params, server_layout, layout, sent) if screening.max_norm or privacy else None
    heard, found = screen(params, layout, sent, losses, norm, screening.max_norm)
    if privacy is None:
        weights = jnp.where(heard[:, None], weights, 0)
        return packed.aggregate(server, params, server_layout, layout, weights), found
    sent = sent & heard[:, None]
    after = private_aggregate(
        server, params, server_layout, layout, sent, norm, expected=expected, privacy=privacy, key=key
    )
    return after, found


def replace(personal: Packed, federated: Packed, layout: Layout, indicator: Array, replaceable: Array) -> Packed:
    """Equation 4 on parameters [D, G, n]; `layout` of their flat form, `indicator` [P, O], `replaceable` [P, O, R]."""
    chosen = chosen_blocks(indicator, replaceable)
    out = packed.replace(flat(personal), flat(federated), layout, chosen)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), out, dict(personal))


def regroup(out: Packed | None, params: Packed, index: Packed) -> Packed:
    """The slots of parameters [D, G, n] in the places where those of another cohort [D, H, n] want them.

    Args:
      out: [D, H, n], keeps what is not wanted from this params; None: that is 0.
      index: shape class -> int32 [D, H], slots among all D·G, -1 where nothing is wanted.
    """
    found = {}
    for name, rows in flat(params).items():
        wanted = rows[jnp.maximum(index[name], 0)]
        rest = jnp.zeros_like(wanted) if out is None else out[name]
        found[name] = jnp.where((index[name] >= 0)[..., None], wanted, rest)
    return found
