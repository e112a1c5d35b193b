"""What a replacement criterion may ask of a cohort beyond its training losses; compiled when first asked for.

Letters: D shards, P positions, O tasks, R blocks, s samples of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from tap_jax.engine.objective import Objective, Where, gradient, no_losses, over_rows
from tap_jax.engine.parallel import CLIENTS, ROWS, SHARED, Devices
from tap_jax.methods.base import PLAIN, Row


class Probes:
    """Programs of (frozen, data, models, layout, plan), where a plan has one minibatch of every client.

    Args:
      objective: of training; of it the tasks' losses alone are asked for, without the rule's terms and without dropout.
      model: its `represent`.
      devices: where they run.
      blocks: R.
    """

    def __init__(self, objective: Objective, model: Any, devices: Devices, blocks: int):
        def loss(frozen, parts, task, batch, key):
            return objective.sample_loss(frozen, parts, task, batch, None)

        self.objective = dataclasses.replace(objective, sample_loss=loss, rule=PLAIN)
        self.model, self.devices, self.blocks = model, devices, blocks

    def _program(self, function: Callable, result: PartitionSpec) -> Callable:
        """`function(where, models)` of one shard, over the devices; how its result lies on them."""

        def shard(frozen, data, models, layout, plan):
            keys = jnp.broadcast_to(jax.random.key(0), plan.clients.shape)  # of no use without dropout
            return function(Where(frozen, data, layout, plan, 0, jnp.int32(0), keys), models)

        spread = self.devices.over(shard, (SHARED, SHARED, CLIENTS, CLIENTS, ROWS))
        return jax.jit(spread, out_shardings=self.devices.sharding(result))

    def _mean(self, value: Callable) -> Callable:
        """Program of the mean over a minibatch of `value(row, *parts)` [s] per client and task, [P, O]."""

        def total(where: Where, models):
            def one(row: Row, entry, table):
                return row.total(value(row, *map(row.take, models)))

            def add(sums, found, entry, table, task_of):
                return sums.at[entry.client, task_of[entry.stream]].add(found)

            start = no_losses(self.objective, where.plan).plain
            return over_rows(self.objective, where, one, add, start, lambda rows: rows.count)

        program = self._program(total, SHARED)
        return lambda *inputs: program(*inputs).reshape(-1, len(self.objective.tasks))

    @functools.cached_property
    def mean_loss(self) -> Callable:
        """Of one model: ℓ_o, float32 [P, O]."""
        return self._mean(
            lambda row, parts: self.objective.sample_loss(row.frozen, parts, row.task, row.batch, row.key)[2]
        )

    @functools.cached_property
    def mean_cosine(self) -> Callable:
        """Of two models: the mean cosine of their mean path vectors, float32 [P, O]."""
        model = self.model

        def cosine(row: Row, *both) -> Array:
            a, b = (model.represent(row.frozen, parts, row.task, row.batch).mean(1) for parts in both)
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return (a * b).sum(-1) * jax.lax.rsqrt(jnp.maximum(jnp.square(a).sum(-1) * jnp.square(b).sum(-1), 1e-30))

        return self._mean(cosine)

    @functools.cached_property
    def gradient(self) -> Callable:
        """Of Σ_o λ_o ℓ_o at the models' parameters, [D, G, n]."""
        return self._program(lambda where, params: gradient(self.objective, where, params)[0], CLIENTS)

    @functools.cached_property
    def inner(self) -> Callable:
        """(params, others, flat layout) -> their inner products by client and block, float32 [P, R]."""

        def inner(params, other, layout):
            out = jnp.zeros((len(layout.slot) + 1, self.blocks), jnp.float32)
            for name, matrix in params.items():
                product = (matrix * other[name]).reshape(-1, matrix.shape[-1]).sum(1)
                out = out.at[layout.owner[name], layout.block[name]].add(product)
            return out[:-1]

        return jax.jit(inner, out_shardings=self.devices.sharding(SHARED))
