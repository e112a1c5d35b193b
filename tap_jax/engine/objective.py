"""A cohort's objective and its gradient, row by row (design: rows with dynamic trip counts).

One gradient of the cohort = for every family of streams a loop over chunks of v rows whose number is data, not shape:
what nobody has costs nothing, and any cohort, batch mix or data size runs the same program. Each chunk takes its rows'
blocks out of the stack, differentiates v rows side by side (the frozen weights shared, so their products stay
single large ones) and adds the gradients back.

Letters: K cohort positions, O tasks, G slots of a group, τ steps, v rows of a chunk, s samples of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.blocks import Blocks, Partition, Seats, Stack, Tree, flatten, unflatten
from tap_jax.data.families import Family
from tap_jax.data.sampling import Plan, Table
from tap_jax.data.store import cut
from tap_jax.federation import Stream, Task
from tap_jax.methods.base import PLAIN, LocalRule, Row, StepLosses

ROWS_PER_STEP = 4096  # bound on a client's rows of one task in a step; keeps dropout keys apart
# (frozen, parts, task, batch, key) -> (outputs, latents, loss [s] of the task)
SampleLoss = Callable[..., tuple[Array, Array, Array]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a family's forward pass: blocks of one group, which of them by variant.

    Attributes:
      group: where the blocks are.
      blocks: int [variants] (one block) or [variants, P] (one per path), numbers of blocks.
      like: shapes of one block.
    """

    group: str
    blocks: np.ndarray
    like: Tree


def part_table(
    family: Family, roles: Callable[[Stream], Mapping[str, Any]], partition: Partition, like: Blocks
) -> dict[str, Part]:
    """What a family's forward pass is made of, from the model's `roles`; `like` holds every block's shapes."""
    number = {name: r for r, name in enumerate(partition.names)}
    by_variant = [roles(stream) for stream in family.streams]
    table = {}
    for part, example in by_variant[0].items():
        blocks = np.vectorize(number.__getitem__)(np.array([found[part] for found in by_variant]))
        first = example if isinstance(example, str) else example[0]
        table[part] = Part(partition.groups[number[first]], blocks, like[first])
    return table


def slots_of(seats: Seats, table: Mapping[str, Part], client: Array, variant: Array) -> dict[str, Array]:
    """Where the parts of one row's forward pass sit: part -> slots [] or [P]."""
    mine = seats.slot[client]
    return {name: mine[jnp.asarray(part.blocks)[variant]] for name, part in table.items()}


def take_parts(stack: Stack, seats: Seats, table: Mapping[str, Part], client: Array, variant: Array) -> dict[str, Tree]:
    """The parts of one row's forward pass out of a stack: part -> tree, leaves [...] or [P, ...]."""
    slots = slots_of(seats, table, client, variant)
    return {
        name: unflatten(stack[part.group].at[slots[name]].get(mode="promise_in_bounds"), part.like)
        for name, part in table.items()
    }


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a cohort's clients minimise, minibatch by minibatch.

    Attributes:
      sample_loss: see `SampleLoss`.
      tasks: the federation's tasks, O of them.
      families: their families. tables: family -> what `part_table` gives.
      rows_per_chunk: v, rows differentiated side by side.
      rule: its `extra_loss` and `measure` are read here.
      sum_axis: axis of the mesh whose devices share out the rows; None where one has them all.
    """

    sample_loss: SampleLoss
    tasks: Sequence[Task]
    families: Sequence[Family]
    tables: Mapping[str, Mapping[str, Part]]
    rows_per_chunk: int = 1
    rule: LocalRule = PLAIN
    sum_axis: str | None = None


class Where(NamedTuple):
    """A minibatch of a cohort: the plan (rows [draws, τ, ...]), which draw and step of it, and all positions' keys [K].

    A row's dropout key is folded from its client's by client, step, family and row (and draw, where a step takes
    several), so it does not depend on who else is in the cohort.
    """

    frozen: Tree
    data: Mapping
    seats: Seats
    plan: Plan
    draw: Array | int
    step: Array
    key: Array


def gradient(objective: Objective, where: Where, stack: Stack, aid: Any = None) -> tuple[dict[str, Array], StepLosses]:
    """Gradient of Σ_o λ_o ℓ_o (+ the rule's extra loss) of every client, and its losses [K, O].

    Args:
      stack: group -> [G, n]; the gradient has the same shapes.
      aid: for the extra loss.
    """

    def one(row: Row, entry: Table, table):
        def loss_of(parts):
            outputs, latents, losses = objective.sample_loss(where.frozen, parts, row.task, row.batch, row.key)
            loss = jnp.where(row.weights > 0, row.weights * losses, 0).sum()
            total = entry.share * loss
            if objective.rule.extra_loss is not None:
                total += objective.rule.extra_loss(row, outputs, latents, aid)
            return total, loss

        (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(row.take(stack))
        slots = slots_of(where.seats, table, entry.client, entry.variant)
        return loss, {name: flatten(grads[name], slots[name].ndim) for name in grads}, slots

    def add(carry, found, rows: Table, real: Array, table, task_of):
        (grads, losses), (loss, row_grads, slots) = carry, found
        for name, part in table.items():
            row_grad = row_grads[name]
            if real.ndim:  # Padding rows run with somebody's blocks; 0 times what is no number would reach their slots.
                row_grad = jnp.where(real.reshape(-1, *(1,) * (row_grad.ndim - 1)), row_grad, 0)
            grads = grads | {part.group: grads[part.group].at[slots[name]].add(row_grad, mode="promise_in_bounds")}
        at = (rows.client, task_of[rows.variant])
        return grads, StepLosses(
            losses.plain.at[at].add(loss),
            losses.weighted.at[at].add(rows.share * loss),
            losses.share.at[at].add(jnp.where(real, rows.share, 0)),
        )

    carry = (jax.tree.map(jnp.zeros_like, dict(stack)), no_losses(objective, where.plan))
    return over_rows(objective, where, one, add, carry, lambda rows: rows.count)


def collect(objective: Objective, where: Where, stack: Stack) -> dict[str, Any]:
    """Sums of the rule's `measure` over the minibatches of leading clients: name -> leaves [K, ...]."""
    clients = where.plan.active.shape[1]

    def one(row: Row, entry: Table, table):
        _, latents, _ = objective.sample_loss(where.frozen, row.take(stack), row.task, row.batch, row.key)
        return objective.rule.measure(row, latents)

    def add(sums, found, rows: Table, real: Array, table, task_of):
        if real.ndim:  # as in `gradient`: what padding rows find is nobody's
            found = jax.tree.map(lambda x: jnp.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), found)
        added = {name: jax.tree.map(lambda x, y: x.at[rows.client].add(y), sums[name], found[name]) for name in found}
        return sums | added

    shapes = over_rows(objective, where, one, lambda sums, found, *_: sums | found, {}, None)
    sums = jax.tree.map(lambda leaf: jnp.zeros((clients, *leaf.shape), leaf.dtype), shapes)
    return over_rows(objective, where, one, add, sums, lambda rows: rows.lead)


def no_losses(objective: Objective, plan: Plan) -> StepLosses:
    """Zeros [K, O]."""
    return StepLosses(*(jnp.zeros((plan.active.shape[1], len(objective.tasks)), jnp.float32) for _ in range(3)))


def over_rows(
    objective: Objective, where: Where, one: Callable, add: Callable, carry: Any, count: Callable | None
) -> Any:
    """Sums over the rows of every family: folds `add`, starting from the zeros in `carry`.

    Without `count` only over the shapes of what `one` finds.
    """
    v, plan, seats = objective.rows_per_chunk, where.plan, where.seats
    key = where.key
    if not isinstance(where.draw, int):
        key = jax.vmap(jax.random.fold_in, (0, None))(key, where.draw)
    for number, family in enumerate(objective.families):
        table, rows = objective.tables[family.name], plan.rows[family.name]
        task_of = jnp.array([objective.tasks.index(stream.task) for stream in family.streams])

        def visit(entry: Table, family=family, table=table, number=number):
            row_key = jax.random.fold_in(key[entry.client], plan.clients[entry.client])
            place = where.step * len(objective.families) + number
            row = Row(
                frozen=where.frozen,
                task=family.tasks[0],
                batch=cut(where.data[family.name], entry.ids),
                weights=entry.weights,
                client=entry.client,
                take=lambda stack: take_parts(stack, seats, table, entry.client, entry.variant),
                key=jax.random.fold_in(row_key, place * ROWS_PER_STEP + entry.part),
            )
            return one(row, entry, table)

        def chunk(index, carry, rows=rows, table=table, task_of=task_of, visit=visit):
            def cut_rows(leaf):
                return jax.lax.dynamic_slice_in_dim(leaf[where.draw, where.step], index * v, v)

            entries = jax.tree.map(cut_rows, rows.table)
            if v == 1:
                entries = jax.tree.map(lambda leaf: leaf[0], entries)
            found = visit(entries) if v == 1 else jax.vmap(visit)(entries)
            return add(carry, found, entries, entries.weights[..., 0] > 0, table, task_of)

        if count is None:
            entry = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[3:], leaf.dtype), rows.table)
            carry = add(carry, jax.eval_shape(visit, entry))
        else:
            carry = jax.lax.fori_loop(0, -(-count(rows)[where.draw, where.step] // v), chunk, carry)
    if count is not None and objective.sum_axis:
        carry = jax.lax.psum(carry, objective.sum_axis)
    return carry
