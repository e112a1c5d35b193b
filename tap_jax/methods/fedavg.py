"""FedAvg (McMahan et al., 2017), component-wise as in Sec. 3.1, and its post-trained variants.

for t = 0..T-1: sample C_t; each client trains W̃[i] from the server's blocks; the server averages per block
afterwards (+ post): each client trains its W̃[i] for P iterations (+ 2p: for 2P, in one local training, App. C.1)

Methods that differ in the local step only (Per-FedAvg, DisentAFL) are this one with another `LocalRule`. The
centralised run is this one with a single client that has all clients' data and takes up to |C_t|·τ iterations a round.
"""

from collections.abc import Iterator, Sequence

from tap_jax.blocks import Params
from tap_jax.methods.base import PLAIN, Cohort, FinishedBlocks, LocalRule, Method, MethodContext, RoundMetrics, State
from tap_jax.registry import Settings, federated_variants


def federated_round(cohort: Cohort, state: State) -> tuple[State, RoundMetrics]:
    """One round of FedAvg: returns the state with the server's new blocks and the loss of the seen tasks."""
    state, federated, losses = cohort.train(state, cohort.broadcast(state.server), "federated")
    state = cohort.aggregate(state, federated, losses)
    return state.replace(round=state.round + 1), RoundMetrics(losses.seen, federated_loss=losses.mean())


def post_trained(cohort: Cohort, state: State, *, twice: bool = False) -> Params:
    """W̃[i] of every client after P more iterations from the server's blocks, or 2P, [D, G, n]; TAP's teacher."""
    return cohort.train(state, cohort.broadcast(state.server), "post", post=True, twice=twice)[1]


def fedavg(name: str = "fedavg", rule: LocalRule = PLAIN) -> Method:
    """FedAvg as a method: no client models beside the server's.

    Args:
      name: of its variants, `registry.federated_variants`.
      rule: how clients train, in the rounds and after them.
    """

    def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> Iterator[tuple[str, FinishedBlocks]]:
        for variant in federated_variants(name):
            if variant.periods and variant.name in variants:
                yield variant.name, cohort.unload(post_trained(cohort, state, twice=variant.periods == 2))

    return Method((), federated_round, finish, rule)


def configured(settings: Settings, context: MethodContext) -> Method:
    """FedAvg of a configuration."""
    return fedavg()


def centralised(settings: Settings, context: MethodContext) -> Method:
    """The centralised run of a configuration."""
    return fedavg("centralised")
