"""Welch's t-test between TAP and the baselines (Appendix C.5, Table 17).

The paper does not say what one observation is. Taking the scores of all clients that own a task, over all seeds (n =
owners · seeds), all 18 rows of Table 17 follow from the mean ± std of Tables 1 to 3 and n alone, whether the printed
std is the population's or the sample's; a baseline that diverged counts as one that TAP beats significantly (only so
do the rows of Per-FedAvg on ViLT come out). What no summary can give back are p-values beyond the printed digits.

Such observations are not independent: clients of one run share data and model. Where all clients of a task are given
one model and one test set (FedAvg), their scores are even equal, which makes that side's variance too small.
"""

import math
import warnings
from typing import NamedTuple

from scipy import stats

LEVEL = 0.05  # of significance


class Sample(NamedTuple):
    """Scores of one method on one task and metric: mean, population std and number of observations."""

    mean: float
    std: float
    number: int


def p_value(ours: Sample, theirs: Sample) -> float:
    """Two-sided p of Welch's t-test; NaN where a side has fewer than two observations.

    Two constant sides have no variance to test against: p is 0 where they differ, 1 where they are equal.
    """
    if min(ours.number, theirs.number) < 2:
        return math.nan
    if ours.std == theirs.std == 0:
        return float(ours.mean == theirs.mean)

    def unbiased(sample: Sample) -> float:
        return sample.std * math.sqrt(sample.number / (sample.number - 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly identical data: p is then what it is
        found = stats.ttest_ind_from_stats(
            ours.mean, unbiased(ours), ours.number, theirs.mean, unbiased(theirs), theirs.number, equal_var=False
        )
    return float(found.pvalue)


def significantly_better(ours: Sample | None, theirs: Sample | None, *, higher_is_better: bool) -> bool:
    """Whether ours is the better mean and p < 0.05; None stands for diverged, which loses to everything else."""
    if ours is None or theirs is None:
        return ours is not None
    better = ours.mean > theirs.mean if higher_is_better else ours.mean < theirs.mean
    return better and p_value(ours, theirs) < LEVEL
