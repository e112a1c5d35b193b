"""The paper's tables filled with the scores of finished runs.

Cells are mean ± population std over clients and seeds; an average weighs each task by the clients that own it. — is a
run that diverged, "not run" what no run at hand has.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tap_jax.evaluation.layouts import (
    FURTHER,
    IMAGE_TASKS,
    LAYOUTS,
    MODELS,
    TEXT_TASKS,
    Column,
    Entry,
    Layout,
    columns_of,
    text_metrics_of,
)
from tap_jax.evaluation.scores import DIVERGED, Summary, find_metric
from tap_jax.evaluation.selection import Comparison
from tap_jax.evaluation.tables import marked, ranking
from tap_jax.tasks import TASKS

NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One score of a table; `status` is "ok", "diverged" or "not run", and only the first has a mean.

    `std` is None of averages, `observations` the number of client scores behind it over all seeds.
    """

    status: str = NOT_RUN
    mean: float | None = None
    std: float | None = None
    observations: int = 0


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: a method on a model, with the runs and seeds behind it."""

    model: str
    entry: Entry
    cells: tuple[Cell, ...]
    runs: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A filled table; `name` is "Table 1" or the like."""

    name: str
    caption: str
    heading: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @property
    def runs(self) -> tuple[str, ...]:
        """Ids of all runs in it."""
        return tuple(dict.fromkeys(run for line in self.lines for run in line.runs))

    @property
    def empty(self) -> bool:
        """Whether no run has a score of what the table is about; TAP alone is worth a line of a main table only."""
        ran = {line.entry.variant for line in self.lines if any(cell.status != NOT_RUN for cell in line.cells)}
        return ran <= ({"tap"} if self.name not in ("Table 1", "Table 2", "Table 3", "Further runs") else set())


def paper_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """Tables 1 to 6 and 8 to 16 of the models at hand; at most one comparison per model."""
    by_model = {comparison.model: comparison for comparison in comparisons}
    tables = []
    for layout in LAYOUTS:
        present = [by_model[model] for model in layout.models if model in by_model]
        if present:
            columns = layout.columns(text_metrics_of(_metrics(present, TEXT_TASKS)))
            tables.append(_filled(f"Table {layout.number}", layout.caption, layout.heading, columns, present, layout))
    return tables


def further_table(comparison: Comparison) -> Table | None:
    """What the paper's tables have no place for: other methods, and tasks of the user's own; None where all is told."""
    shown = {(entry.backbone, entry.variant) for layout in LAYOUTS for entry in layout.entries}
    own_tasks = [task for task in comparison.owners() if task not in (*IMAGE_TASKS["flava"], *TEXT_TASKS)]
    keys = [key for key in comparison.chosen if own_tasks or key not in shown]
    if not keys:
        return None
    entries = [
        Entry(FURTHER.get(v, v) + (" (standard backbone)" if b == "standard" else ""), v, b)
        for b, v in sorted(keys, key=lambda key: [*FURTHER, key[1]].index(key[1]))
        if (b, v) != ("routed", "tap")
    ]
    tasks = [task for task in (*IMAGE_TASKS[comparison.model], *TEXT_TASKS) if task in comparison.owners()] + own_tasks
    columns = columns_of([task for task in tasks if task in TASKS], text_metrics_of(_metrics([comparison], tasks)))
    caption = f"Methods and tasks beside the paper's, {MODELS[comparison.model]}"
    lines = tuple(_line(comparison, entry, columns) for entry in (*entries, Entry("TAP (Ours)", "tap")))
    return Table("Further runs", caption, "Method", columns, lines)


def markdown(table: Table) -> str:
    """The table in markdown, marks per model; where there are two lines, only the better one is marked."""
    heads = [f"{column.label} {find_metric(column.metric).heading}" for column in table.columns]
    text = [f"| Model | {table.heading} | " + " | ".join(heads) + " |", "|:--|:--|" + "--:|" * len(heads)]
    ranks = {model: _ranks(table, model) for model in {line.model for line in table.lines}}
    previous = None
    for number, line in enumerate(table.lines):
        cells = []
        for column, cell in enumerate(line.cells):
            digits = find_metric(table.columns[column].metric).digits
            printed = marked(_printed(cell, digits), ranks[line.model][column].get(str(number)))
            cells.append(printed + ("" if cell.std is None else f" ± {cell.std:.{digits}f}"))
        model = "" if line.model == previous else MODELS[line.model]
        previous = line.model
        text.append(f"| {model} | {line.entry.label} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def csv_rows(table: Table, comparison: str = "") -> list[dict[str, Any]]:
    """One row per cell with unrounded numbers, in the order of the table."""
    return [
        {
            "experiment": comparison,
            "model": MODELS[line.model],
            "method": line.entry.label,
            "backbone": line.entry.backbone,
            "variant": line.entry.variant,
            "column": column.label,
            "metric": column.metric,
            "status": cell.status,
            "mean": cell.mean,
            "std": cell.std,
            "observations": cell.observations,
            "seeds": " ".join(map(str, line.seeds)),
            "runs": " ".join(line.runs),
        }
        for line in table.lines
        for column, cell in zip(table.columns, line.cells, strict=True)
    ]


def _filled(
    name: str, caption: str, heading: str, columns: tuple[Column, ...], present: Sequence[Comparison], layout: Layout
) -> Table:
    lines = tuple(_line(comparison, entry, columns) for comparison in present for entry in layout.entries)
    return Table(name, caption, heading, columns, lines)


def _line(comparison: Comparison, entry: Entry, columns: Sequence[Column]) -> Line:
    key = entry.backbone, entry.variant
    summaries, owners = comparison.summaries(key), comparison.owners()
    runs = comparison.chosen.get(key, ())
    cells = tuple(_cell(column, summaries, owners) for column in columns)
    return Line(
        comparison.model, entry, cells, tuple(run.id for run in runs), tuple(sorted(run.config.seed for run in runs))
    )


def _cell(column: Column, summaries: Mapping[tuple[str, str], Summary], owners: Mapping[str, int]) -> Cell:
    found = [summaries[task, column.metric] for task in column.tasks if (task, column.metric) in summaries]
    if len(found) < len(column.tasks):
        return Cell()
    observations = sum(summary["observations"] for summary in found)
    means = [summary["mean"] for summary in found if summary["mean"] is not None]
    if len(means) < len(found):
        return Cell("diverged", observations=observations)
    if len(found) == 1:
        return Cell("ok", found[0]["mean"], found[0]["std"], observations)
    weights = [owners[task] for task in column.tasks]
    return Cell("ok", float(np.average(means, weights=weights)), None, observations)


def _ranks(table: Table, model: str) -> list[dict[str, int]]:
    """Per column, number of the line -> place among the model's lines that print a number."""
    found = []
    for place, column in enumerate(table.columns):
        metric = find_metric(column.metric)
        printed = {
            str(number): float(_printed(line.cells[place], metric.digits))
            for number, line in enumerate(table.lines)
            if line.model == model and line.cells[place].status == "ok"
        }
        ranks = ranking(printed, higher_is_better=metric.higher_is_better)
        marks = min(2, len(printed) - 1)
        found.append({number: rank for number, rank in ranks.items() if rank < marks})
    return found


def _printed(cell: Cell, digits: int) -> str:
    return {"diverged": DIVERGED, NOT_RUN: NOT_RUN}.get(cell.status) or f"{cell.mean:.{digits}f}"


def _metrics(comparisons: Sequence[Comparison], tasks: Sequence[str]) -> list[str]:
    return [
        row["metric"]
        for comparison in comparisons
        for run in comparison.runs
        for row in run.rows
        if row["task"] in tasks
    ]
