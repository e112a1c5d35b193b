"""FedAvg (McMahan et al., 2017), component-wise as in Sec. 3.1, and its post-trained variants.

for t = 0..T-1: sample C_t; each client trains W̃[i] from the server's blocks; the server averages per block
afterwards (+ post): each client trains its W̃[i] for P iterations (+ 2p: for 2P)
"""

from collections.abc import Sequence

from tap_jax.methods.base import Cohort, Method, State, put_rows


def federated_round(cohort: Cohort, state: State) -> tuple[State, dict]:
    """One round of FedAvg: returns the state with the server's new blocks and h^(l) of the seen tasks."""
    federated, losses = cohort.train(cohort.broadcast(state.server), "federated")
    return state.replace(
        round=state.round + 1,
        server=cohort.aggregate(state.server, federated, losses),
        **record(cohort, state, "federated", losses),
    ), {"federated_loss": losses.mean(), "seen": losses.seen}


def record(cohort: Cohort, state: State, chain: str, losses, **others) -> dict:
    """State fields after training `chain`: its tasks' finiteness, and further tables in `others`."""
    mean = losses.mean()
    finite = put_rows(state.finite[chain], cohort.clients, mean * 0 == 0, losses.seen) & state.finite[chain]
    return {"finite": {**state.finite, chain: finite}, **others}


def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> dict:
    """Post-training of every client's W̃[i]; plain FedAvg is the server's blocks."""
    results = {}
    if {"fedavg+post", "fedavg+2p"} & set(variants):
        stack, _ = cohort.train(cohort.broadcast(state.server), "post", post=True)
        if "fedavg+post" in variants:
            results["fedavg+post"] = cohort.unload(stack)
        if "fedavg+2p" in variants:
            stack, _ = cohort.train(stack, "post_again", post=True)
            results["fedavg+2p"] = cohort.unload(stack)
    return results


def fedavg() -> Method:
    """FedAvg as a method: no chains beside the server's."""
    return Method((), federated_round, finish)
