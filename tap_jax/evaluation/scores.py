"""Scores of clients and what is made of them: a row per score, metrics and how they are shown, mean ± std."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from tap_jax.errors import UserError

DIVERGED = "—"


class Row(TypedDict):
    """One score of one client; `value` is None where the run diverged."""

    variant: str
    client: int | str
    task: str
    metric: str
    value: float | None


class Summary(TypedDict):
    """One variant's score on one task: mean and std over its observations, both None where any of them diverged."""

    variant: str
    task: str
    metric: str
    mean: float | None
    std: float | None
    clients: int
    observations: int


class Metric(NamedTuple):
    """How a metric is shown: heading, direction, decimals."""

    label: str
    higher_is_better: bool
    digits: int

    @property
    def heading(self) -> str:
        """The label, and which way is better."""
        return f"{self.label} {'↑' if self.higher_is_better else '↓'}"


METRICS: dict[str, Metric] = {
    "accuracy": Metric("Acc", True, 2),
    "mse": Metric("MSE", False, 4),
    "bertscore": Metric("BS", True, 2),
    "bertscore_minilm": Metric("BS (MiniLM)", True, 2),
    "token_f1": Metric("Token F1", True, 2),
    "meteor": Metric("METEOR", True, 2),
    "meteor_exact_stem": Metric("METEOR (exact+stem)", True, 2),
}

# The paper's averages: over the tasks of one kind, for each metric that those tasks share.
AVERAGES = {
    "image_classification": "Avg. Class.",
    "image_generation": "Avg. Gen.",
    "text_classification": "Avg. Text Class.",
    "text_generation": "Avg. Gen.",
}


def find_metric(name: str) -> Metric:
    """The registered metric, or its base's with the rest of the name in the heading (bertscore_<model>).

    Raises:
      UserError: neither is registered.
    """
    if name in METRICS:
        return METRICS[name]
    for base in sorted(METRICS, key=len, reverse=True):
        if name.startswith(f"{base}_"):
            return METRICS[base]._replace(label=f"{METRICS[base].label} ({name[len(base) + 1 :]})")
    raise UserError(f"results: unknown metric '{name}'; add it to METRICS, which has {', '.join(METRICS)}")


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Mean ± std over clients, per (variant, task, metric) in order of appearance.

    The std is the population's (ddof 0): the clients are the whole federation, not a sample of a larger one.
    Rows of several seeds may be put together; mean and std then run over clients and seeds. One None or
    non-finite value among a variant's scores on a task makes that whole (variant, task) diverged.

    Example:
      >>> row = {"variant": "tap", "task": "ag_news", "metric": "accuracy"}
      >>> summarise([row | {"client": 0, "value": 90.0}, row | {"client": 1, "value": 92.0}])[0]["mean"]
      91.0
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["task"], row["metric"]), []).append(row)
    diverged = {(row["variant"], row["task"]) for row in rows if not finite(row["value"])}

    def summary(variant: str, task: str, metric: str, group: list[Row]) -> Summary:
        mean = std = None
        if (variant, task) not in diverged:
            values = np.array([row["value"] for row in group], np.float64)
            mean, std = float(values.mean()), float(values.std())
        return {
            "variant": variant,
            "task": task,
            "metric": metric,
            "mean": mean,
            "std": std,
            "clients": len({row["client"] for row in group}),
            "observations": len(group),
        }

    return [summary(*key, group) for key, group in groups.items()]


def finite(value: Any) -> bool:
    """Whether it is a number that can be averaged."""
    return value is not None and math.isfinite(value)
