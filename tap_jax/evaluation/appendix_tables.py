"""Tables that are no scores: Table 7 (what TAP costs) and Table 17 (where it is significantly better)."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tap_jax.errors import UserError
from tap_jax.evaluation.finished import FinishedRun
from tap_jax.evaluation.layouts import BASELINES, IMAGE_TASKS, MODELS, TEXT_TASKS, columns_of, text_metrics_of
from tap_jax.evaluation.paper_tables import NOT_RUN
from tap_jax.evaluation.scores import find_metric
from tap_jax.evaluation.selection import Comparison
from tap_jax.evaluation.significance import Sample, significantly_better

GIB = 2**30
FLOAT32 = 4  # bytes of a parameter
Parameters = Callable[[FinishedRun], Mapping[str, float]]  # `tap_jax.models.accounting.table7` of its configuration


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of ready text; `records` are its numbers, for the CSV."""

    name: str
    caption: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    records: tuple[Mapping[str, Any], ...]
    runs: tuple[str, ...]
    note: str

    def markdown(self) -> str:
        """In markdown, numbers to the right."""
        aligned = "".join("--:|" if number > 1 else ":--|" for number in range(len(self.heads)))
        lines = (f"| {' | '.join(line)} |" for line in (self.heads, *self.lines))
        first, *rest = lines
        return "\n".join([first, f"|{aligned}", *rest]) + "\n"


def costs(comparisons: Sequence[Comparison], parameters: Parameters) -> Grid:
    """Table 7: parameters from the configuration's shapes, memory and seconds as the runs measured them.

    The paper's "Avg. Memory" is its parameters in float32; peaks are of the whole process, data and optimiser included.
    """
    lines, records, used = [], [], []
    for comparison in comparisons:
        routed = [run for run in comparison.runs if run.config.model.backbone == "routed"]
        counted = _counted(routed, parameters)
        for setting, mine in (
            ("No TAP", [run for run in routed if run.config.method == "fedavg"]),
            ("TAP", [run for run in routed if run.config.method == "tap"]),
        ):
            prefix = "tap_" if setting == "TAP" else ""
            total, percent = (counted.get(f"{prefix}{name}") for name in ("total", "percent"))
            trainable = counted.get("trainable")
            record = {
                "experiment": "",
                "model": MODELS[comparison.model],
                "setting": setting,
                "total_parameters": total,
                "trainable_parameters": None if trainable is None else trainable * (2 if setting == "TAP" else 1),
                "trainable_percent": percent,
                "parameter_gib": None if total is None else FLOAT32 * total / GIB,
                "peak_host_gib": _gib(mine, "peak_host_bytes"),
                "peak_device_gib": _gib(mine, "peak_device_bytes"),
                "stage2_seconds_per_client": _mean([_stage2_seconds(run) for run in mine if setting == "TAP"]),
                "runs": " ".join(run.id for run in mine),
            }
            records.append(record)
            used += [run.id for run in (mine or routed[:1])]
            formats = ("{:,.2f}", "{:,.2f}", "{:.4f} %", "{:.4f}", "{:.2f}", "{:.2f}", "{:.2f}")
            values = list(record.values())[3:-1]
            absent = "not measured" if mine else NOT_RUN
            cells = [absent if v is None else f.format(v) for f, v in zip(formats, values, strict=True)]
            cells[-1] = "—" if setting == "No TAP" else cells[-1]
            lines.append((MODELS[comparison.model], setting, *cells))
    return Grid(
        "Table 7",
        "Parameters and memory with and without TAP, seconds of Stage 2 (both models' last phase), mean over clients",
        ("Model", "Setting", "Avg. Total Params.", "Avg. Trainable Params.", "Avg. % trainable")
        + ("Params. in float32 (GiB)", "Peak host memory (GiB)", "Peak device memory (GiB)", "Avg. Stage 2 time (s)"),
        tuple(lines),
        tuple(records),
        tuple(dict.fromkeys(used)),
        "Parameters follow from the configuration, memory and seconds were measured by the runs; peaks are of the whole"
        " process, largest run.",
    )


def significance(comparisons: Sequence[Comparison]) -> Grid:
    """Table 17: share of metrics for which TAP is better and Welch's t-test has p < 0.05, against each baseline.

    One observation is one client's score under one seed (see `tap_jax.evaluation.significance`). Metrics that either
    side lacks are not counted; the last column says how many there were.
    """
    lines, records, used = [], [], []
    for comparison in comparisons:
        names = [row["metric"] for run in comparison.runs for row in run.rows if row["task"] in TEXT_TASKS]
        columns = columns_of((*IMAGE_TASKS[comparison.model], *TEXT_TASKS), text_metrics_of(names))
        keys = [(column.tasks[0], column.metric) for column in columns if len(column.tasks) == 1]
        ours = _samples(comparison, "tap", keys)
        for baseline in BASELINES:
            theirs = _samples(comparison, baseline.variant, keys)
            both = [key for key in keys if key in ours and key in theirs]
            better = [
                significantly_better(ours[key], theirs[key], higher_is_better=find_metric(key[1]).higher_is_better)
                for key in both
            ]
            runs = [
                run.id
                for variant in ("tap", baseline.variant)
                for run in comparison.chosen.get(("routed", variant), ())
            ]
            used += runs if both else []
            percent = 100 * sum(better) / len(better) if better else None
            records.append(
                {
                    "experiment": "",
                    "model": MODELS[comparison.model],
                    "baseline": baseline.label,
                    "percent": percent,
                    "significantly_better": sum(better),
                    "metrics": len(better),
                    "runs": " ".join(dict.fromkeys(runs)) if both else "",
                }
            )
            shown = (f"{percent:.1f} %", f"{sum(better)} of {len(better)}") if better else (NOT_RUN, NOT_RUN)
            lines.append((MODELS[comparison.model], baseline.label, *shown))
    return Grid(
        "Table 17",
        "Share of metrics for which TAP is better with statistical significance (Welch's t-test, p < 0.05)",
        ("Model", "Baseline", "% Metrics TAP Significantly Better", "Metrics"),
        tuple(lines),
        tuple(records),
        tuple(dict.fromkeys(used)),
        "An observation is a client's score under one seed; a baseline that diverged counts as beaten, a metric with"
        " fewer than two observations as not significant.",
    )


def _samples(comparison: Comparison, variant: str, keys: Sequence[tuple[str, str]]) -> dict[tuple, Sample | None]:
    """(task, metric) -> mean, std and count, None where diverged, absent where not run."""
    return {
        key: None if s["mean"] is None else Sample(s["mean"], s["std"] or 0.0, s["observations"])
        for key, s in comparison.summaries(("routed", variant)).items()
        if key in keys
    }


def _counted(runs: Sequence[FinishedRun], parameters: Parameters) -> Mapping[str, float]:
    """Nothing where no run has a configuration that can still be built."""
    for run in runs:
        if run.config.method != "centralised":  # its one client has every task
            try:
                return parameters(run)
            except UserError:
                continue
    return {}


def _stage2_seconds(run: FinishedRun) -> float | None:
    found = run.timing.get("stage2_seconds_per_client")
    if isinstance(found, Mapping):
        found = list(found.values())
    return float(np.mean(found)) if found not in (None, []) else None


def _gib(runs: Sequence[FinishedRun], name: str) -> float | None:
    found = [run.timing[name] for run in runs if run.timing.get(name)]
    return max(found) / GIB if found else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
