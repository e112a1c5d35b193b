"""The experiment: does the bound hold on federations of which everything is known, and what grows with R?

A `Setting` is one federation and one way to run it; `measure` runs it and gives a `Verdict` for each objective that
it has. Settings that break an assumption are run too: a verdict names what is broken, whether the bound holds or not.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from tap_jax.theory.bound import MENDED_OVER_PRINTED, Terms, largest_rate, mended_bound, terms
from tap_jax.theory.quadratics import Quadratics, draw, fedavg

EQUATION_1 = "equation 1"  # f = Σ_i |D_i|/|D| g_i
OF_PROOF = "of the proof"  # f = Σ_r (1/K_r) Σ_i g_{i,r}; exists where losses are separable


@dataclasses.dataclass(frozen=True)
class Setting:
    """One federation (see `quadratics.draw`) and one way to run component-wise FedAvg on it.

    Attributes:
      pairs: R, modality-task pairs.
      owners: K_r of r = 1..R.
      local_steps: τ.
      coupled: whether clients' Hessians are full, their own and not convex.
      rate: η_0 over the largest rate of Theorem 1, 1/(48Lτ).
      diminishing: whether η_t = η_0/(t+1), else η_t = η_0.
      rounds: T.
      cohort: clients of a round, or None for all.
      uneven: how many times the data of the others half of the owners have.
      by_data: whether the server weights by |D_i|, else it takes the plain mean over owners.
      still: whether W_0 is where the server's mean gradient is 0, else it is drawn.
    """

    pairs: int
    owners: int
    local_steps: int
    coupled: bool = False
    rate: float = 1.0
    diminishing: bool = False
    rounds: int = 100
    cohort: int | None = None
    uneven: float = 1.0
    by_data: bool = False
    still: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was measured and what the bounds say; squared gradient norms.

    Attributes:
      setting: what was run.
      objective: `EQUATION_1` or `OF_PROOF`, the f that is meant.
      measured: left-hand side of Theorem 1, (Σ η_t E‖∇f(W_t)‖²)/Σ η_t, mean over seeds.
      deviation: its standard error over seeds.
      weighted: left-hand side of `mended_bound`, with Σ_r p_r‖G_r‖²; not below `measured`.
      printed: the four terms of Theorem 1's right-hand side.
      mended: right-hand side of `mended_bound`.
      printed_broken: the assumptions of Theorem 1 that the setting breaks.
      mended_broken: the assumptions of `mended_bound` that it breaks.
    """

    setting: Setting
    objective: str
    measured: float
    deviation: float
    weighted: float
    printed: Terms
    mended: float
    printed_broken: tuple[str, ...]
    mended_broken: tuple[str, ...]

    @property
    def printed_holds(self) -> bool:
        """Whether Theorem 1's inequality holds; False where a number is not finite."""
        return bool(self.measured <= sum(self.printed) < math.inf)

    @property
    def mended_holds(self) -> bool:
        """Whether the inequality of `mended_bound` holds; False where a number is not finite."""
        return bool(self.weighted <= self.mended < math.inf)

    @property
    def unexplained(self) -> bool:
        """Whether a bound fails although nothing that it assumes is broken."""
        printed = not self.printed_holds and not self.printed_broken
        return printed or (not self.mended_holds and not self.mended_broken)


def broken(setting: Setting, objective: str, largest: float) -> tuple[str, ...]:
    """The assumptions that a setting breaks, for a bound whose largest rate is `largest` times Theorem 1's."""
    found = []
    if setting.rate > largest * (1 + 1e-9):
        found.append(f"rate {setting.rate / largest:.3g} times the largest")
    if setting.cohort is not None:
        found.append(f"{setting.cohort} of {setting.pairs * setting.owners} clients a round, not all")
    if setting.uneven != 1 and setting.by_data != (objective == EQUATION_1):
        found.append("the server's mean over owners is not that of the objective")
    return tuple(found)


def measure(setting: Setting, *, seeds: int = 8, seed: int = 0) -> list[Verdict]:
    """Runs a setting under `seeds` seeds and compares both sides, for every objective that it has.

    ζ_r² is the largest deviation at any iterate of any seed; where no two blocks meet and owners share a Hessian it
    is the same everywhere (about the owners' mean). L, σ² and K_r are exact. E is the mean over seeds.
    """
    federation = draw(
        setting.pairs, setting.owners, seed=seed, coupled=setting.coupled, noise=1.0, uneven=setting.uneven
    )
    weights = federation.per_client() if setting.by_data else federation.per_block()
    if setting.still:
        start = federation.stationary(weights)
    else:
        start = np.random.default_rng([seed, 1]).standard_normal(federation.shape)
    first = setting.rate * largest_rate(federation.smoothness, setting.local_steps)
    rates = first / (1 + np.arange(setting.rounds)) if setting.diminishing else np.full(setting.rounds, first)
    path = fedavg(
        federation,
        start,
        rates,
        local_steps=setting.local_steps,
        weights=weights,
        seeds=seeds,
        seed=seed + 2,
        cohort=setting.cohort,
    )
    # Where blocks are coupled there is in general no f of the proof: bound.py, 1.
    objectives = [OF_PROOF, EQUATION_1] if federation.separable else [EQUATION_1]
    return [_verdict(setting, federation, objective, path, rates) for objective in objectives]


def _verdict(setting: Setting, federation: Quadratics, objective: str, path: np.ndarray, rates: np.ndarray) -> Verdict:
    weights = federation.per_client() if objective == EQUATION_1 else federation.per_block()
    p = federation.shares(weights)
    inside = weights / p[federation.blocks]  # a_ir, adding up to 1 over a block's owners
    plain = federation.per_block()
    own = federation.gradients(federation.take(path[:-1]))
    mean = federation.add_up(inside, own)  # G_r at W_0..W_{T-1}, [T, S, R+1, d]
    gradient = p[:, None] * mean
    squared = np.square(gradient).sum((-2, -1))  # [T, S]
    weighted = (p * np.square(mean).sum(-1)).sum(-1)
    by_seed = rates @ squared / rates.sum()

    def spread(center: np.ndarray, owner_weights: np.ndarray) -> np.ndarray:
        away = np.square(own - federation.take(center))
        return federation.add_up(owner_weights, away).sum(-1).max((0, 1))

    smoothness, steps = federation.smoothness, setting.local_steps
    decrease = float((federation.value(weights, path[0]) - federation.value(weights, path[-1])).mean())
    mine = federation.blocks.shape[1]
    counted = 1 / np.bincount(federation.blocks.ravel(), np.square(inside).ravel())
    return Verdict(
        setting=setting,
        objective=objective,
        measured=float(by_seed.mean()),
        deviation=float(by_seed.std(ddof=1) / math.sqrt(len(by_seed))),
        weighted=float((rates @ weighted / rates.sum()).mean()),
        printed=terms(
            rates,
            decrease,
            smoothness=smoothness,
            local_steps=steps,
            noise=federation.noise,
            heterogeneity=spread(gradient, plain),
            owners=federation.owners,
        ),
        mended=mended_bound(
            rates,
            decrease,
            smoothness=smoothness,
            local_steps=steps,
            noise=np.full(len(p), federation.noise / mine),
            heterogeneity=spread(mean, inside),
            owners=counted,
            shares=p,
        ),
        printed_broken=broken(setting, objective, 1),
        mended_broken=broken(setting, objective, MENDED_OVER_PRINTED),
    )


def grid(
    pairs: Sequence[int] = (1, 4, 16), owners: Sequence[int] = (1, 4), local_steps: Sequence[int] = (1, 5, 20)
) -> Iterator[Setting]:
    """Settings over R, K_r, τ and the rates: first those within the theorem, then those that break an assumption."""
    # η_0 over the largest rate; whether rates diminish; whether W_0 is stationary (then the last three terms count).
    schedules = [(1.0, False, False), (1.0, True, False), (0.1, False, False), (1.0, False, True)]
    for r, k, tau, (rate, diminishing, still), coupled in itertools.product(
        pairs, owners, local_steps, schedules, (False, True)
    ):
        yield Setting(r, k, tau, coupled=coupled, rate=rate, diminishing=diminishing, still=still)
    for r, tau, coupled in itertools.product(pairs, local_steps, (False, True)):
        yield Setting(r, 4, tau, coupled=coupled, rate=MENDED_OVER_PRINTED)
        yield Setting(r, 4, tau, coupled=coupled, rate=48.0)  # ηLτ = 1
        yield Setting(r, 4, tau, coupled=coupled, rate=120.0 * tau, rounds=20)  # ηL = 2.5: local descent diverges
    for tau, rate in itertools.product(local_steps, (1.0, 0.01)):
        yield Setting(30, 1, tau, rate=rate, cohort=2)  # 2 of 30, as the paper runs it
        yield Setting(3, 10, tau, rate=rate, cohort=2)
        yield Setting(2, 4, tau, rate=rate, uneven=9.0, still=True)
        yield Setting(2, 4, tau, rate=rate, uneven=9.0, by_data=True)


def growth(pairs: Sequence[int] = (1, 2, 4, 8, 16, 32), *, draws: int = 6) -> list[Verdict]:
    """More and more modality-task pairs, all else equal (K_r = 4, τ = 5, the largest rate), for `draws` federations."""
    settings = [Setting(r, 4, 5) for r in pairs]
    return [
        verdict for setting in settings for seed in range(draws) for verdict in measure(setting, seeds=4, seed=seed)
    ]
