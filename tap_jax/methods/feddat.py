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

In a client's stack A1 sits in the groups of the model's adapters and A0 in their private twins
(`Partition.with_private`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.blocks import PRIVATE, Blocks, Stack, Tree
from tap_jax.methods.base import Cohort, LocalRule, Method, Row, State, StepLosses, Tools
from tap_jax.methods.fedavg import still_finite

CHAIN = "private"


def with_own(stack: Stack) -> dict[str, Array]:
    """The stack as a model with A0 sees it: in the place of A1, and no private groups."""
    return {group: stack.get(PRIVATE + group, matrix) for group, matrix in shared(stack).items()}


def shared(stack: Stack) -> dict[str, Array]:
    """The stack as a model with A1 sees it."""
    return {group: matrix for group, matrix in stack.items() if not group.startswith(PRIVATE)}


def put(stack: Stack, seen: Stack, own: Array) -> dict[str, Array]:
    """`stack` with what a model saw put back: adapters into A0 where `own`, else into A1; the rest as it is."""
    out = dict(stack)
    for group, matrix in seen.items():
        twin = PRIVATE + group
        if twin in stack:
            out[twin] = choose(own, matrix, stack[twin])
            out[group] = choose(own, stack[group], matrix)
        else:
            out[group] = matrix
    return out


def choose(flag: Array, yes: Tree, no: Tree) -> Tree:
    """`yes` where the flag is true, else `no`; trees of one structure."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)


def step(tools: Tools, stack: Stack, state: Mapping, aid: Any) -> tuple[Stack, Mapping, StepLosses]:
    """Both updates on one minibatch, as two turns of one loop, so that the gradient is compiled once.

    The losses are those of A1's turn, since that is what the client sends.
    """
    _, received = aid
    before = stack

    def turn(number, carry):
        stack, state, sent = carry
        own = number == 1
        seen, moments = (choose(own, with_own(tree), shared(tree)) for tree in (stack, state))
        # The teacher: the heads as they are with A0 and, of what was received, A2. In the second turn A1 as it was
        # before the first; ½A1 + ½A1 = A1 to the bit.
        first = choose(own, shared(before), with_own(before))
        second = choose(own, shared(before), shared(received))
        gradient, losses = tools.gradient(seen, (first, second))
        seen, moments = tools.update(seen, moments, gradient)
        return put(stack, seen, own), put(state, moments, own), choose(own, sent, losses)

    return jax.lax.fori_loop(0, 2, turn, (stack, state, tools.no_losses))


def feddat(
    divergence: Callable[[Row, Array, Stack, Stack], Array], teacher: Callable[[Blocks, Blocks], Blocks]
) -> Method:
    """FedDAT as a method, with the variants "feddat" and "feddat+post".

    Args:
      divergence: (row, outputs, first, second) -> weight · KL between the outputs of the model with both stacks'
        adapters, ½ each (other parts from the first), and `outputs`: a scalar.
      teacher: (a client's blocks with A0 in their place, A2's) -> blocks of the dual-adapter teacher, on the host.
    """

    def extra_loss(row: Row, outputs: Array, latents: Array, stacks) -> Array:
        return divergence(row, outputs, *stacks)

    def start(cohort: Cohort, state: State) -> tuple[Stack, Stack]:
        """A client's stack, and what it received of the server."""
        received = cohort.broadcast(state.server)
        return cohort.load(state.chains[CHAIN], received), cohort.broadcast(state.server)

    def feddat_round(cohort: Cohort, state: State) -> tuple[State, dict]:
        stack, received = start(cohort, state)
        stack, losses = cohort.train(stack, "federated", teacher=received)
        return state.replace(
            round=state.round + 1,
            server=cohort.aggregate(state.server, stack, losses),
            chains={**state.chains, CHAIN: cohort.put(state.chains[CHAIN], stack)},
            finite=still_finite(cohort, state, "federated", losses),
        ), {"federated_loss": losses.mean(), "seen": losses.seen}

    def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> Iterator[tuple[str, dict]]:
        stack, received = start(cohort, state)
        frozen_copy = cohort.unload(received)

        def teachers(stack: Stack) -> dict:
            return {k: teacher(with_own_blocks(mine), frozen_copy[k]) for k, mine in cohort.unload(stack).items()}

        if "feddat" in variants:
            yield "feddat", teachers(stack)
        if "feddat+post" in variants:
            yield "feddat+post", teachers(cohort.train(stack, "post", post=True, teacher=received)[0])

    rule = LocalRule(step, guided=True, extra_loss=extra_loss)
    return Method((CHAIN,), feddat_round, finish, rule)


def with_own_blocks(blocks: Blocks) -> dict:
    """A client's blocks by name as a model with A0 sees them."""
    return {name: blocks.get(PRIVATE + name, tree) for name, tree in blocks.items() if not name.startswith(PRIVATE)}
