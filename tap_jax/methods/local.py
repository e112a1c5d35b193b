"""Local training: no federation. A client trains its own blocks in the rounds in which it is sampled.

So every method spends the same local iterations; sampling all clients every round is cohort_size = K.
"""

from collections.abc import Sequence

from tap_jax.methods.base import Cohort, Method, State, put_chain
from tap_jax.methods.fedavg import record

CHAIN = "local"


def train_local(cohort: Cohort, state: State) -> tuple[State, dict]:
    """The cohort's local chains go on for τ iterations; the round counter is left alone."""
    stack, losses = cohort.train(cohort.load(state.chains[CHAIN]), "local")
    chain = put_chain(state.chains[CHAIN], cohort.unload(stack))
    state = state.replace(chains={**state.chains, CHAIN: chain}, **record(cohort, state, CHAIN, losses))
    return state, {"local_loss": losses.mean(), "seen": losses.seen}


def local_round(cohort: Cohort, state: State) -> tuple[State, dict]:
    """One round of Local."""
    state, metrics = train_local(cohort, state)
    return state.replace(round=state.round + 1), metrics


def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> dict:
    """Local has no phase after the rounds: its result is its chain."""
    return {"local": {int(k): state.chains[CHAIN][k] for k in cohort.clients if k >= 0}}


def local() -> Method:
    """Local as a method."""
    return Method((CHAIN,), local_round, finish)
