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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.blocks import Params
from tap_jax.methods import local
from tap_jax.methods.base import (
    Cohort,
    FinishedBlocks,
    Forward,
    LocalRule,
    Method,
    MethodContext,
    Outputs,
    RoundMetrics,
    Row,
    SplitRound,
    State,
    Trained,
    put_rows,
    take_rows,
)
from tap_jax.methods.criteria import CRITERIA, Criterion, Evidence, loss, relative_margin
from tap_jax.methods.fedavg import post_trained
from tap_jax.methods.losses import distillation_loss
from tap_jax.methods.stage2 import Patience, distil
from tap_jax.registry import Settings
from tap_jax.tasks import Task

MODEL = "personal"


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


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Choices of Stage 2.

    Attributes:
      weights: task kind -> β_o of equation 6.
      temperature, power, image_loss: of equation 5, see `losses.distillation_loss`.
    """

    weights: Mapping[str, float]
    temperature: float = 1.0
    power: float = -2.0
    image_loss: str = "kl"


def distillation_term(forward: Forward, choice: Distillation) -> Callable[[Row, Outputs, Array, Any], Array]:
    """The second term of equation 6, Σ_n w_n β_o KL_n(teacher ‖ student), where there is a teacher; 0 where not.

    The teacher computes without dropout, and no gradient flows through it. As `LocalRule.extra_loss`.
    """

    def term(row: Row, outputs: Outputs, latents: Array, auxiliary: Any) -> Array:
        if auxiliary is None:
            return jnp.zeros(())
        given, teacher = auxiliary

        def with_teacher(outputs: Outputs) -> Array:
            found, _ = forward(row.frozen, row.take(teacher), row.task, row.batch)
            divergence = distillation_loss(
                row.task.kind,
                jax.lax.stop_gradient(found),
                outputs,
                row.batch,
                temperature=choice.temperature,
                power=choice.power,
                image_loss=choice.image_loss,
            )
            return choice.weights[row.task.kind] * row.total(divergence)

        return jax.lax.cond(given, with_teacher, lambda _: jnp.zeros(()), outputs)

    return term


def tap(
    tasks: Sequence[Task],
    margins: Mapping[str, np.ndarray],
    *,
    variants: Sequence[str],
    replacement: Replacement,
    patience: Patience | None,
    forward: Forward,
    distillation: Distillation,
) -> Method:
    """TAP as a method.

    Args:
      tasks: of the federation, O of them.
      margins: "" for the variant "tap", and "@LABEL" for any number of further ones -> m [O], in the loss's units
        (Table 22).
      variants: what the run is to yield; "local" and "tap-stage2" need a model that never communicates, trained on the
        same rounds.
      patience: when to stop distilling before P iterations are over; None: never.
      forward: `ServerModel.forward`, by which the teacher computes.
      distillation: how it teaches.
    """
    personal_models = {MODEL + suffix: f"tap{suffix}" for suffix in margins}
    last = list(personal_models)[-1]
    with_local = bool({"local", "tap-stage2"} & set(variants))

    def train_federated(cohort: Cohort, state: State) -> tuple[State, Trained]:
        """W̃[i] of every client, and what the server makes of them."""
        state, federated, losses = cohort.train(state, cohort.broadcast(state.server), "federated")
        state = cohort.aggregate(state, federated, losses)
        return state.replace(round=state.round + 1), Trained(federated, losses)

    def replace_blocks(cohort: Cohort, state: State, model: str, trained: Trained) -> tuple[Params, Array]:
        """Equations 3 and 4 for one personal model -> (X, R)."""
        losses = trained.losses
        h_l, h_p = losses.mean(replacement.history), take_rows(state.personal_loss[model], cohort.clients)
        given = margins[model.removeprefix(MODEL)]
        before = take_rows(state.local_loss, cohort.clients)
        margin = relative_margin(given, h_l, before) if replacement.relative else given
        personal = cohort.load(state.client_models[model])
        evidence = Evidence(cohort, trained.federated, personal, h_l, h_p, margin, losses.seen, tuple(tasks))
        indicator = replacement.criterion(evidence)
        never = np.isposinf(h_p)
        if replacement.first == "keep":
            indicator = indicator & ~never
        else:  # whatever the criterion; by equation 3 it follows from h^(p) = +inf
            indicator = indicator | (losses.seen & never & jnp.isfinite(h_l))
        return cohort.replace(personal, trained.federated, indicator), indicator

    def train_personal(
        cohort: Cohort, state: State, model: str, personal: Params, indicator: Array
    ) -> tuple[State, Array]:
        """The rest of Stage 1 of one personal model -> (state, its losses)."""
        state, personal, own = cohort.train(state, personal, "personal", model=model)
        count = take_rows(state.replacements[model], cohort.clients) + np.asarray(indicator)
        h_p = put_rows(state.personal_loss[model], cohort.clients, own.mean(replacement.history), own.seen)
        return state.replace(
            client_models={**state.client_models, model: cohort.put(state.client_models[model], personal)},
            personal_loss={**state.personal_loss, model: h_p},
            replacements={**state.replacements, model: put_rows(state.replacements[model], cohort.clients, count)},
        ), own.mean()

    def train_all_personal(cohort: Cohort, state: State, trained: Trained) -> tuple[State, RoundMetrics]:
        """X[i] of every client, of all margins, given W̃[i] after its local training."""
        losses, after = trained.losses, state
        replaced, personal_loss, local_loss = {}, None, None
        for model, variant in personal_models.items():
            params, indicator = replace_blocks(cohort, after, model, trained)
            if model == last:
                del trained  # W̃[i] need not be kept while the last X trains
            after, mean = train_personal(cohort, after, model, params, indicator)
            replaced[variant] = indicator
            if model == MODEL:
                personal_loss = mean
        after = after.replace(
            local_loss=put_rows(state.local_loss, cohort.clients, losses.mean(replacement.history), losses.seen),
        )
        if with_local:
            after, more = local.train_local(cohort, after)
            local_loss = more.local_loss
        return after, RoundMetrics(losses.seen, losses.mean(), personal_loss, local_loss, replaced)

    def finish(cohort: Cohort, state: State, variants: Sequence[str]) -> Iterator[tuple[str, FinishedBlocks]]:
        teacher = post_trained(cohort, state)

        def student(model: str, teacher: Params | None = teacher) -> FinishedBlocks:
            return distil(cohort, state, model, teacher, patience)

        # First, so that the time until it is there is Stage 2's.
        for model, variant in personal_models.items():
            if variant in variants:
                yield variant, student(model)
        if "tap-stage2" in variants:
            yield "tap-stage2", student(local.MODEL)
        if "tap-stage1" in variants:
            yield "tap-stage1", local.as_it_is(cohort, state, MODEL)
        if "tap-no-kd" in variants:
            yield "tap-no-kd", student(MODEL, teacher=None)
        if "local" in variants:
            yield "local", local.as_it_is(cohort, state, local.MODEL)
        if "fedavg+post" in variants:
            yield "fedavg+post", cohort.unload(teacher)
        if "fedavg+2p" in variants:
            del teacher, student  # another W̃[i] takes the memory
            yield "fedavg+2p", cohort.unload(post_trained(cohort, state, twice=True))

    carried = (*personal_models, local.MODEL) if with_local else tuple(personal_models)
    rule = LocalRule(
        takes_teacher=True,
        teacher_optional=True,
        extra_loss=distillation_term(forward, distillation),
    )
    return Method(carried, SplitRound(train_federated, train_all_personal), finish, rule, personal_models)


def configured(settings: Settings, context: MethodContext) -> Method:
    """TAP of a configuration."""
    stage1, stage2 = settings["replacement"], settings["distillation"]
    margins = {
        suffix: np.array([by_kind[task.kind] for task in context.model.tasks], np.float32)
        for suffix, by_kind in settings["margins"].items()
    }
    return tap(
        context.model.tasks,
        margins,
        variants=context.variants,
        replacement=Replacement(
            stage1["history"],
            stage1["first"],
            context.criterion or CRITERIA[stage1["criterion"]],
            stage1["margin"] == "relative",
        ),
        patience=Patience(context.post_steps, stage2["look_every"], stage2["patience"]) if stage2["patience"] else None,
        forward=context.model.forward,
        distillation=Distillation(
            stage2["weights"], stage2["temperature"], stage2["temperature_power"], stage2["image_loss"]
        ),
    )
