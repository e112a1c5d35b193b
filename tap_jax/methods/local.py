"""Local training (Sec. 5.1): no federation. A client trains its own blocks in the rounds in which it is sampled.

for t = 0..T-1: sample C_t; each client trains its blocks for τ iterations, from where it left them

So every method spends the same local iterations; sampling all clients every round is cohort_size = K.
"""

from collections.abc import Iterator, Sequence

from tap_jax.methods.base import Cohort, FinishedBlocks, Method, MethodContext, RoundMetrics, State
from tap_jax.registry import Settings

MODEL = "local"


def train_local(cohort: Cohort, state: State) -> tuple[State, RoundMetrics]:
    """The cohort's local models go on for τ iterations; the round counter is left alone."""
    state, params, losses = cohort.train(state, cohort.load(state.client_models[MODEL]), "local")
    models = cohort.put(state.client_models[MODEL], params)
    state = state.replace(client_models={**state.client_models, MODEL: models})
    return state, RoundMetrics(losses.seen, local_loss=losses.mean())


def local_round(cohort: Cohort, state: State) -> tuple[State, RoundMetrics]:
    """One round of Local."""
    state, metrics = train_local(cohort, state)
    return state.replace(round=state.round + 1), metrics


def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> Iterator[tuple[str, FinishedBlocks]]:
    """Local has no phase after the rounds: its result is the local model."""
    yield "local", as_it_is(cohort, state, MODEL)


def as_it_is(cohort: Cohort, state: State, model: str) -> FinishedBlocks:
    """Client number -> its blocks of a model, untouched."""
    return {int(k): state.client_models[model][k] for k in cohort.clients if k >= 0}


def local() -> Method:
    """Local as a method."""
    return Method((MODEL,), local_round, finish, first_phase="local")


def configured(settings: Settings, context: MethodContext) -> Method:
    """Local of a configuration."""
    return local()
