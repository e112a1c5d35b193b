"""From rows of scores to tables and files: `results.json` and `report.md` of one run.

A row is one score of one client, {"variant", "client", "task", "metric", "value"}; its value is None where the
run diverged. Tables are laid out as Tables 1 to 3 of the paper: mean ± std over clients, best bold, second
underlined, — for diverged, blank for what was not run, and client-weighted averages per kind of task.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from tap_jax.errors import UserError
from tap_jax.federation import TASKS

DIVERGED = "—"


class Row(TypedDict):
    """One score of one client; `value` is None where the run diverged."""

    variant: str
    client: int | str
    task: str
    metric: str
    value: float | None


class Summary(TypedDict):
    """One variant's score on one task: mean and std over its clients, both None where any of them diverged."""

    variant: str
    task: str
    metric: str
    mean: float | None
    std: float | None
    clients: int


class Metric(NamedTuple):
    """How a metric is shown: heading, direction, decimals."""

    label: str
    higher_is_better: bool
    digits: int


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
    diverged = {(row["variant"], row["task"]) for row in rows if not _finite(row["value"])}

    def summary(variant: str, task: str, metric: str, group: list[Row]) -> Summary:
        mean = std = None
        if (variant, task) not in diverged:
            values = np.array([row["value"] for row in group], np.float64)
            mean, std = float(values.mean()), float(values.std())
        clients = len({row["client"] for row in group})
        return {"variant": variant, "task": task, "metric": metric, "mean": mean, "std": std, "clients": clients}

    return [summary(*key, group) for key, group in groups.items()]


def markdown_table(
    rows: Sequence[Row],
    *,
    tasks: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    digits: int | None = None,
) -> str:
    """The paper's table in markdown: a variant per line, a column per task and metric, then the averages.

    An average is the client-weighted mean over the tasks of a kind; it stands where the table has two or more
    of them, is — where one diverged and blank where one is missing. Scores are compared as printed, so equal
    ones share their mark.

    Args:
      rows: scores, of any number of variants.
      tasks: columns, in order; default: all that occur, in the registry's order.
      variants: lines, in order; default: all that occur, in order of appearance.
      digits: decimals of every column; default: each metric's own.
    """
    table = _table(rows, tasks, variants, digits)
    if not table.columns:
        return "No results.\n"
    lines = [
        "| | " + " | ".join(column.heading for column in table.columns) + " |",
        "|:--|" + "--:|" * len(table.columns),
    ]
    for variant in table.variants:
        cells = []
        for column in table.columns:
            text, rank = column.text(variant), column.ranks.get(variant)
            text = f"**{text}**" if rank == 0 else f"<u>{text}</u>" if rank == 1 else text
            cells.append(text + column.spread(variant, " ± "))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def text_table(
    rows: Sequence[Row],
    width: int = 100,
    *,
    tasks: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    digits: int | None = None,
) -> str:
    """The same table for a terminal: a line per task and metric, a column per variant, * at the best.

    The stds are left out where they do not fit into `width` characters; columns that still do not fit go
    into further blocks below, each with the line labels.
    """
    table = _table(rows, tasks, variants, digits)
    if not table.columns:
        return "No results.\n"
    labels = [column.heading for column in table.columns]
    margin = max(map(len, labels))

    def drawn(spread: bool) -> list[list[str]]:  # one list of equally wide cells per variant, its name on top
        grid = []
        for variant in table.variants:
            cells = [f"{variant} "]
            for column in table.columns:
                star = "*" if column.ranks.get(variant) == 0 else " "
                cells.append(column.text(variant) + (column.spread(variant, "±") if spread else "") + star)
            widest = max(map(len, cells))
            grid.append([cell.rjust(widest) for cell in cells])
        return grid

    def total(grid: list[list[str]]) -> int:
        return margin + sum(2 + len(cells[0]) for cells in grid)

    grid = drawn(spread=True)
    if total(grid) > width:
        grid = drawn(spread=False)
    blocks: list[list[list[str]]] = []
    for cells in grid:
        if blocks and total([*blocks[-1], cells]) <= width:
            blocks[-1].append(cells)
        else:
            blocks.append([cells])
    left = [label.ljust(margin) for label in ("", *labels)]
    drawings = (["  ".join(line).rstrip() for line in zip(left, *block, strict=True)] for block in blocks)
    return "\n\n".join("\n".join(lines) for lines in drawings) + "\n"


def write_results(
    workdir: str | os.PathLike,
    config: Any,
    rows: Sequence[Row],
    replacements: Sequence[Mapping[str, Any]],
    timing: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Writes `results.json` and `report.md` into the folder `workdir`, each whole or not at all.

    Args:
      workdir: made if it is not there.
      config: mapping or ConfigDict.
      rows: scores; a non-finite value is written as null, which reads as diverged.
      replacements: {"round", "client", "task"} of each Stage-1 replacement.
      timing: what took how long, by name.
      notes: lines for the report, such as `TextScorer.notes`.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "value": float(row["value"]) if _finite(row["value"]) else None} for row in rows]
    results = {"config": config, "results": rows, "replacements": list(replacements), "timing": timing}
    _write(folder / "results.json", json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    _write(folder / "report.md", _report(_plain(config), rows, replacements, _plain(timing), notes))


# --- the table behind both drawings ------------------------------------------------------------------------------


class _Column:
    """One task's metric, or one average: values by variant, (mean, std or None) or None where diverged."""

    def __init__(self, heading: str, metric: Metric, values: Mapping[str, tuple[float, float | None] | None]):
        self.heading = f"{heading} {metric.label} {'↑' if metric.higher_is_better else '↓'}"
        self.values = values
        self.digits = metric.digits
        printed = {variant: float(self.text(variant)) for variant, value in values.items() if value is not None}
        order = sorted(set(printed.values()), reverse=metric.higher_is_better)
        # One lone variant is best of nothing.
        self.ranks = {variant: order.index(value) for variant, value in printed.items()} if len(values) > 1 else {}

    def text(self, variant: str) -> str:
        if variant not in self.values:
            return ""
        value = self.values[variant]
        return DIVERGED if value is None else f"{value[0]:.{self.digits}f}"

    def spread(self, variant: str, sign: str) -> str:
        value = self.values.get(variant)
        return "" if value is None or value[1] is None else f"{sign}{value[1]:.{self.digits}f}"


class _Table(NamedTuple):
    columns: list[_Column]
    variants: list[str]


def _table(
    rows: Sequence[Row], tasks: Sequence[str] | None, variants: Sequence[str] | None, digits: int | None
) -> _Table:
    variants = list(dict.fromkeys(row["variant"] for row in rows)) if variants is None else list(variants)
    seen = dict.fromkeys(row["task"] for row in rows)
    if tasks is None:
        tasks = [task for task in TASKS if task in seen] + [task for task in seen if task not in TASKS]
    summaries = {(s["variant"], s["task"], s["metric"]): s for s in summarise(rows) if s["variant"] in variants}
    names = dict.fromkeys(metric for _, _, metric in summaries)
    names = [name for name in METRICS if name in names] + [name for name in names if name not in METRICS]
    shown = {task: [name for name in names if any((v, task, name) in summaries for v in variants)] for task in tasks}

    def metric(name: str) -> Metric:
        return find_metric(name) if digits is None else find_metric(name)._replace(digits=digits)

    columns = []
    for task in tasks:
        for name in shown[task]:
            found = {v: summaries[v, task, name] for v in variants if (v, task, name) in summaries}
            values = {v: None if s["mean"] is None else (s["mean"], s["std"]) for v, s in found.items()}
            columns.append(_Column(task, metric(name), values))
    for kind, heading in AVERAGES.items():
        for name in names:
            family = [t for t in tasks if t in TASKS and TASKS[t].kind == kind and name in shown[t]]
            if len(family) > 1:
                lists = {v: [summaries.get((v, task, name)) for task in family] for v in variants}
                values = {v: _average(found) for v, found in lists.items() if None not in found}
                columns.append(_Column(heading, metric(name), values))
    return _Table(columns, variants)


def _average(found: Sequence[Summary]) -> tuple[float, None] | None:
    """The client-weighted mean of task means; None where one diverged."""
    if any(summary["mean"] is None for summary in found):
        return None
    return float(np.average([s["mean"] for s in found], weights=[s["clients"] for s in found])), None


# --- files -------------------------------------------------------------------------------------------------------


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value: Any) -> Any:
    """What strict JSON can hold: numpy becomes Python, infinities and NaN become strings, the unknown its str."""
    if hasattr(value, "to_dict"):  # ConfigDict
        value = value.to_dict()
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _report(
    config: Any,
    rows: Sequence[Row],
    replacements: Sequence[Mapping[str, Any]],
    timing: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    model = config.get("model") if isinstance(config, Mapping) else None
    about = [model.get("name") if isinstance(model, Mapping) else model]
    about += [f"{key} {config[key]}" for key in ("method", "rounds", "seed") if key in config]
    parts = ["# Results\n", ", ".join(str(item) for item in about if item) + "\n"]
    parts.append(markdown_table(rows))
    parts.append(
        "Mean ± standard deviation (population) over clients. **Best**, <u>second</u>; — did not converge; blank: "
        "not run. Averages weigh each task by its clients.\n"
    )
    parts.extend(f"Note: {note}\n" for note in notes)
    if replacements:
        tasks = [replacement["task"] for replacement in replacements]
        counts = ", ".join(f"{task} {tasks.count(task)}" for task in dict.fromkeys(tasks))
        parts.append(f"Replacements of personal parameters: {len(tasks)} ({counts}).\n")
    if timing:
        shown = (f"{key} {item:.4g}" if isinstance(item, float) else f"{key} {item}" for key, item in timing.items())
        parts.append("Timing: " + ", ".join(shown) + ".\n")
    return "\n".join(parts)


def _write(path: Path, text: str) -> None:
    """Puts the text under the path in one step: a reader finds the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
