"""What a replacement criterion may ask of a cohort beyond its training losses; compiled when first asked for.

Letters: D shards, P positions, O tasks, R blocks, s samples of a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.data.sampling import ClientData, Plan, capacities, draw_plan
from tap_jax.engine.objective import Where, gradient, no_losses, over_rows
from tap_jax.engine.packed import Packed
from tap_jax.engine.parallel import CLIENTS, ROWS, SHARED
from tap_jax.errors import UserError
from tap_jax.methods.base import PLAIN, Row
from tap_jax.tasks import Task

if TYPE_CHECKING:
    from tap_jax.engine.cohort import Cohort
    from tap_jax.engine.engine import Engine


class Probes:
    """Of one engine; see `methods.base.Cohort` for what each method returns."""

    def __init__(self, engine: "Engine"):
        self.engine = engine
        # Nobody's rule and no dropout: probes see the tasks' losses alone.
        old = engine.objective

        def loss(frozen, parts, task, batch, key):
            return old.sample_loss(frozen, parts, task, batch, None)

        self.objective = dataclasses.replace(old, sample_loss=loss, rule=PLAIN)

    def held_out_loss(self, cohort: "Cohort", params: Packed) -> Array:
        """[P, O]."""
        return self._mean_loss(*self._inputs(cohort, (params,), cohort.held_out_plan))

    def similarity(self, cohort: "Cohort", params: Packed, other: Packed) -> Array:
        """[P, O]."""
        return self._mean_cosine(*self._inputs(cohort, (params, other), cohort.held_out_plan))

    def task_gradient(self, cohort: "Cohort", params: Packed, task: Task) -> Packed:
        """Parameters [D, G, n]."""
        names = {stream.name for stream in task.streams}
        data = [mine.only(names) for mine in self.engine.data]
        plan = self._plan(cohort, data, "probe", cohort.rounds, self.engine.settings.batch, cohort.shape.rows)
        return self._gradient(*self._inputs(cohort, params, plan))

    def inner(self, cohort: "Cohort", params: Packed, other: Packed) -> Array:
        """[P, R]."""
        return self._inner(params, other, cohort.flat_layout)

    def held_out_plan(self, cohort: "Cohort") -> Plan:
        """All held-out samples as one minibatch, on the devices.

        Raises:
          UserError: nothing is held out.
        """
        held = self.engine.held_out
        if not any(mine.streams for mine in held):
            raise UserError("data.held_out: 0 leaves nothing to look at; hold out a part such as 0.1")
        batch = max(mine.samples for mine in held)
        rows = capacities(
            held,
            self.engine.families,
            self.engine.shapes,
            positions=cohort.positions,
            batch=batch,
            multiple=self.engine.devices.parts,
        )
        return self._plan(cohort, held, "held_out", np.zeros_like(cohort.rounds), batch, rows)

    def _plan(self, cohort, data: Sequence[ClientData], phase, rounds, batch, rows) -> Plan:
        """One minibatch of every client, with the shard axis and the axis of a step's minibatches; on the devices."""
        shards = [
            draw_plan(
                data,
                clients,
                self.engine.families,
                seed=self.engine.settings.seed,
                round_=of,
                phase=phase,
                batch=batch,
                shapes=self.engine.shapes,
                steps=1,
                capacities=rows,
                starts=self.engine.starts,
                epochs=None,
            )
            for clients, of in zip(cohort.table, rounds, strict=True)
        ]
        shards = [plan.replace(rows=jax.tree.map(lambda leaf: leaf[None], plan.rows)) for plan in shards]
        return self.engine.placed(jax.tree.map(lambda *x: np.stack(x), *shards))

    def _inputs(self, cohort, models, plan: Plan) -> tuple:
        engine = self.engine
        return engine.frozen, engine.arrays, models, cohort.layout, plan

    def _program(self, function: Callable, result: jax.sharding.Sharding) -> Callable:
        """`function(where, models)` of one shard, over the devices; where its result is to lie."""

        def shard(frozen, data, models, layout, plan):
            keys = jnp.broadcast_to(jax.random.key(0), plan.clients.shape)  # of no use without dropout
            return function(Where(frozen, data, layout, plan, 0, jnp.int32(0), keys), models)

        spread = self.engine.devices.over(shard, (SHARED, SHARED, CLIENTS, CLIENTS, ROWS))
        return jax.jit(spread, out_shardings=result)

    def _mean(self, value: Callable) -> Callable:
        """Program of the mean over a minibatch of `value(row, *parts)` [s] per client and task, [P, O]."""

        def total(where: Where, models):
            def one(row: Row, entry, table):
                return row.total(value(row, *map(row.take, models)))

            def add(sums, found, entry, table, task_of):
                return sums.at[entry.client, task_of[entry.variant]].add(found)

            start = no_losses(self.objective, where.plan).plain
            return over_rows(self.objective, where, one, add, start, lambda rows: rows.count)

        program = self._program(total, self.engine.shared)
        return lambda *inputs: program(*inputs).reshape(-1, len(self.engine.tasks))

    @functools.cached_property
    def _mean_loss(self) -> Callable:
        return self._mean(
            lambda row, parts: self.objective.sample_loss(row.frozen, parts, row.task, row.batch, row.key)[2]
        )

    @functools.cached_property
    def _mean_cosine(self) -> Callable:
        model = self.engine.model

        def cosine(row: Row, *both) -> Array:
            a, b = (model.represent(row.frozen, parts, row.task, row.batch).mean(1) for parts in both)
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return (a * b).sum(-1) * jax.lax.rsqrt(jnp.maximum(jnp.square(a).sum(-1) * jnp.square(b).sum(-1), 1e-30))

        return self._mean(cosine)

    @functools.cached_property
    def _gradient(self) -> Callable:
        return self._program(lambda where, params: gradient(self.objective, where, params)[0], self.engine.by_client)

    @functools.cached_property
    def _inner(self) -> Callable:
        names = len(self.engine.partition.names)

        def inner(params, other, layout):
            out = jnp.zeros((len(layout.slot) + 1, names), jnp.float32)
            for group, matrix in params.items():
                product = (matrix * other[group]).reshape(-1, matrix.shape[-1]).sum(1)
                out = out.at[layout.owner[group], layout.block[group]].add(product)
            return out[:-1]

        return jax.jit(inner, out_shardings=self.engine.shared)
