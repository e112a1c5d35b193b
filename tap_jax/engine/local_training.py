"""Local training of a whole cohort as one compiled program (design: rows with dynamic trip counts).

One step of the cohort = for every family of streams a loop over chunks of v rows whose number is data, not shape:
what nobody has costs nothing, and any cohort, batch mix or data size runs the same program. Each chunk takes its rows'
blocks out of the stack, differentiates v rows side by side (the frozen weights shared, so their products stay
single large ones) and adds the gradients back; then one AdamW update of the stack.

Letters: K cohort positions, O tasks, G slots of a group, τ steps, v rows of a chunk, s samples of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from tap_jax.blocks import Blocks, Partition, Seats, Stack, Tree, flatten, unflatten
from tap_jax.data.families import Family
from tap_jax.data.sampling import Plan, Table
from tap_jax.data.store import cut
from tap_jax.federation import Stream, Task

ROWS_PER_STEP = 4096  # bound on a client's rows of one task in a step; keeps dropout keys apart
# (frozen, parts, task, batch, key) -> (outputs, loss [B] of the task)
SampleLoss = Callable[..., tuple[Array, Array]]
# (frozen, teacher's parts, outputs, task, batch) -> weighted distillation loss [B]
DistillationLoss = Callable[..., Array]


class Losses(struct.PyTreeNode):
    """Training losses of a phase, sums over steps.

    Attributes:
      plain: float32 [K, O], Σ over steps of ℓ_o on the minibatch.
      weighted: float32 [K, O], Σ of λ_o ℓ_o.
      steps: int32 [K, O], steps in which the task was in the minibatch.
    """

    plain: Array
    weighted: Array
    steps: Array

    def mean(self, history: str = "plain") -> Array:
        """Mean over the steps in which the task was seen, [K, O]; 0 where it never was."""
        total = self.plain if history == "plain" else self.weighted
        return total / jnp.maximum(self.steps, 1)

    @property
    def seen(self) -> Array:
        """bool [K, O]: O^seen of Algorithm 1."""
        return self.steps > 0


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Static choices of the program.

    Attributes:
      rows_per_chunk: v, rows differentiated side by side.
      clip_norm: bound on a client's global gradient norm; 0 for none.
      weight_decay: AdamW's decoupled weight decay.
      persist: go on with a client's optimizer state instead of starting every local training afresh.
    """

    rows_per_chunk: int = 1
    clip_norm: float = 1.0
    weight_decay: float = 0.01
    persist: bool = False


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


def take_parts(stack: Stack, seats: Seats, table: Mapping[str, Part], client: Array, variant: Array):
    """The parts of one row's forward pass out of a stack, and where they sit.

    Returns:
      (part -> tree, leaves [...] or [P, ...]; part -> slots [] or [P]).
    """
    mine = seats.slot[client]
    slots = {name: mine[jnp.asarray(part.blocks)[variant]] for name, part in table.items()}
    parts = {
        name: unflatten(stack[part.group].at[slots[name]].get(mode="promise_in_bounds"), part.like)
        for name, part in table.items()
    }
    return parts, slots


def local_training(
    sample_loss: SampleLoss,
    tasks: Sequence[Task],
    families: Sequence[Family],
    tables: Mapping[str, Mapping[str, Part]],
    settings: TrainingSettings,
    distillation_loss: DistillationLoss | None = None,
):
    """Builds `train(frozen, data, stack, moments, teacher, seats, plan, rate, key) -> (stack, moments, Losses)`.

    The returned function is pure and compiles once per capacity of the plan:
      frozen: Ŵ. data: family -> fields, whole training sets. stack: group -> [G, n]; a slot is updated only in the
      steps in which its client is active, an idle slot never. moments: AdamW's state by slot, group -> [G, 1 + 2n]
      (`remembered_update`), or None to start afresh and forget it. teacher: (bool, a stack of the same seats): where
      true, the loss is that of equation 6; None if there is no distillation loss. rate: learning rate, float32.
      key: of (seed, round, purpose); dropout keys are folded from it by client, step, family and row, so they do not
      depend on who else is in the cohort.

    Args:
      sample_loss: task losses, see `SampleLoss`.
      tasks: the federation's tasks, O of them.
      families: their families.
      tables: family -> what `part_table` gives.
      distillation_loss: the second term of equation 6.
    """
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay))
    v = settings.rows_per_chunk

    def gradient(frozen, data, stack, teacher, seats: Seats, plan: Plan, step, key):
        """Gradient of the whole cohort's objectives at one step, and ℓ, λℓ, λ per client and task."""
        empty = jnp.zeros((plan.active.shape[1], len(tasks)), jnp.float32)
        carry = (jax.tree.map(jnp.zeros_like, stack), empty, empty, empty)
        for number, family in enumerate(families):
            table, task = tables[family.name], family.tasks[0]
            task_of = jnp.array([tasks.index(stream.task) for stream in family.streams])

            def one(row: Table, family=family, table=table, task=task, number=number):
                parts, slots = take_parts(stack, seats, table, row.client, row.variant)
                batch = cut(data[family.name], row.ids)
                row_key = jax.random.fold_in(key, plan.clients[row.client])
                row_key = jax.random.fold_in(row_key, (step * len(families) + number) * ROWS_PER_STEP + row.part)

                def weighted(losses):
                    return jnp.where(row.weights > 0, row.weights * losses, 0).sum()

                def objective(parts):
                    outputs, losses = sample_loss(frozen, parts, task, batch, row_key)
                    loss = weighted(losses)
                    total = row.share * loss
                    if teacher is not None:
                        distils, taught = teacher

                        def divergence(outputs):
                            guide, _ = take_parts(taught, seats, table, row.client, row.variant)
                            return weighted(distillation_loss(frozen, guide, outputs, task, batch))

                        total += jax.lax.cond(distils, divergence, lambda _: jnp.zeros(()), outputs)
                    return total, loss

                (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(parts)
                return loss, {name: flatten(grads[name], slots[name].ndim) for name in grads}, slots

            def chunk(index, carry, family=family, table=table, task_of=task_of, one=one):
                grads, plain, weighted, share = carry
                cut_rows = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf[step], index * v, v)  # noqa: E731
                rows = jax.tree.map(cut_rows, plan.rows[family.name].table)
                if v == 1:
                    loss, row_grads, slots = one(jax.tree.map(lambda leaf: leaf[0], rows))
                else:
                    loss, row_grads, slots = jax.vmap(one)(rows)
                    # Padding rows run with somebody's blocks; 0 times what is no number would reach others' slots.
                    real = rows.weights[:, 0] > 0
                    row_grads = {
                        name: jnp.where(real.reshape(-1, *(1,) * (grad.ndim - 1)), grad, 0)
                        for name, grad in row_grads.items()
                    }
                for name, part in table.items():
                    total = grads[part.group].at[slots[name]].add(row_grads[name], mode="promise_in_bounds")
                    grads = grads | {part.group: total}
                at = (rows.client, task_of[rows.variant])
                return (
                    grads,
                    plain.at[at].add(loss),
                    weighted.at[at].add(rows.share * loss),
                    share.at[at].add(jnp.where(rows.weights[:, 0] > 0, rows.share, 0)),
                )

            carry = jax.lax.fori_loop(0, -(-plan.rows[family.name].count[step] // v), chunk, carry)
        return carry

    def train(frozen, data, stack, moments, teacher, seats: Seats, plan: Plan, rate, key):
        zeros = jnp.zeros((plan.active.shape[1], len(tasks)), jnp.float32)
        losses = Losses(zeros, zeros, zeros.astype(jnp.int32))

        def step(index, carry):
            stack, state, losses = carry
            grads, plain, weighted, share = gradient(frozen, data, stack, teacher, seats, plan, index, key)
            if settings.clip_norm:
                grads = clip_per_client(grads, seats, settings.clip_norm)
            active = jnp.append(plan.active[index], False)
            if settings.persist:
                updates, state = remembered_update(optimizer, grads, state, stack, active, seats)
            else:
                updates, state = optimizer.update(grads, state, stack)
            stack = {
                group: jnp.where(active[seats.client[group]][:, None], matrix - rate * updates[group], matrix)
                for group, matrix in stack.items()
            }
            losses = Losses(
                losses.plain + plain, losses.weighted + weighted, losses.steps + (share > 0).astype(jnp.int32)
            )
            return stack, state, losses

        state = moments if settings.persist else optimizer.init(stack)
        stack, state, losses = jax.lax.fori_loop(0, plan.steps, step, (stack, state, losses))
        broken = broken_clients(stack, seats)
        if settings.persist:  # whoever is broken starts afresh next time
            state = {g: jnp.where(broken[seats.client[g]][:, None], 0, moment) for g, moment in state.items()}
        return stack, state if settings.persist else None, without_broken(losses, broken)

    return train


def remembered_update(
    optimizer: optax.GradientTransformation, grads: Stack, moments: Stack, stack: Stack, active: Array, seats: Seats
) -> tuple[Stack, Stack]:
    """An AdamW update in which every slot has a state of its own, unchanged where its client is idle.

    Args:
      optimizer: `scale_by_adam` and `add_decayed_weights`.
      moments: group -> float32 [G, 1 + 2n]: steps taken, first and second moments.
      active: bool [K + 1], by position.

    Returns:
      (updates, moments).
    """

    def one(grad, moment, row):
        mu, nu = jnp.split(moment[1:], 2)
        state = (optax.ScaleByAdamState(moment[0].astype(jnp.int32), mu, nu), optax.EmptyState())
        update, (state, _) = optimizer.update(grad, state, row)
        return update, jnp.concatenate([state.count[None].astype(jnp.float32), state.mu, state.nu])

    updates, after = {}, {}
    for group, matrix in stack.items():
        updates[group], new = jax.vmap(one)(grads[group], moments[group], matrix)
        after[group] = jnp.where(active[seats.client[group]][:, None], new, moments[group])
    return updates, after


def broken_clients(stack: Stack, seats: Seats) -> Array:
    """bool [K + 1], by position: the client holds a value that is no number."""
    broken = jnp.zeros(seats.slot.shape[0] + 1, bool)
    for group, matrix in stack.items():
        broken = broken.at[seats.client[group]].max(~jnp.isfinite(matrix).all(1))
    return broken


def without_broken(losses: Losses, broken: Array) -> Losses:
    """The losses, NaN for broken clients (`broken_clients`).

    The last step can break blocks without any loss having shown it. Whoever decides by losses (aggregation,
    replacement, results) then sees it as well.
    """
    lost = broken[:-1, None] & losses.seen
    return losses.replace(
        plain=jnp.where(lost, jnp.nan, losses.plain), weighted=jnp.where(lost, jnp.nan, losses.weighted)
    )


def clip_per_client(grads: Stack, seats: Seats, bound: float) -> dict[str, Array]:
    """Scales each client's gradient, over all its blocks, to a global norm of at most `bound`."""
    squares = jnp.zeros(seats.slot.shape[0] + 1, jnp.float32)
    for group, matrix in grads.items():
        squares = squares.at[seats.client[group]].add(jnp.square(matrix).sum(1))
    norm = jnp.sqrt(squares)
    factor = jnp.where(norm > bound, bound / norm, 1.0)
    return {group: matrix * factor[seats.client[group]][:, None] for group, matrix in grads.items()}
