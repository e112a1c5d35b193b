"""Local training of a whole cohort as one compiled program: a loop over steps, each as the method's rule says.

Letters: K cohort positions, O tasks, G slots of a shape class, n parameters of a block.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from tap_jax.data.sampling import Plan
from tap_jax.engine.objective import Objective, Where, gradient, no_losses, statistics
from tap_jax.engine.packed import Layout, Packed
from tap_jax.methods.base import StepLosses


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
      clip_norm: bound on a client's global gradient norm; 0 for none.
      weight_decay: AdamW's decoupled weight decay.
    """

    clip_norm: float
    weight_decay: float


def local_training(
    objective: Objective, settings: TrainingSettings
) -> Callable[..., tuple[dict[str, Array], dict[str, Array] | None, Losses]]:
    """Builds `train(frozen, data, params, moments, teacher, layout, plan, rate, key) -> (params, moments, Losses)`.

    The returned function is pure and compiles once per capacity of the plan:
      frozen: Ŵ. data: task group -> fields, whole training sets. params: shape class -> [G, n]; a slot is updated only
      in the steps in which its client is active, a free slot never. moments: AdamW's state by slot, shape class ->
      [G, 1 + 2n] (`remembered_update`), or None to start afresh and give none back. teacher: what the rule's steps are
      given. rate: learning rate of every position, float32 [K]. key: of (seed, round, phase) of every position, [K].
    """
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay))
    rule = objective.rule

    def train(frozen, data, params, moments, teacher, layout: Layout, plan: Plan, rate, key):
        remember = moments is not None
        zeros = jnp.zeros((plan.active.shape[1], len(objective.tasks)), jnp.float32)
        losses = Losses(zeros, zeros, zeros.astype(jnp.int32))

        def step(index, carry):
            params, opt_state, losses = carry
            active = jnp.append(plan.active[index], False)
            surroundings = frozen, data, layout, plan
            tools = Tools(objective, settings, optimizer, remember, surroundings, index, key, rate, active)
            params, opt_state, found = rule.step(tools, params, opt_state, teacher)
            losses = Losses(
                losses.plain + found.plain,
                losses.weighted + found.weighted,
                losses.steps + (found.share > 0).astype(jnp.int32),
            )
            return params, opt_state, losses

        opt_state = dict(moments) if remember else {name: optimizer.init(leaf) for name, leaf in params.items()}
        params, opt_state, losses = jax.lax.fori_loop(plan.first, plan.steps, step, (dict(params), opt_state, losses))
        broken = broken_clients(params, layout)
        if remember:  # a client that broke starts afresh next time
            opt_state = {g: jnp.where(broken[layout.owner[g]][:, None], 0, leaf) for g, leaf in opt_state.items()}
        return params, opt_state if remember else None, without_broken(losses, broken)

    return train


@dataclasses.dataclass(frozen=True)
class Tools:
    """See `methods.base.Tools`; of one step, inside the compiled program."""

    objective: Objective
    settings: TrainingSettings
    optimizer: optax.GradientTransformation
    remember: bool  # every slot has an optimizer state of its own
    surroundings: tuple  # frozen, data, layout, plan
    step: Array
    key: Array
    rates: Array
    active: Array

    def _where(self, minibatch) -> Where:
        minibatch = 0 if self.objective.rule.minibatches_per_step == 1 else jnp.asarray(minibatch)
        return Where(*self.surroundings, minibatch, self.step, self.key)

    @property
    def rate(self) -> dict[str, Array]:
        """η of every slot, shape class -> [G, 1]; 0 where a slot is idle."""
        _, _, layout, _ = self.surroundings
        padded = jnp.append(self.rates, 0)
        return {name: padded[client][:, None] for name, client in layout.owner.items()}

    @property
    def no_losses(self) -> StepLosses:
        """Zeros [K, O]."""
        return no_losses(self.objective, self.surroundings[-1])

    def gradient(
        self, params: Packed, auxiliary: Any = None, *, minibatch: Any = 0
    ) -> tuple[dict[str, Array], StepLosses]:
        """See `gradient`."""
        return gradient(self.objective, self._where(minibatch), params, auxiliary)

    def statistics(self, params: Packed, *, minibatch: Any = 0) -> dict[str, Any]:
        """See `objective.statistics`."""
        return statistics(self.objective, self._where(minibatch), params)

    def update(self, params: Packed, opt_state: Mapping, gradient: Packed) -> tuple[dict[str, Array], dict[str, Any]]:
        """One clipped AdamW update; of slots whose client is idle in this step, nothing changes."""
        _, _, layout, _ = self.surroundings
        if self.settings.clip_norm:
            gradient = clip_per_client(gradient, layout, self.settings.clip_norm)
        updates, after, rate = {}, {}, self.rate
        for name, matrix in params.items():
            live = self.active[layout.owner[name]][:, None]
            if self.remember:
                update, moments = remembered_update(self.optimizer, gradient[name], opt_state[name], matrix)
                after[name] = jnp.where(live, moments, opt_state[name])
            else:
                update, after[name] = self.optimizer.update(gradient[name], opt_state[name], matrix)
            updates[name] = jnp.where(live, matrix - rate[name] * update, matrix)
        return updates, after


def remembered_update(
    optimizer: optax.GradientTransformation, grads: Array, moments: Array, matrix: Array
) -> tuple[Array, Array]:
    """An AdamW update of a shape class in which every slot has a state of its own.

    Args:
      optimizer: `scale_by_adam` and `add_decayed_weights`.
      grads, matrix: float32 [G, n].
      moments: float32 [G, 1 + 2n]: steps taken, first and second moments.

    Returns:
      (updates, moments).
    """

    def one(grad, moment, row):
        mu, nu = jnp.split(moment[1:], 2)
        state = (optax.ScaleByAdamState(moment[0].astype(jnp.int32), mu, nu), optax.EmptyState())
        update, (state, _) = optimizer.update(grad, state, row)
        return update, jnp.concatenate([state.count[None].astype(jnp.float32), state.mu, state.nu])

    return jax.vmap(one)(grads, moments, matrix)


def broken_clients(params: Packed, layout: Layout) -> Array:
    """bool [K + 1], by position: the client holds a value that is no number."""
    broken = jnp.zeros(layout.slot.shape[0] + 1, bool)
    for name, matrix in params.items():
        broken = broken.at[layout.owner[name]].max(~jnp.isfinite(matrix).all(1))
    return broken


def without_broken(losses: Losses, broken: Array) -> Losses:
    """The losses, NaN for broken clients (`broken_clients`).

    The last step can break blocks without any loss having shown it. What decides by losses (aggregation,
    replacement, results) then sees it as well.
    """
    lost = broken[:-1, None] & losses.seen
    return losses.replace(
        plain=jnp.where(lost, jnp.nan, losses.plain), weighted=jnp.where(lost, jnp.nan, losses.weighted)
    )


def clip_per_client(grads: Packed, layout: Layout, bound: float) -> dict[str, Array]:
    """Scales each client's gradient, over all its blocks, to a global norm of at most `bound`."""
    squares = jnp.zeros(layout.slot.shape[0] + 1, jnp.float32)
    for name, matrix in grads.items():
        squares = squares.at[layout.owner[name]].add(jnp.square(matrix).sum(1))
    norm = jnp.sqrt(squares)
    factor = jnp.where(norm > bound, bound / norm, 1.0)
    return {name: matrix * factor[layout.owner[name]][:, None] for name, matrix in grads.items()}
