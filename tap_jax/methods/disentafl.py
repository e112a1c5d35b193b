"""DisentAFL (Chen & Zhang, 2024): component-wise FedAvg with a loss that keeps modality-task groups orthogonal.

for t = 0..T-1: sample C_t; each client, τ times:
    z_n = token-mean of the MoTE stage's output on the modality-task path, of every sample n and modality
    for each pair g < g' of (modality, kind) groups in the minibatch:
        s(g, g') = mean over n in g, n' in g' of cos²(z_n, z_n')
    w = AdamW(w, ∇ [Σ_o λ_o ℓ_o + weight · mean over pairs of s(g, g')])
  the server averages per block
afterwards (+ post, + 2p): each client goes on so, for P or 2P iterations

A minibatch is not in one place here: it is cut into rows of one task each. That costs no exactness, since
    s(g, g') = ⟨M_g, M_g'⟩  with  M_g = mean over n in g of ẑ_n ẑ_nᵀ,  ẑ = z / |z|
is linear in each M: a first pass collects every client's M, and in the second each row's term Σ_n ẑ_nᵀ C_g ẑ_n / N_g,
with C_g = Σ over g' ≠ g of M_g' as a constant, has the gradient of the whole.

Letters: G groups, D width, P clients, s samples of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from tap_jax.blocks import Params
from tap_jax.methods.base import LocalRule, Method, MethodContext, OptState, Outputs, Row, Stepped, Tools
from tap_jax.methods.fedavg import fedavg
from tap_jax.registry import Settings
from tap_jax.tasks import Task


def groups_of(task: Task) -> tuple[str, ...]:
    """The (modality, kind) group of each of the task's modalities."""
    return tuple(f"{modality}/{task.kind}" for modality in task.modalities)


def has_counterparts(tasks: Sequence[Task]) -> bool:
    """Whether a client with these tasks can have a pair of groups."""
    return len({group for task in tasks for group in groups_of(task)}) > 1


def directions(latents: Array) -> Array:
    """ẑ: vectors [..., D] of length 1; a vector of zeros stays one."""
    square = jnp.square(latents).sum(-1, keepdims=True)
    return latents * jnp.where(square > 0, jnp.where(square > 0, square, 1.0) ** -0.5, 0.0)


def second_moments(row: Row, latents: Array) -> dict[str, tuple[Array, Array]]:
    """Group -> (Σ ẑẑᵀ [D, D], N) over a row's samples; `latents` [modalities, s, D]."""
    real = (row.weights > 0).astype(jnp.float32)
    z = directions(latents)
    return {g: (jnp.einsum("s,sd,se->de", real, z[m], z[m]), real.sum()) for m, g in enumerate(groups_of(row.task))}


def counterparts(sums: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
    """Group -> C_g / (N_g · number of pairs), [P, D, D]: what each sample of the group is to be orthogonal to.

    Args:
      sums: group -> (Σ ẑẑᵀ [P, D, D], N [P]) over each client's minibatch.
    """
    present = {g: n > 0 for g, (_, n) in sums.items()}
    count = sum(there.astype(jnp.float32) for there in present.values())
    pairs = jnp.maximum(count * (count - 1) / 2, 1)
    mean = {g: total / jnp.maximum(n, 1)[:, None, None] for g, (total, n) in sums.items()}
    everything = sum(mean.values())
    scale = {g: 1 / (jnp.maximum(n, 1) * pairs) for g, (_, n) in sums.items()}
    return {g: (everything - mean[g]) * scale[g][:, None, None] for g in sums}


def disentanglement(row: Row, latents: Array, others: Mapping[str, Array]) -> Array:
    """A row's Σ_n ẑ_nᵀ C_g ẑ_n / (N_g · pairs), summed over its modalities; a scalar.

    Its gradient, with `others` constant, summed over a minibatch's rows is that of the mean over pairs of s(g, g'); its
    value, so summed, is twice that mean.
    """
    real = (row.weights > 0).astype(jnp.float32)
    z = directions(latents)
    terms = [
        jnp.einsum("s,sd,de,se->", real, z[m], others[g][row.client], z[m]) for m, g in enumerate(groups_of(row.task))
    ]
    return sum(terms, jnp.zeros(()))


def disentafl(*, weight: float) -> Method:
    """DisentAFL as a method, with the variants "disentafl", "disentafl+post" and "disentafl+2p".

    Args:
      weight: of the disentanglement loss (Table 21).
    """

    def step(tools: Tools, params: Params, opt_state: OptState, teacher: Any) -> Stepped:
        others = counterparts(tools.statistics(params))
        gradient, losses = tools.gradient(params, others)
        return *tools.update(params, opt_state, gradient), losses

    def extra_loss(row: Row, outputs: Outputs, latents: Array, others: Mapping[str, Array]) -> Array:
        return weight * disentanglement(row, latents, others)

    rule = LocalRule(step, extra_loss=extra_loss, statistics=second_moments, needs_statistics=has_counterparts)
    return fedavg("disentafl", rule)


def configured(settings: Settings, context: MethodContext) -> Method:
    """DisentAFL of a configuration."""
    return disentafl(weight=settings["disentafl"]["weight"])
