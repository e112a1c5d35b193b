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

W̃ does not depend on X. So one run serves several margins: each has its own X, h^(p) and R beside the one W̃. And what
follows "send W̃[i]" may wait until the W̃ of some more rounds are trained (`methods.base.SplitRound`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.blocks import Stack
from tap_jax.federation import Task
from tap_jax.methods import local
from tap_jax.methods.base import PLAIN, Cohort, LocalRule, Method, SplitRound, State, Trained, put_rows, take_rows
from tap_jax.methods.criteria import Criterion, Evidence, loss, relative_margin
from tap_jax.methods.early_stopping import Patience, distil
from tap_jax.methods.fedavg import still_finite

CHAIN = "personal"


@dataclasses.dataclass(frozen=True)
class Replacement:
    """Choices of Stage 1.

    Attributes:
      history: "plain" mean of a task's loss, or "weighted" by its share λ_o of each minibatch.
      first: "replace" or "keep" X at a client's first participation, when h^(p) is still +inf.
      criterion: decides R (eq. 3).
      relative: margins are parts of the loss's running scale, not absolute.
    """

    history: str = "plain"
    first: str = "replace"
    criterion: Criterion = loss
    relative: bool = False


PAPER = Replacement()


def tap(
    tasks: Sequence[Task],
    margins: Mapping[str, np.ndarray],
    *,
    variants: Sequence[str] = ("tap",),
    replacement: Replacement = PAPER,
    patience: Patience | None = None,
    rule: LocalRule = PLAIN,
) -> Method:
    """TAP as a method.

    Args:
      tasks: of the federation, O of them.
      margins: variant -> m [O], in the loss's units (Table 22): "tap" and any number of "tap@LABEL".
      variants: what the run is to yield; "local" and "tap-stage2" need a chain that never communicates, trained on the
        same rounds.
      patience: when to stop distilling before P iterations are over; None: never.
      rule: with the distillation loss of equation 6; without it nothing can be distilled.
    """
    chains = {CHAIN + variant.removeprefix("tap"): variant for variant in margins}
    last = list(chains)[-1]
    with_local = bool({"local", "tap-stage2"} & set(variants))

    def federated(cohort: Cohort, state: State) -> tuple[State, Trained]:
        """W̃[i] of every client, and what the server makes of them."""
        trained = Trained(*cohort.train(cohort.broadcast(state.server), "federated"))
        server = cohort.aggregate(state.server, trained.federated, trained.losses)
        return state.replace(round=state.round + 1, server=server), trained

    def replaced(cohort: Cohort, state: State, chain: str, trained: Trained) -> tuple[Stack, Array]:
        """Equations 3 and 4 for one personal chain -> (X, R)."""
        losses = trained.losses
        h_l, h_p = losses.mean(replacement.history), take_rows(state.personal_loss[chain], cohort.clients)
        margin = margins[chains[chain]]
        if replacement.relative:
            margin = relative_margin(margin, h_l, take_rows(state.local_loss, cohort.clients))
        personal = cohort.load(state.chains[chain])
        evidence = Evidence(cohort, trained.federated, personal, h_l, h_p, margin, losses.seen, tuple(tasks))
        indicator = replacement.criterion(evidence)
        never = np.isposinf(h_p)
        if replacement.first == "keep":
            indicator = indicator & ~never
        else:  # whatever the criterion; by equation 3 it follows from h^(p) = +inf
            indicator = indicator | (losses.seen & never & jnp.isfinite(h_l))
        return cohort.replace(personal, trained.federated, indicator), indicator

    def train_personal(
        cohort: Cohort, state: State, chain: str, personal: Stack, indicator: Array
    ) -> tuple[State, Array]:
        """The rest of Stage 1 of one personal chain -> (state, its losses)."""
        personal, own = cohort.train(personal, "personal", chain=chain)
        count = take_rows(state.replacements[chain], cohort.clients) + np.asarray(indicator)
        h_p = put_rows(state.personal_loss[chain], cohort.clients, own.mean(replacement.history), own.seen)
        return state.replace(
            chains={**state.chains, chain: cohort.put(state.chains[chain], personal)},
            personal_loss={**state.personal_loss, chain: h_p},
            replacements={**state.replacements, chain: put_rows(state.replacements[chain], cohort.clients, count)},
            finite=still_finite(cohort, state, chain, own),
        ), own.mean()

    def personal(cohort: Cohort, state: State, trained: Trained) -> tuple[State, dict]:
        """X[i] of every client, of all margins, given W̃[i] after its local training."""
        losses, after = trained.losses, state
        metrics = {"federated_loss": losses.mean(), "seen": losses.seen, "replaced": {}}
        for chain, variant in chains.items():
            stack, indicator = replaced(cohort, after, chain, trained)
            if chain == last:
                del trained  # W̃[i] need not be kept while the last X trains
            after, mean = train_personal(cohort, after, chain, stack, indicator)
            metrics["replaced"][variant] = indicator
            if chain == CHAIN:
                metrics["personal_loss"] = mean
        after = after.replace(
            local_loss=put_rows(state.local_loss, cohort.clients, losses.mean(replacement.history), losses.seen),
            finite=still_finite(cohort, after, "federated", losses),
        )
        if with_local:
            after, more = local.train_local(cohort, after)
            metrics["local_loss"] = more["local_loss"]
        return after, metrics

    def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> Iterator[tuple[str, dict]]:
        teacher, _ = cohort.train(cohort.broadcast(state.server), "post", post=True)

        def student(chain: str, teacher: Stack | None = teacher) -> dict:
            return distil(cohort, state.chains[chain], chain, teacher, patience)

        # First, so that the time until it is there is Stage 2's.
        for chain, variant in chains.items():
            if variant in variants:
                yield variant, student(chain)
        if "tap-stage2" in variants:
            yield "tap-stage2", student(local.CHAIN)
        if "tap-stage1" in variants:
            yield "tap-stage1", local.as_it_is(cohort, state, CHAIN)
        if "tap-no-kd" in variants:
            yield "tap-no-kd", student(CHAIN, teacher=None)
        if "local" in variants:
            yield "local", local.as_it_is(cohort, state, local.CHAIN)
        if "fedavg+post" in variants:
            yield "fedavg+post", cohort.unload(teacher)
        if "fedavg+2p" in variants:
            yield "fedavg+2p", cohort.unload(cohort.train(teacher, "post_again", post=True)[0])

    carried = (*chains, local.CHAIN) if with_local else tuple(chains)
    return Method(carried, SplitRound(federated, personal), finish, rule, margins=chains)
