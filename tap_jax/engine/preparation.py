"""The local training of cohorts, compiled in the background before the first one trains."""

import jax
import jax.numpy as jnp
import numpy as np

from tap_jax.data.sampling import PHASES, share_out
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.programs import abstract


def prepare(cohort: Cohort, *, takes_teacher: bool = True) -> None:
    """Starts compiling what trains cohorts of this one's shape.

    Args:
      takes_teacher: whether they will be given a teacher.
    """
    for args in training_shapes(cohort, takes_teacher=takes_teacher).values():
        cohort.engine.train_program.prepare(*args)


def training_shapes(cohort: Cohort, *, takes_teacher: bool = True) -> dict[tuple[bool, bool], tuple]:
    """What the training program is given, as shapes: (place for a teacher, optimizer states) -> arguments.

    Args:
      takes_teacher: whether it will be given a teacher.
    """
    engine, settings = cohort.engine, cohort.engine.settings
    params, opt_state = cohort.abstract_params(), cohort.abstract_params(engine.moments_like)
    flag = abstract(np.zeros(len(cohort.table), bool), engine.by_client)
    keys = jnp.broadcast_to(jax.random.key(0), cohort.table.shape)
    plan = share_out(cohort.plan(PHASES[-1], post=True), engine.devices.per_shard)
    wanted = {(cohort.reserves_teacher, settings.persist)}
    if takes_teacher and engine.rule.takes_teacher:
        wanted.add((True, settings.persist or settings.in_pieces))
    return {
        (with_teacher, remember): (
            *abstract((engine.frozen, engine.arrays), engine.shared),
            params,
            opt_state if remember else None,
            (flag, params) if with_teacher else None,
            abstract(cohort.layout, engine.by_client),
            abstract(plan, engine.by_row),
            *abstract((np.zeros(keys.shape, np.float32), keys), engine.by_client),
        )
        for with_teacher, remember in sorted(wanted)
    }
