"""How long a program and a schedule take at least on a target: work over the devices' peaks.

An estimate, for comparing settings and targets. No device has run anything.
"""

import dataclasses

from tap_jax.experiment import Experiment
from tap_jax.planning.useful_share import Share, measure
from tap_jax.platforms import Platform

PLANS = 10  # rounds whose plans say what a call takes
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


def planned_work(run: Experiment) -> dict[str, Work]:
    """Phase -> the work of one of its calls on average, from the plans of some rounds and of the last phase.

    Prediction is not counted, and nothing is where a method does more in a step than gradients of the task losses.
    """
    gradients = run.sections.gradients
    if gradients is None:
        return {}
    personal = bool(run.method.personal_variants)
    shares = measure(
        run.model,
        run.federation,
        run.data,
        run.engine.data,
        run.engine.settings,
        personal=personal,
        plans=PLANS,
    )
    models = 2 if personal else 1  # whose plans are measured
    times = {"training": PLANS * models, "stage 2": models * _client_batches(run)}
    found = {"training": shares.rounds, "stage 2": shares.stage2}
    total = {phase: sum(by_task.values(), Share()) * (gradients / times[phase]) for phase, by_task in found.items()}
    return {phase: Work(share.computed, share.useful) for phase, share in total.items()}


def calls(run: Experiment) -> dict[str, float]:
    """Phase -> how often a run trains so."""
    settings, personal = run.engine.settings, run.method.personal_variants
    models = 1 + len(personal) if personal else max(1, len(run.method.client_models))
    last = sum(run.sections.post_periods) if settings.post_steps else 0
    return {"training": settings.rounds * models, "stage 2": _client_batches(run) * last}


def _client_batches(run: Experiment) -> int:
    """Batches of clients after the last round."""
    return -(-len(run.engine.data) // run.engine.settings.clients_at_once)
