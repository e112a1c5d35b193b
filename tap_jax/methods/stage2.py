"""Stage 2 (Sec. 3.3): every client's personal model learns on from its data and a teacher.

It takes P iterations, or ends, client by client, when it no longer helps. The choice of P is the paper's open question.
"""

import dataclasses

import numpy as np

from tap_jax.blocks import Blocks, Params
from tap_jax.methods.base import Cohort, OptState, State


@dataclasses.dataclass(frozen=True)
class Patience:
    """When to stop.

    Attributes:
      steps: P, the most there are.
      every: steps between two looks at the held-out loss.
      looks: a client stops after so many looks in a row without a new best.
    """

    steps: int
    every: int
    looks: int


def distil(
    cohort: Cohort,
    state: State,
    model: str,
    teacher: Params | None,
    patience: Patience | None = None,
) -> dict[int, Blocks]:
    """Stage 2 of every client of the cohort: client number -> its blocks.

    With patience, a client keeps the blocks with the least held-out loss (summed over its tasks) of those looked at,
    before the first step and after every few; its minibatches up to where it stops are those it has without patience.
    A client without held-out samples takes all P steps.

    Args:
      model: of the state's, the students.
      teacher: not consumed; None: the tasks' losses alone.
    """
    params = cohort.load(state.client_models[model])
    if patience is None:
        return cohort.unload(cohort.train(state, params, "distil", model=model, post=True, teacher=teacher)[1])
    opt_state: OptState | None = cohort.opt_state(state, "distil", model=model)
    least = np.asarray(cohort.held_out_loss(params)).sum(1)
    found, stale, start = cohort.unload(params), np.zeros(len(least), int), 0
    while start < patience.steps and (stale < patience.looks).any():
        stop = min(start + patience.every, patience.steps)
        params, opt_state, _ = cohort.train_steps(
            params, opt_state, "distil", (start, stop), post=True, teacher=teacher, idle=stale >= patience.looks
        )
        now = np.asarray(cohort.held_out_loss(params)).sum(1)
        # A loss of 0: nothing is held out, so nothing says when to stop.
        better = ((now < least) | (now == 0) & (cohort.clients >= 0)) & (stale < patience.looks)
        least, stale, start = np.where(better, now, least), np.where(better, 0, stale + 1), stop
        clients = cohort.clients[better]
        found |= {k: mine for k, mine in cohort.unload(params).items() if k in clients}
    return found
