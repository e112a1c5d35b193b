"""Scores of one run as tables, in markdown and for a terminal.

A row per task and metric, then the client-weighted averages per kind of task; a column per variant. A run has more
tasks than variants, so the table stays narrow. Cells are those of Tables 1 to 3 of the paper: mean ± std over clients,
best bold, second underlined, — for diverged, blank for what was not run.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tap_jax.evaluation.scores import AVERAGES, DIVERGED, METRICS, Metric, Row, Summary, find_metric, summarise
from tap_jax.tasks import TASKS

MOST_CLIENTS = 300  # in a table of scores by client


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in markdown: a line per task and metric, then the averages; a column per variant.

    Tasks are in the registry's order, variants in that of `rows`.

    An average is the client-weighted mean over the tasks of a kind; it stands where the table has two or more
    of them, is — where one diverged and blank where one is missing. Scores are compared as printed, so equal
    ones share their mark.
    """
    table = _table(rows)
    if not table.scores:
        return "No results.\n"
    lines = [f"| | {' | '.join(table.variants)} |", "|:--|" + "--:|" * len(table.variants)]
    for score in table.scores:
        cells = [
            marked(score.text(variant), score.ranks.get(variant)) + score.spread(variant, " ± ")
            for variant in table.variants
        ]
        lines.append(f"| {score.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text_table(rows: Sequence[Row], width: int = 100) -> str:
    """The same table for a terminal, * at the best.

    The stds are left out where they do not fit into `width` characters; columns that still do not fit go
    into further blocks below, each with the line labels.
    """
    table = _table(rows)
    if not table.scores:
        return "No results.\n"
    labels = [score.label for score in table.scores]
    margin = max(map(len, labels))

    def drawn(spread: bool) -> list[list[str]]:  # one list of equally wide cells per variant, its name on top
        grid = []
        for variant in table.variants:
            cells = [f"{variant} "]
            for score in table.scores:
                star = "*" if score.ranks.get(variant) == 0 else " "
                cells.append(score.text(variant) + (score.spread(variant, "±") if spread else "") + star)
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


def client_table(rows: Sequence[Row]) -> list[str]:
    """Markdown of the first variant's scores by client, where clients have names; nothing where they have none.

    Of more than `MOST_CLIENTS`, a line says where their scores are.
    """
    clients = [client for client in dict.fromkeys(row["client"] for row in rows) if isinstance(client, str)]
    if not clients:
        return []
    if len(clients) > MOST_CLIENTS:
        return [f"Scores of each of the {len(clients):,} clients are in results.json.\n"]
    variant = rows[0]["variant"]
    mine = [row for row in rows if row["variant"] == variant]
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in mine))
    found = {(str(row["client"]), row["task"], row["metric"]): row["value"] for row in mine}

    def cell(key: tuple[str, str, str], digits: int) -> str:
        value = found.get(key)
        return "" if key not in found else DIVERGED if value is None else f"{value:.{digits}f}"

    lines = [f"| {variant} by client |", "|---|"]
    for task, name in columns:
        metric = find_metric(name)
        lines[0] += f" {task} {metric.heading} |"
        lines[1] += "---|"
    for client in clients:
        cells = [cell((client, task, name), find_metric(name).digits) for task, name in columns]
        shown = " ".join(client.replace("|", "\\|").split())
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def ranking(printed: Mapping[str, float], *, higher_is_better: bool) -> dict[str, int]:
    """Name -> place, 0 for the best; equal values share theirs."""
    order = sorted(set(printed.values()), reverse=higher_is_better)
    return {name: order.index(value) for name, value in printed.items()}


def marked(text: str, rank: int | None) -> str:
    """The best bold, the second underlined."""
    return f"**{text}**" if rank == 0 else f"<u>{text}</u>" if rank == 1 else text


# --- the table behind both drawings ------------------------------------------------------------------------------


class _Score:
    """A line: one task's metric, or one average: values by variant, (mean, std or None) or None where diverged."""

    def __init__(self, name: str, metric: Metric, values: Mapping[str, tuple[float, float | None] | None]):
        self.label = f"{name} {metric.heading}"
        self.values = values
        self.digits = metric.digits
        printed = {variant: float(self.text(variant)) for variant, value in values.items() if value is not None}
        # One lone variant is best of nothing.
        self.ranks = ranking(printed, higher_is_better=metric.higher_is_better) if len(values) > 1 else {}

    def text(self, variant: str) -> str:
        if variant not in self.values:
            return ""
        value = self.values[variant]
        return DIVERGED if value is None else f"{value[0]:.{self.digits}f}"

    def spread(self, variant: str, sign: str) -> str:
        value = self.values.get(variant)
        return "" if value is None or value[1] is None else f"{sign}{value[1]:.{self.digits}f}"


class _Table(NamedTuple):
    scores: list[_Score]
    variants: list[str]


def _table(rows: Sequence[Row]) -> _Table:
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    seen = dict.fromkeys(row["task"] for row in rows)
    tasks = [task for task in TASKS if task in seen] + [task for task in seen if task not in TASKS]
    summaries = {(s["variant"], s["task"], s["metric"]): s for s in summarise(rows)}
    scored = dict.fromkeys(metric for _, _, metric in summaries)
    names = [name for name in METRICS if name in scored] + [name for name in scored if name not in METRICS]
    shown = {task: [name for name in names if any((v, task, name) in summaries for v in variants)] for task in tasks}
    scores = []
    for task in tasks:
        for name in shown[task]:
            found = {v: summaries[v, task, name] for v in variants if (v, task, name) in summaries}
            values = {v: None if s["mean"] is None else (s["mean"], s["std"]) for v, s in found.items()}
            scores.append(_Score(task, find_metric(name), values))
    for kind, heading in AVERAGES.items():
        for name in names:
            of_kind = [t for t in tasks if t in TASKS and TASKS[t].kind == kind and name in shown[t]]
            if len(of_kind) > 1:
                whole = [v for v in variants if all((v, task, name) in summaries for task in of_kind)]
                values = {v: _average([summaries[v, task, name] for task in of_kind]) for v in whole}
                scores.append(_Score(heading, find_metric(name), values))
    return _Table(scores, variants)


def _average(found: Sequence[Summary]) -> tuple[float, None] | None:
    """The client-weighted mean of task means; None where one diverged."""
    if any(summary["mean"] is None for summary in found):
        return None
    return float(np.average([s["mean"] for s in found], weights=[s["clients"] for s in found])), None
