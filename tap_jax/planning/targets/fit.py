"""`--fit`: rows, rematerialisation and clients at once that fit a target and take the least time by the estimate."""

from collections.abc import Callable, Sequence

from tap_jax.config import ConfigDict, override
from tap_jax.device_sizes import Sizes
from tap_jax.errors import UserError
from tap_jax.planning.targets.compile import Found, gib
from tap_jax.planning.targets.programs import STAGE2, TRAINING
from tap_jax.planning.targets.session import Built, chosen_sizes, compile_all
from tap_jax.planning.targets.topology import Target

TRIES = 6  # programs are compiled for so many choices at most


def fit(
    config: ConfigDict, target: Target, *, minutes: float, say: Callable[[str], None]
) -> tuple[Sizes, Built, list[Found]]:
    """The first choice, in order of estimated time, whose training programs fit by the compiler's word.

    Raises:
      UserError: none of those tried does.
    """
    left = list(chosen_sizes(config, target))
    if not left:
        raise UserError(f"target: nothing fits '{target.name}' by the estimate; name one with more memory or devices")
    for _ in range(TRIES):
        if not left:
            break
        choice = left[0]
        say(f"trying {choice.flags} (estimated {gib(choice.bytes)} GiB)")
        built, found = compile_all(
            override(config.copy_and_resolve_references(), choice.fields),
            target,
            minutes=minutes,
            say=say,
            only=trains,
            enough=lambda one: not one.problem,
        )
        worst = max(found, key=lambda one: one.peak)
        if all(one.fits(built.platform) for one in found):
            return choice, built, found
        say(f"does not fit: {worst.name} wants {gib(worst.peak)} of {gib(built.platform.memory or 0)} GiB")
        left = smaller(left, choice, worst.peak, built.platform.memory or 0)
    raise UserError(
        f"target: of {TRIES} choices at most none was seen to fit '{target.name}'; name one with more memory, or raise"
        " --minutes"
    )


def trains(phase: str) -> bool:
    """Whether a phase's programs decide what fits."""
    return phase in (TRAINING, STAGE2)


def smaller(left: Sequence[Sizes], tried: Sizes, peak: int, memory: int) -> list[Sizes]:
    """The choices that are left once one has been seen to need `peak` bytes: those by as much smaller, if known."""
    limit = tried.bytes - max(0, peak - memory) // 2 if peak else tried.bytes
    return [sizes for sizes in left if sizes.bytes < limit]
