"""A cohort's objective and its gradient, row by row.

One gradient of the cohort is, for every task group and every shape of its rows, a loop over rows whose number is data
and not part of a shape. Rows that are not there cost nothing, and one program serves any cohort, mix of tasks and data
size. Each turn takes the blocks of one client out of the packed parameters, differentiates the row's loss, and adds the
gradient back.

Letters: K cohort positions, O tasks, G slots of a shape class, τ steps, S samples of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.blocks import Blocks, Partition, Tree
from tap_jax.data.device_data import cut
from tap_jax.data.packing import RowShape
from tap_jax.data.sampling import Plan, Table
from tap_jax.data.task_groups import TaskGroup
from tap_jax.engine.packed import Layout, Packed, flatten, unflatten
from tap_jax.methods.base import LocalRule, Outputs, Row, StepLosses
from tap_jax.tasks import Stream, Task

ROWS_PER_STEP = 4096  # bound on a client's rows of one task in a step; keeps dropout keys apart
# (frozen, parts, task, batch, key) -> (outputs, latents, loss [S] of the task)
SampleLoss = Callable[..., tuple[Outputs, Array, Array]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a group's forward pass: blocks of one shape class, which of them by stream.

    Attributes:
      shape_class: of the blocks.
      blocks: int [streams] (one block) or [streams, P] (one per path), numbers of blocks.
      like: shapes of one block.
    """

    shape_class: str
    blocks: np.ndarray
    like: Tree


def part_table(
    group: TaskGroup, roles: Callable[[Stream], Mapping[str, Any]], partition: Partition, like: Blocks
) -> dict[str, Part]:
    """What a group's forward pass is made of, from the model's `roles`; `like` holds every block's shapes."""
    number = {name: r for r, name in enumerate(partition.names)}
    by_stream = [roles(stream) for stream in group.streams]
    table = {}
    for part, example in by_stream[0].items():
        blocks = np.vectorize(number.__getitem__)(np.array([found[part] for found in by_stream]))
        first = example if isinstance(example, str) else example[0]
        table[part] = Part(partition.shape_classes[number[first]], blocks, like[first])
    return table


def slots_of(layout: Layout, table: Mapping[str, Part], client: Array, stream: Array) -> dict[str, Array]:
    """Where the parts of one row's forward pass sit: part -> slots [] or [P]."""
    mine = layout.slot[client]
    return {name: mine[jnp.asarray(part.blocks)[stream]] for name, part in table.items()}


def take_parts(
    params: Packed, layout: Layout, table: Mapping[str, Part], client: Array, stream: Array
) -> dict[str, Tree]:
    """The parts of one row's forward pass out of packed parameters: part -> tree, leaves [...] or [P, ...]."""
    slots = slots_of(layout, table, client, stream)
    return {
        name: unflatten(params[part.shape_class].at[slots[name]].get(mode="promise_in_bounds"), part.like)
        for name, part in table.items()
    }


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a cohort's clients minimise, minibatch by minibatch.

    Attributes:
      sample_loss: see `SampleLoss`.
      tasks: the federation's tasks, O of them.
      task_groups: of them. tables: task group -> what `part_table` gives.
      shapes: task group -> shapes of its rows, largest first.
      rule: its `extra_loss` and `statistics` are read here.
      sum_axis: axis of the mesh whose devices share out the rows; None where one has them all.
      generator: JAX's name of the generator that dropout masks are drawn from: "threefry2x32" or "rbg".
    """

    sample_loss: SampleLoss
    tasks: Sequence[Task]
    task_groups: Sequence[TaskGroup]
    tables: Mapping[str, Mapping[str, Part]]
    shapes: Mapping[str, Sequence[RowShape]]
    rule: LocalRule
    sum_axis: str | None
    generator: str


class Where(NamedTuple):
    """A minibatch of a cohort: of which plan, its number in which step, and all positions' keys [K].

    A row's dropout key is folded from its client's by client, step, group and row (and minibatch, where a step takes
    several), so it does not depend on who else is in the cohort.
    """

    frozen: Tree
    data: Mapping
    layout: Layout
    plan: Plan
    minibatch: Array | int
    step: Array
    key: Array


def gradient(
    objective: Objective, where: Where, params: Packed, auxiliary: Any = None
) -> tuple[dict[str, Array], StepLosses]:
    """Gradient of Σ_o λ_o ℓ_o (+ the rule's extra loss) of every client, and its losses [K, O].

    Args:
      params: shape class -> [G, n]; the gradient has the same shapes.
      auxiliary: for the extra loss.
    """

    def one(row: Row, entry: Table, table):
        def loss_of(parts):
            outputs, latents, losses = objective.sample_loss(where.frozen, parts, row.task, row.batch, row.key)
            loss = row.total(losses)
            total = entry.share * loss
            if objective.rule.extra_loss is not None:
                total += objective.rule.extra_loss(row, outputs, latents, auxiliary)
            return total, loss

        (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(row.take(params))
        slots = slots_of(where.layout, table, entry.client, entry.stream)
        return loss, {name: flatten(grads[name], slots[name].ndim) for name in grads}, slots

    def add(carry, found, entry: Table, table, task_of):
        (grads, losses), (loss, row_grads, slots) = carry, found
        for name, part in table.items():
            row_grad = row_grads[name]
            grads = grads | {
                part.shape_class: grads[part.shape_class].at[slots[name]].add(row_grad, mode="promise_in_bounds")
            }
        at = (entry.client, task_of[entry.stream])
        return grads, StepLosses(
            losses.plain.at[at].add(loss),
            losses.weighted.at[at].add(entry.share * loss),
            losses.share.at[at].add(entry.share * entry.weights.sum()),  # the weights of all its rows add up to 1
        )

    carry = (jax.tree.map(jnp.zeros_like, dict(params)), no_losses(objective, where.plan))
    return over_rows(objective, where, one, add, carry, lambda rows: rows.count)


def statistics(objective: Objective, where: Where, params: Packed) -> dict[str, Any]:
    """Sums of the rule's `statistics` over the minibatches of the clients that need them: name -> leaves [K, ...]."""
    clients = where.plan.active.shape[1]

    def one(row: Row, entry: Table, table):
        _, latents, _ = objective.sample_loss(where.frozen, row.take(params), row.task, row.batch, row.key)
        return objective.rule.statistics(row, latents)

    def add(sums, found, entry: Table, table, task_of):
        added = {name: jax.tree.map(lambda x, y: x.at[entry.client].add(y), sums[name], found[name]) for name in found}
        return sums | added

    shapes = over_rows(objective, where, one, lambda sums, found, *_: sums | found, {}, None)
    sums = jax.tree.map(lambda leaf: jnp.zeros((clients, *leaf.shape), leaf.dtype), shapes)
    return over_rows(objective, where, one, add, sums, lambda rows: rows.with_statistics)


def _key_of(generator: str, key: Array) -> Array:
    """A Threefry key as a key of the generator, in the way in which JAX starts "rbg" from one."""
    data = jax.random.key_data(key)
    return key if generator == "threefry2x32" else jax.random.wrap_key_data(jnp.tile(data, 2), impl=generator)


def no_losses(objective: Objective, plan: Plan) -> StepLosses:
    """Zeros [K, O]."""
    return StepLosses(*(jnp.zeros((plan.active.shape[1], len(objective.tasks)), jnp.float32) for _ in range(3)))


def over_rows(
    objective: Objective, where: Where, one: Callable, add: Callable, carry: Any, count: Callable | None
) -> Any:
    """Sums over the rows of every task group: folds `add`, starting from the zeros in `carry`.

    Args:
      one: (row, its entry in the table, the group's parts) -> what is found of it.
      add: (carry, what is found, entry, the group's parts, stream -> number of the task) -> carry.
      count: rows of one shape -> how many of them to visit, [minibatches_per_step, τ]; None: only shapes are wanted, of
        what `one` finds.
    """
    plan, layout = where.plan, where.layout
    key = where.key
    if not isinstance(where.minibatch, int):
        key = jax.vmap(jax.random.fold_in, (0, None))(key, where.minibatch)
    for number, group in enumerate(objective.task_groups):
        table = objective.tables[group.name]
        task_of = jnp.array([objective.tasks.index(stream.task) for stream in group.streams])
        for rows, shape in zip(plan.rows[group.name], objective.shapes[group.name], strict=True):

            def visit(entry: Table, group=group, table=table, number=number, shape=shape):
                row_key = jax.random.fold_in(key[entry.client], plan.clients[entry.client])
                place = where.step * len(objective.task_groups) + number
                row = Row(
                    frozen=where.frozen,
                    task=group.tasks[0],
                    batch=cut(where.data[group.name], entry.ids, shape, entry.text_at, entry.answer_at),
                    weights=entry.weights,
                    client=entry.client,
                    take=lambda params: take_parts(params, layout, table, entry.client, entry.stream),
                    key=_key_of(objective.generator, jax.random.fold_in(row_key, place * ROWS_PER_STEP + entry.number)),
                )
                return one(row, entry, table)

            def turn(index, carry, rows=rows, table=table, task_of=task_of, visit=visit):
                entry = jax.tree.map(lambda leaf: leaf[where.minibatch, where.step, index], rows.table)
                return add(carry, visit(entry), entry, table, task_of)

            if count is None:
                entry = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[3:], leaf.dtype), rows.table)
                carry = add(carry, jax.eval_shape(visit, entry))
            else:
                carry = jax.lax.fori_loop(0, count(rows)[where.minibatch, where.step], turn, carry)
    if count is not None and objective.sum_axis:
        carry = jax.lax.psum(carry, objective.sum_axis)
    return carry
