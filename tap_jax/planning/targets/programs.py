"""The programs of a run, each with what it is given, as shapes: what there is to compile for a target."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tap_jax.engine.cohort import Cohort, client_batches
from tap_jax.engine.local_training import Losses
from tap_jax.engine.parallel import SHARED
from tap_jax.engine.preparation import training_shapes
from tap_jax.engine.programs import abstract
from tap_jax.experiment import Experiment

TRAINING, STAGE2, PREDICTION = "training", "stage 2", "prediction"  # phases; all else is "exchange"
EXCHANGE = "exchange"


@dataclasses.dataclass(frozen=True)
class RunProgram:
    """One program.

    Attributes:
      name: what it is called in tables.
      phase: `TRAINING`, `STAGE2`, `PREDICTION` or `EXCHANGE`.
      lower: traces it for the run's devices.
      bodies: how many row loops it has; 0: it has no rows.
    """

    name: str
    phase: str
    lower: Callable[[], jax.stages.Lowered]
    bodies: int = 0


def programs(run: Experiment) -> list[RunProgram]:
    """All programs of a run that was built for a target, those of a round first.

    Args:
      run: of `experiment.build` with a target.
    """
    engine = run.engine
    cohort, everyone = Cohort.of(engine, range(engine.settings.cohort_size), 0), client_batches(engine, 0)[0]
    same = cohort.positions == everyone.positions
    found = _training(run, cohort, "round", TRAINING, takes_teacher=same or not engine.rule.teacher_optional)
    found += _exchange(run, cohort)
    if not same:
        found += _training(run, everyone, "stage 2", STAGE2, takes_teacher=True)
    return found + _prediction(run, everyone)


def _training(run: Experiment, cohort: Cohort, name: str, phase: str, *, takes_teacher: bool) -> list[RunProgram]:
    bodies = sum(map(len, run.engine.shapes.values()))
    found = []
    for (with_teacher, remember), args in training_shapes(cohort, takes_teacher=takes_teacher).items():
        extra = ", with a teacher" * with_teacher + ", with optimizer states" * remember
        title = f"{name}: local training of {(cohort.table >= 0).sum()} clients{extra}"
        found.append(RunProgram(title, phase, lambda args=args: run.engine.train_program.lower(*args), bodies))
    return found


def _exchange(run: Experiment, cohort: Cohort) -> list[RunProgram]:
    """What server and clients do with each other's blocks."""
    engine = run.engine
    positions, tasks = len(cohort.clients), len(engine.tasks)
    params, (shards, layout) = cohort.abstract_params(), (cohort.layout, cohort.flat_layout)
    server = engine.server_shapes()
    weights = np.zeros((positions, len(engine.partition.names)), np.float32)
    zeros = jnp.zeros((positions, tasks), jnp.float32)
    losses = abstract(Losses(zeros, zeros, zeros.astype(jnp.int32)), engine.shared)
    key = abstract(jax.random.key(0), engine.devices.sharding(SHARED)) if engine.settings.privacy else None
    found = {
        "broadcast": lambda: engine.broadcast.lower(server, shards),
        "aggregate": lambda: engine.aggregate.lower(server, params, layout, weights, losses, key),
    }
    if run.method.personal_variants:
        indicator = jax.ShapeDtypeStruct((positions, tasks), bool)
        allowed = engine.replaceable[np.maximum(cohort.clients, 0)]
        found["replace"] = lambda: engine.replace.lower(params, params, layout, indicator, allowed)
    return [RunProgram(name, EXCHANGE, lower) for name, lower in found.items()]


def _prediction(run: Experiment, cohort: Cohort) -> list[RunProgram]:
    kinds = {group.name: group.tasks for group in run.engine.task_groups}
    found = []
    for name, (program, args) in run.evaluator.programs(cohort).items():
        tasks = kinds[name]
        work = "generation" if tasks[0].kind == "text_generation" else "prediction"
        title = f"{work}: {', '.join(task.name for task in tasks)}"
        bodies = len(run.evaluator.shapes[name])
        found.append(RunProgram(title, PREDICTION, lambda p=program, a=args: p.lower(*a), bodies))
    return found
