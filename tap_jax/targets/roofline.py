"""How long a program and a schedule take at least on a target: work over the devices' peaks.

An estimate, for comparing settings and targets. No device has run anything.
"""

import dataclasses

from tap_jax.data.families import fields
from tap_jax.experiment import Experiment
from tap_jax.platforms import Platform
from tap_jax.step_cost import gradients_per_step, task_flops

ACHIEVED = 0.4  # part of the peak that an estimate of hours takes to be reached


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of one call of a program, of all devices together.

    Attributes:
      computed: what its rows take.
      useful: what real samples and tokens of them take; None where that is not measured.
    """

    computed: float
    useful: float | None = None


def seconds(work: Work | None, accessed: float | None, platform: Platform, devices: int) -> float | None:
    """The time of one call at the peaks: of arithmetic or of memory, whichever takes longer; None where not known.

    Args:
      accessed: bytes on each device; None: not known.
      devices: that share the work.
    """
    times = []
    if work and platform.peak:
        times.append(work.computed / platform.peak / devices)
    if accessed and platform.bandwidth:
        times.append(accessed / platform.bandwidth)
    return max(times) if times else None


def largest_work(run: Experiment) -> dict[str, Work]:
    """Phase -> the work of its longest call: every minibatch full, texts and answers as wide as the data have them.

    Prediction is not counted.
    """
    gradients = gradients_per_step(run.config)
    if gradients is None:
        return {}
    settings, mask = run.engine.settings, run.engine.partition.task_mask
    widths = {
        task.name: {name: tuple(leaf.shape[1:]) for name, leaf in fields(run.data.train[task.name]).items()}
        for task in run.model.tasks
    }
    costs = {name: flops.total for name, flops in task_flops(run.model, widths).items()}
    names = [task.name for task in run.model.tasks]
    mean = [sum(costs[names[o]] for o in mine.nonzero()[0]) / max(1, mine.sum()) for mine in mask]
    one = gradients * settings.batch * sum(mean) / len(mean)  # of a client's step
    return {
        "training": Work(one * settings.local_steps * settings.cohort_size),
        "stage 2": Work(one * settings.post_steps * settings.clients_per_pass),
    }


def calls(run: Experiment) -> dict[str, float]:
    """Phase -> how often a run trains so."""
    settings, clients = run.engine.settings, len(run.engine.data)
    chains = 1 + len(run.method.margins) if run.method.margins else max(1, len(run.method.chains))
    passes = -(-clients // settings.clients_per_pass)
    last = 2 if run.engine.rule.guided else 1 if settings.post_steps else 0
    return {"training": run.config.rounds * chains, "stage 2": passes * last}
