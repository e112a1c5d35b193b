"""TAP, Algorithm 1 of the paper: margin-based replacement during the rounds, distillation after them.

for t = 0..T-1:
  sample C_t
  for c_i in C_t:
    train W̃[i] on D_i;  h^(l)[o] = its mean loss, for seen o
    send W̃[i] to the server
    R_i[o] = 1 where h^(l)[o] + m[o] < h^(p)[o]                      (eq. 3)
    X[i,o] = (1 - R_i[o]) X[i,o] + R_i[o] W̃[i,o]                     (eq. 4)
    train X[i] on D_i;  h^(p)[o] = its mean loss, for seen o
  aggregate per block; send every client its blocks
for every c_i: train W̃[i] for P iterations (teacher); train X[i] for P iterations on eq. 6
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax import Array

from tap_jax.blocks import replacement_indicator
from tap_jax.methods import fedavg, local
from tap_jax.methods.base import Cohort, Method, State, put_chain, put_rows, take_rows

CHAIN = "personal"
# criterion(h^(l) [P, O], h^(p) [P, O], margin [O], seen bool [P, O]) -> R bool [P, O]
Criterion = Callable[[Array, Array, Array, Array], Array]


def tap(
    margins: np.ndarray,
    *,
    history: str = "plain",
    first: str = "replace",
    variants: Sequence[str] = ("tap",),
    criterion: Criterion = replacement_indicator,
) -> Method:
    """TAP as a method.

    Args:
      margins: m [O], in the loss's units (Table 22).
      history: "plain" mean of a task's loss, or "weighted" by its share λ_o of each minibatch.
      first: "replace" or "keep" X at a client's first participation, when h^(p) is still +inf.
      variants: what the run is to yield; "local" adds a third chain trained on the same rounds.
      criterion: decides R (eq. 3).
    """

    def tap_round(cohort: Cohort, state: State) -> tuple[State, dict]:
        federated, losses = cohort.train(cohort.broadcast(state.server), "federated")
        h_l = losses.mean(history)
        h_p = take_rows(state.personal_loss, cohort.clients)
        indicator = criterion(h_l, h_p, margins, losses.seen)
        if first == "keep":
            indicator &= np.isfinite(h_p)

        personal = cohort.replace(cohort.load(state.chains[CHAIN]), federated, indicator)
        personal, own_losses = cohort.train(personal, "personal")
        server = cohort.aggregate(state.server, federated, losses)

        metrics = {
            "federated_loss": losses.mean(),
            "personal_loss": own_losses.mean(),
            "replaced": indicator,
            "seen": losses.seen,
        }
        state = state.replace(server=server, **fedavg.record(cohort, state, "federated", losses))
        state = state.replace(
            round=state.round + 1,
            chains={**state.chains, CHAIN: put_chain(state.chains[CHAIN], cohort.unload(personal))},
            local_loss=put_rows(state.local_loss, cohort.clients, h_l, losses.seen),
            personal_loss=put_rows(state.personal_loss, cohort.clients, own_losses.mean(history), own_losses.seen),
            replacements=put_rows(
                state.replacements,
                cohort.clients,
                take_rows(state.replacements, cohort.clients) + np.asarray(indicator),
            ),
            **fedavg.record(cohort, state, CHAIN, own_losses),
        )
        if "local" in variants:
            state, more = local.train_local(cohort, state)
            metrics |= {"local_loss": more["local_loss"]}
        return state, metrics

    def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> dict:
        results = {}
        teacher, _ = cohort.train(cohort.broadcast(state.server), "post", post=True)
        if "fedavg+post" in variants:
            results["fedavg+post"] = cohort.unload(teacher)
        if "tap" in variants:
            student, _ = cohort.train(cohort.load(state.chains[CHAIN]), "distil", post=True, teacher=teacher)
            results["tap"] = cohort.unload(student)
        if "tap-no-kd" in variants:
            student, _ = cohort.train(cohort.load(state.chains[CHAIN]), "distil", post=True)
            results["tap-no-kd"] = cohort.unload(student)
        if "fedavg+2p" in variants:
            longer, _ = cohort.train(teacher, "post_again", post=True)
            results["fedavg+2p"] = cohort.unload(longer)
        if "local" in variants:
            results |= local.finish(cohort, state, variants)
        return results

    chains = (CHAIN, local.CHAIN) if "local" in variants else (CHAIN,)
    return Method(chains, tap_round, finish)
