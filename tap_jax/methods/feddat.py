"""FedDAT (Chen et al., 2024): adapters that are averaged, adapters that are kept, and a teacher of both.

A client has three sets of bottleneck adapters: A1, communicated; A2, a frozen copy of the A1 it received; A0, its own.
The dual-adapter teacher computes h + ½A0(h) + ½A2(h) wherever the others compute h + A1(h) or h + A0(h).

for t = 0..T-1: sample C_t; each client: A1, heads from the server; A2 = A1; then τ times, on one minibatch:
    z_T = teacher's outputs (constant);  z_1 = outputs with A1
    A1, heads = AdamW(∇ [Σ_o λ_o ℓ_o(z_1) + weight · Σ_o KL(z_T ‖ z_1)])
    z_1 as it was (constant);  z_0 = outputs with A0
    A0, heads = AdamW(∇ [Σ_o λ_o ℓ_o(z_0) + weight · Σ_o KL(z_1 ‖ z_0)])
  the server averages A1 and heads per block
afterwards (+ post): each client goes on so, for P iterations

"Heads" are all trainables that are no adapters: decoders, glue of the encoders, shared projection. The teacher is what
is evaluated. A minibatch has one dropout mask for all its forward passes.

In a client's parameters A1 lies in the shape classes of the model's adapters and A0 in their private twins
(`Partition.with_private`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.blocks import PRIVATE, Blocks, Params, Tree
from tap_jax.methods.base import (
    Cohort,
    FinishedBlocks,
    Forward,
    LocalRule,
    Method,
    MethodContext,
    OptState,
    Outputs,
    RoundMetrics,
    Row,
    State,
    Stepped,
    Tools,
)
from tap_jax.methods.losses import distillation_loss
from tap_jax.registry import Settings

MODEL = "private"


def with_own(params: Params | Blocks) -> dict[str, Tree]:
    """The parameters, or a client's blocks, as a model with A0 sees them: in the place of A1, and no private ones."""
    return {name: params.get(PRIVATE + name, matrix) for name, matrix in shared(params).items()}


def shared(params: Params | Blocks) -> dict[str, Tree]:
    """The same as a model with A1 sees them."""
    return {name: matrix for name, matrix in params.items() if not name.startswith(PRIVATE)}


def put(params: Params, seen: Params, own: Array) -> dict[str, Array]:
    """`params` with what a model saw put back: adapters into A0 where `own`, else into A1; the rest as it is."""
    out = dict(params)
    for name, matrix in seen.items():
        twin = PRIVATE + name
        if twin in params:
            out[twin] = choose(own, matrix, params[twin])
            out[name] = choose(own, params[name], matrix)
        else:
            out[name] = matrix
    return out


def choose(flag: Array, yes: Tree, no: Tree) -> Tree:
    """`yes` where the flag is true, else `no`; trees of one structure."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)


def step(tools: Tools, params: Params, opt_state: OptState, teacher: Any) -> Stepped:
    """Both updates on one minibatch, as two turns of one loop, so that the gradient is compiled once.

    The losses are those of A1's turn, since that is what the client sends.
    """
    _, received = teacher
    before = params

    def turn(number: Array, carry: Stepped) -> Stepped:
        params, opt_state, sent = carry
        own = number == 1
        seen, moments = (choose(own, with_own(tree), shared(tree)) for tree in (params, opt_state))
        # The teacher: the heads as they are with A0 and, of what was received, A2. In the second turn A1 as it was
        # before the first; ½A1 + ½A1 = A1 to the bit.
        first = choose(own, shared(before), with_own(before))
        second = choose(own, shared(before), shared(received))
        gradient, losses = tools.gradient(seen, (first, second))
        seen, moments = tools.update(seen, moments, gradient)
        return put(params, seen, own), put(opt_state, moments, own), choose(own, sent, losses)

    return jax.lax.fori_loop(0, 2, turn, (params, opt_state, tools.no_losses))


def adapter_divergence(
    forward: Forward, dual: Callable[[Tree, Tree], Tree], *, weight: float, image_loss: str
) -> Callable[[Row, Outputs, Array, Any], Array]:
    """weight · Σ_n w_n KL_n(teacher ‖ model being trained) of a row, as `LocalRule.extra_loss`.

    The teacher has two sets of adapters, ½ each, and all other parts of the first. It has the row's dropout, and no
    gradient flows through it.
    """

    def term(row: Row, outputs: Outputs, latents: Array, both: tuple[Params, Params]) -> Array:
        first, second = both
        parts = dual(row.take(first), row.take(second))
        teacher, _ = forward(row.frozen, parts, row.task, row.batch, key=row.key)
        teacher = jax.lax.stop_gradient(teacher)
        return weight * row.total(distillation_loss(row.task.kind, teacher, outputs, row.batch, image_loss=image_loss))

    return term


def feddat(
    forward: Forward,
    dual: Callable[[Blocks, Blocks], Blocks],
    *,
    weight: float,
    image_loss: str,
) -> Method:
    """FedDAT as a method, with the variants "feddat" and "feddat+post".

    Args:
      forward: `ServerModel.forward`.
      dual: `ServerModel.dual`: (blocks or parts with the first adapters, with the second) -> with both, ½ each.
      weight: of the KL terms (Table 21).
      image_loss: of `losses.distillation_loss`.
    """

    def start(cohort: Cohort, state: State) -> tuple[Params, Params]:
        """A client's parameters, and what it received of the server."""
        params = cohort.load(state.client_models[MODEL], cohort.broadcast(state.server))
        return params, cohort.broadcast(state.server)  # once more: training consumes its parameters

    def feddat_round(cohort: Cohort, state: State) -> tuple[State, RoundMetrics]:
        params, received = start(cohort, state)
        state, params, losses = cohort.train(state, params, "federated", teacher=received)
        state = cohort.aggregate(state, params, losses)
        return state.replace(
            round=state.round + 1,
            client_models={**state.client_models, MODEL: cohort.put(state.client_models[MODEL], params)},
        ), RoundMetrics(losses.seen, federated_loss=losses.mean())

    def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> Iterator[tuple[str, FinishedBlocks]]:
        params, received = start(cohort, state)
        frozen_copy = cohort.unload(received)

        def teachers(params: Params) -> FinishedBlocks:
            return {k: dual(with_own(mine), frozen_copy[k]) for k, mine in cohort.unload(params).items()}

        if "feddat" in variants:
            yield "feddat", teachers(params)
        if "feddat+post" in variants:
            yield "feddat+post", teachers(cohort.train(state, params, "post", post=True, teacher=received)[1])

    divergence = adapter_divergence(forward, dual, weight=weight, image_loss=image_loss)
    rule = LocalRule(step, takes_teacher=True, extra_loss=divergence)
    return Method((MODEL,), feddat_round, finish, rule)


def configured(settings: Settings, context: MethodContext) -> Method:
    """FedDAT of a configuration."""
    return feddat(
        context.model.forward,
        context.model.dual,
        weight=settings["feddat"]["weight"],
        image_loss=settings["distillation"]["image_loss"],
    )
