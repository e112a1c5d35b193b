"""Per-FedAvg (Fallah et al., 2020): FedAvg whose clients train for the loss after one more step of their own.

for t = 0..T-1: sample C_t; each client, τ times, from W̃[i]:
    draw minibatches D, D'
    w' = w - α ∇f(w; D)                                 (inner step, plain SGD)
    g  = ∇f(w'; D')                                     (first-order)
    g  = g - α ∇²f(w; D) g                              (exact: the gradient of w -> f(w - α ∇f(w; D); D'))
    w  = AdamW(w, g)
  the server averages per block
afterwards (+ post): each client goes on so from the server's blocks, for P iterations (App. C.1)

What is evaluated without post-training is the server's blocks. α is η times `scale` (Table 21 has the same schedule).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.blocks import Params
from tap_jax.methods.base import LocalRule, LocalStep, Method, MethodContext, OptState, StepLosses, Stepped, Tools
from tap_jax.methods.fedavg import fedavg
from tap_jax.registry import Settings

Descent = tuple[Params, Params, StepLosses]  # w, the gradient that led there, its losses


def meta_step(*, scale: float = 1.0, exact: bool = False) -> LocalStep:
    """The local step: w' on one minibatch, then an AdamW update of w with g of another; the losses are those at w'.

    Args:
      scale: α / η.
      exact: with the Hessian-vector product, by forward differentiation of the gradient; else first-order.
    """

    def step(tools: Tools, params: Params, opt_state: OptState, teacher: Any) -> Stepped:
        alpha = {name: scale * rate for name, rate in tools.rate.items()}

        def descend(minibatch: Array, carry: Descent) -> Descent:
            at, *_ = carry
            gradient, losses = tools.gradient(at, minibatch=minibatch)
            return jax.tree.map(lambda w, a, g: w - a * g, at, alpha, gradient), gradient, losses

        # Two steps of one loop, so that the gradient is compiled once. The second starts from w': its gradient is the
        # outer one, and where it leads does not matter.
        nothing = jax.tree.map(jnp.zeros_like, params)
        _, outer, losses = jax.lax.fori_loop(0, 2, descend, (params, nothing, tools.no_losses))
        if exact:
            _, curved = jax.jvp(lambda w: tools.gradient(w, minibatch=0)[0], (params,), (outer,))
            outer = jax.tree.map(lambda g, a, h: g - a * h, outer, alpha, curved)
        return *tools.update(params, opt_state, outer), losses

    return step


def per_fedavg(*, scale: float = 1.0, exact: bool = False) -> Method:
    """Per-FedAvg as a method, with the variants "per-fedavg" and "per-fedavg+post"; see `meta_step`."""
    return fedavg("per-fedavg", LocalRule(meta_step(scale=scale, exact=exact), minibatches_per_step=2))


def configured(settings: Settings, context: MethodContext) -> Method:
    """Per-FedAvg of a configuration."""
    section = settings["per_fedavg"]
    return per_fedavg(scale=section["inner_scale"], exact=section["hessian"] == "exact")
