"""Local training of a whole cohort as one compiled program (design: rows with dynamic trip counts).

One step of the cohort = for every stream a loop over chunks of v rows whose number is data, not shape: a stream
nobody has costs nothing, and any cohort, batch mix or data size runs the same program. Each chunk takes its rows'
blocks out of the stack, differentiates v rows side by side (the frozen weights shared, so their products stay
single large ones) and adds the gradients back; then one AdamW update of the stack.

Letters: K cohort positions, O tasks, S_r slots of block r, τ steps, v rows of a chunk, s samples of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from tap_jax.data.sampling import Plan, Rows
from tap_jax.data.store import cut
from tap_jax.federation import Stream

Tree = Any
# (frozen, blocks, teacher blocks or None, stream, batch, key) -> (loss [B] of the task, extra loss [B] or None)
SampleLoss = Callable[..., tuple[Array, Array | None]]

for _record in (Plan, Rows):
    jax.tree_util.register_dataclass(
        _record, data_fields=[f.name for f in dataclasses.fields(_record)], meta_fields=[]
    )


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


class Seats(struct.PyTreeNode):
    """Where a shard's clients sit in its stack, as device data.

    Attributes:
      index: block -> int32 [K], slot of the client at each position (0 where it does not own the block).
      holder: block -> int32 [S_r], position that sits in each slot, K where idle.
    """

    index: Mapping[str, Array]
    holder: Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Static choices of the program.

    Attributes:
      rows_per_chunk: v, rows differentiated side by side.
      clip_norm: bound on a client's global gradient norm; 0 for none.
      weight_decay: AdamW's decoupled weight decay.
    """

    rows_per_chunk: int = 1
    clip_norm: float = 1.0
    weight_decay: float = 0.01


def local_training(
    sample_loss: SampleLoss,
    streams: Sequence[Stream],
    tasks: Sequence[str],
    blocks_of: Callable[[Stream], Sequence[str]],
    settings: TrainingSettings,
):
    """Builds `train(frozen, data, stack, teacher, seats, plan, rate, key) -> (stack, Losses)`.

    The returned function is pure and compiles once per capacity of the plan:
      frozen: Ŵ. data: task -> fields, whole training sets. stack: block -> tree [S_r, ...]; a slot is updated only
      in the steps in which its client is active, an idle slot never. teacher: a stack of the same seats or None.
      rate: learning rate, float32. key: of (seed, round, purpose); dropout keys are folded from it by client, step,
      stream and row, so they do not depend on who else is in the cohort.
    """
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay))
    v = settings.rows_per_chunk

    def row_loss(blocks, teacher, frozen, stream, batch, weights, share, key):
        loss, extra = sample_loss(frozen, blocks, teacher, stream, batch, key)
        task = jnp.where(weights > 0, weights * loss, 0).sum()
        objective = share * task
        if extra is not None:
            objective += jnp.where(weights > 0, weights * extra, 0).sum()
        return objective, task

    def gradient(frozen, data, stack, teacher, seats: Seats, plan: Plan, step, key):
        """Gradient of the whole cohort's objectives at one step, and ℓ, λℓ, λ per client and task."""
        clients = plan.active.shape[1]
        table = jnp.zeros((clients, len(tasks)), jnp.float32)
        carry = (jax.tree.map(jnp.zeros_like, stack), table, table, table)
        for number, stream in enumerate(streams):
            rows: Rows = plan.rows[stream.name]
            names = blocks_of(stream)
            task = tasks.index(stream.task.name)
            count = rows.count[step]

            def chunk(index, carry, rows=rows, names=names, task=task, stream=stream, number=number):
                grads, plain, weighted, share_sum = carry
                start = index * v
                part = jax.tree.map(
                    lambda leaf: jax.lax.dynamic_slice_in_dim(leaf[step], start, v),
                    (rows.client, rows.ids, rows.weights, rows.share, rows.part),
                )
                client, ids, weights, share, piece = part
                seat = {name: seats.index[name][client] for name in names}

                def at(stack):
                    return {name: jax.tree.map(lambda leaf, s=seat[name]: leaf[s], stack[name]) for name in names}

                def key_of(client, piece):
                    row_key = jax.random.fold_in(key, plan.clients[client])
                    tag = (step * len(streams) + number) * 4096 + piece  # a client has far fewer rows in a step
                    return jax.random.fold_in(row_key, tag)

                def one(blocks, teacher, ids, weights, share, client, piece):
                    batch = cut(data[stream.task.name], ids)
                    grad = jax.value_and_grad(row_loss, has_aux=True)
                    (_, loss), grads = grad(
                        blocks, teacher, frozen, stream, batch, weights, share, key_of(client, piece)
                    )
                    return loss, grads

                args = (at(stack), None if teacher is None else at(teacher), ids, weights, share, client, piece)
                if v == 1:
                    loss, row_grads = one(*jax.tree.map(lambda leaf: leaf[0], args))
                    loss, row_grads = jax.tree.map(lambda leaf: leaf[None], (loss, row_grads))
                else:
                    loss, row_grads = jax.vmap(one, in_axes=(0, None if teacher is None else 0, 0, 0, 0, 0, 0))(*args)
                grads = grads | {
                    name: jax.tree.map(lambda acc, g, s=seat[name]: acc.at[s].add(g), grads[name], row_grads[name])
                    for name in names
                }
                plain = plain.at[client, task].add(loss)
                weighted = weighted.at[client, task].add(share * loss)
                share_sum = share_sum.at[client, task].add(share)
                return grads, plain, weighted, share_sum

            carry = jax.lax.fori_loop(0, -(-count // v), chunk, carry)
        return carry

    def train(frozen, data, stack, teacher, seats: Seats, plan: Plan, rate, key):
        clients = plan.active.shape[1]
        zeros = jnp.zeros((clients, len(tasks)), jnp.float32)
        losses = Losses(zeros, zeros, zeros.astype(jnp.int32))

        def step(index, carry):
            stack, state, losses = carry
            grads, plain, weighted, share = gradient(frozen, data, stack, teacher, seats, plan, index, key)
            if settings.clip_norm:
                grads = clip_per_client(grads, seats.holder, clients, settings.clip_norm)
            updates, state = optimizer.update(grads, state, stack)
            stack = {
                name: _where_active(stack[name], updates[name], rate, _held(plan.active[index], seats.holder[name]))
                for name in stack
            }
            losses = Losses(
                losses.plain + plain, losses.weighted + weighted, losses.steps + (share > 0).astype(jnp.int32)
            )
            return stack, state, losses

        stack, _, losses = jax.lax.fori_loop(0, plan.steps, step, (stack, optimizer.init(stack), losses))
        return stack, losses

    return train


def _held(active: Array, holder: Array) -> Array:
    """bool [S_r] from bool [K]: the slot's client is active; idle slots (holder K) are not."""
    return jnp.append(active, False)[holder]


def _where_active(tree: Tree, updates: Tree, rate: Array, active: Array) -> Tree:
    def move(value, update):
        flag = active.reshape(-1, *(1,) * (value.ndim - 1))
        return jnp.where(flag, value - rate * update, value)

    return jax.tree.map(move, tree, updates)


def clip_per_client(grads: Mapping[str, Tree], holder: Mapping[str, Array], clients: int, bound: float):
    """Scales each client's gradient, over all its blocks, to a global norm of at most `bound`."""
    squares = jnp.zeros(clients + 1, jnp.float32)
    for name, tree in grads.items():
        per_slot = sum(jnp.square(leaf).sum(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(tree))
        squares = squares.at[holder[name]].add(per_slot)
    norm = jnp.sqrt(squares)
    factor = jnp.where(norm > bound, bound / norm, 1.0).at[clients].set(0.0)
    return {
        name: jax.tree.map(lambda leaf, f=factor[holder[name]]: leaf * f.reshape(-1, *(1,) * (leaf.ndim - 1)), tree)
        for name, tree in grads.items()
    }
