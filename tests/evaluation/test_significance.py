"""Welch's t-test against scipy, and against the paper's own tables."""

import math

import numpy as np
import pytest
from scipy import stats

from tap_jax.evaluation.significance import Sample, p_value, significantly_better

# Tables 1 to 3 of the paper: mean and std per metric in their order, for some methods; None where diverged.
PAPER = {
    "flava": {
        "TAP": [
            (47.06, 6.80), (56.26, 5.44), (0.5572, 0.0083), (0.4252, 0.0258), (92.66, 0.34), (45.81, 4.32),
            (19.80, 3.83), (69.38, 7.47), (47.60, 14.92), (34.01, 2.96), (17.17, 4.56),
        ],
        "Local": [
            (18.78, 12.50), (23.26, 13.13), (0.6209, 0.0230), (0.6331, 0.0752), (90.26, 0.55), (41.63, 1.26),
            (20.89, 2.83), (47.72, 1.69), (10.44, 2.37), (30.62, 1.52), (13.17, 2.68),
        ],
        "FedAvg + Post-train": [
            (42.27, 6.79), (53.67, 5.46), (0.5651, 0.0064), (0.4345, 0.0141), (92.97, 0.26), (36.88, 1.97),
            (8.66, 1.24), (41.02, 4.56), (12.85, 2.87), (31.48, 1.84), (11.92, 1.68),
        ],
        "FedDAT + Post-train": [
            (26.15, 13.96), (39.63, 13.41), (0.5491, 0.0026), (0.3718, 0.0176), (92.81, 0.36), (40.29, 2.86),
            (11.13, 6.60), (57.96, 14.97), (39.32, 24.72), (40.25, 1.99), (17.91, 7.97),
        ],
    },
    "vilt": {
        "TAP": [
            (0.5467, 0.0409), (0.3949, 0.1148), (77.44, 2.63), (56.43, 3.12), (40.79, 1.61), (72.99, 7.47),
            (62.52, 9.09), (41.46, 1.45), (25.35, 1.85),
        ],
        "Local": [
            (0.6267, 0.0379), (0.6518, 0.1302), (54.98, 15.88), (55.03, 1.99), (40.59, 2.65), (55.68, 4.04),
            (40.90, 11.61), (40.79, 1.19), (25.63, 1.53),
        ],
        "Per-FedAvg + Post-train": [
            None, None, (25.00, 0.05), (44.81, 4.60), (22.82, 10.01), (75.01, 7.22), (65.48, 3.27), (31.98, 2.27),
            (4.51, 2.97),
        ],
        "FedDAT + Post-train": [
            (64.4282, 360.6894), (1.5497, 0.1876), (27.07, 0.97), (43.72, 3.72), (9.71, 7.71), (56.53, 14.86),
            (33.61, 22.48), (39.77, 2.37), (17.06, 8.88),
        ],
    },
}  # fmt: skip
# Owners of each metric's task in the paper's federations, times four seeds.
COUNTS = {
    "flava": [4 * owners for owners in (3, 3, 3, 6, 9, 3, 3, 6, 6, 6, 6)],
    "vilt": [4 * owners for owners in (9, 6, 9, 3, 3, 6, 6, 6, 6)],
}
HIGHER = {"flava": [True, True, False, False] + [True] * 7, "vilt": [False, False] + [True] * 7}


def sample(scores):
    return Sample(np.mean(scores), np.std(scores), len(scores))


@pytest.mark.parametrize("sizes", [(5, 5), (4, 30), (2, 3)])
def test_p_is_scipys(sizes):
    rng = np.random.default_rng(sum(sizes))
    ours, theirs = rng.normal(1, 2, sizes[0]), rng.normal(0, 0.3, sizes[1])
    wanted = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    assert p_value(sample(ours), sample(theirs)) == pytest.approx(wanted, rel=1e-9)


def test_too_few_and_constant_scores():
    ones = sample([1.0, 1.0])
    assert math.isnan(p_value(sample([1.0]), sample([2.0, 3.0])))
    assert p_value(ones, sample([2.0, 2.0])) == 0
    assert p_value(ones, ones) == 1
    assert p_value(ones, sample([2.0, 3.0])) == pytest.approx(stats.ttest_1samp([2.0, 3.0], 1.0).pvalue)


def test_better_needs_direction_and_significance():
    low, high, wide = Sample(1.0, 0.1, 10), Sample(2.0, 0.1, 10), Sample(1.5, 5.0, 10)
    assert significantly_better(high, low, higher_is_better=True)
    assert not significantly_better(low, high, higher_is_better=True)
    assert significantly_better(low, high, higher_is_better=False)
    assert not significantly_better(high, wide, higher_is_better=True)
    assert not significantly_better(Sample(2.0, 0.0, 1), low, higher_is_better=True)
    assert significantly_better(low, None, higher_is_better=True)
    assert not significantly_better(None, low, higher_is_better=True)
    assert not significantly_better(None, None, higher_is_better=True)


@pytest.mark.parametrize(
    ("model", "baseline", "percent"),
    [
        ("flava", "Local", 90.9),
        ("flava", "FedAvg + Post-train", 63.6),
        ("flava", "FedDAT + Post-train", 45.5),
        ("vilt", "Local", 55.6),
        ("vilt", "Per-FedAvg + Post-train", 77.8),
        ("vilt", "FedDAT + Post-train", 88.9),
    ],
)
def test_the_papers_table_17_follows_from_its_tables_1_to_3(model, baseline, percent):
    sides = zip(PAPER[model]["TAP"], PAPER[model][baseline], COUNTS[model], HIGHER[model], strict=True)
    found = [
        significantly_better(Sample(*ours, count), theirs and Sample(*theirs, count), higher_is_better=higher)
        for ours, theirs, count, higher in sides
    ]
    assert round(100 * sum(found) / len(found), 1) == percent
