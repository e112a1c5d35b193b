"""Figures of what happened over the rounds: replacements (Figures 3 and 4) and losses."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tap_jax.evaluation.drawing import BLACK, MARGIN_STYLES, MODEL_COLOURS, grid, new_figure, task_style
from tap_jax.evaluation.finished import FinishedRun
from tap_jax.evaluation.layouts import MODELS, TASK_LABELS
from tap_jax.evaluation.selection import Comparison
from tap_jax.tasks import TASKS

OWN = "tap"  # the variant with the run's own margins


def cumulative(events: Iterable[Mapping], task: str, rounds: int) -> np.ndarray:
    """int [rounds], replacements of a task up to and including each round, over all clients."""
    counts = np.zeros(rounds, int)
    for event in events:
        if event["task"] == task and event["round"] < rounds:
            counts[event["round"]] += 1
    return counts.cumsum()


def replacements(comparisons: Sequence[Comparison]) -> Figure | None:
    """Figure 3: cumulative replacements per task over the rounds, a panel per model; None where no TAP run is.

    A line is the mean over seeds; with several, a band spans the least and the most.
    """
    shown = [comparison for comparison in comparisons if any(events for _, events in comparison.events(OWN))]
    if not shown:
        return None
    figure, axes = new_figure(1, len(shown), width=5.6 * len(shown) + 0.4, height=4.2)
    for axis, comparison in zip(axes.flat, shown, strict=True):
        ends = {}
        for task in _tasks(comparison):
            curves = _curves(comparison, OWN, task)
            x, style = 1 + np.arange(curves.shape[1]), task_style(task)
            (line,) = axis.plot(x, curves.mean(0), drawstyle="steps-post", linewidth=1.8, **style)
            if len(curves) > 1:
                axis.fill_between(
                    x, curves.min(0), curves.max(0), step="post", color=style["color"], alpha=0.15, linewidth=0
                )
            ends[task] = (float(curves[:, -1].mean()), line)
        ordered = sorted(ends, key=lambda task: -ends[task][0])
        axis.legend(
            [ends[task][1] for task in ordered],
            [f"{TASK_LABELS.get(task, task)}  ({ends[task][0]:g})" for task in ordered],
            title="task (total)",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
        axis.set_title(f"{MODELS[comparison.model]}{_seeds(comparison, OWN)}")
        axis.set_xlabel("communication round")
        axis.set_ylabel("cumulative replacements")
        _counts(axis)
    return figure


def margins(comparison: Comparison) -> Figure | None:
    """Figure 4: cumulative replacements per task, a line per margin setting; None with fewer than two settings."""
    names = {
        event["variant"]: None
        for run in comparison.runs
        for event in run.replacements
        if event["variant"].startswith(OWN)
    }
    further = (name for _, name in comparison.chosen if name.startswith(f"{OWN}@"))
    known = dict.fromkeys([OWN, *_sorted(names), *_sorted(further)])
    settings = [name for name in known if comparison.events(name)]
    if len(settings) < 2:
        return None
    own = comparison.events(OWN)
    labels = {name: " / ".join(f"{margin:g}" for margin in _margins_in(name)) + _others_in(name) for name in settings}
    if own:
        numbers = sorted(set(own[0][0].margins.values()))
        labels[OWN] = f"{' / '.join(f'{margin:g}' for margin in numbers)} (the run's own)"
    tasks = _tasks(comparison)
    figure, axes = grid(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for number, name in enumerate(settings):
            curve = _curves(comparison, name, task).mean(0)
            axis.plot(
                1 + np.arange(len(curve)),
                curve,
                drawstyle="steps-post",
                linewidth=max(1.2, 2.8 - 0.55 * number),  # lines that coincide stay visible
                label=labels[name],
                **MARGIN_STYLES[number % len(MARGIN_STYLES)],
            )
        axis.set_title(TASK_LABELS.get(task, task))
        _counts(axis)
    figure.supxlabel("communication round")
    figure.supylabel("cumulative replacements")
    _shared_legend(figure, axes[0], f"margins, {MODELS[comparison.model]}{_seeds(comparison, OWN)}")
    return figure


def losses(runs: Sequence[FinishedRun]) -> Figure | None:
    """Training loss per task over the rounds, a line per model; None where the runs left no metrics.

    Dots are the mean over the clients of a round (and seeds); the line is a mean over the rounds around, as its label
    says.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {}  # task -> model -> round -> losses
    for run in runs:
        for line in run.lines():
            for model, clients in line.get("losses", {}).items():
                for tasks in clients.values():
                    for task, value in tasks.items():
                        if value is not None:
                            found.setdefault(task, {}).setdefault(model, {}).setdefault(line["round"], []).append(value)
    if not found:
        return None
    tasks = [task for task in TASKS if task in found] + [task for task in found if task not in TASKS]
    rounds = max(run.config.rounds for run in runs)
    reach = max(1, rounds // 25)
    figure, axes = grid(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for model in sorted(found[task], key=[*MODEL_COLOURS, *found[task]].index):
            at = sorted(found[task][model])
            values = np.array([np.mean(found[task][model][number]) for number in at])
            colour = MODEL_COLOURS.get(model, BLACK)
            axis.plot(1 + np.array(at), values, ".", color=colour, markersize=3, alpha=0.35)
            axis.plot(1 + np.array(at), running_mean(at, values, reach), color=colour, linewidth=1.8, label=model)
        axis.set_title(TASK_LABELS.get(task, task))
        axis.set_xlim(0.5, rounds + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        unit = "MSE" if task in TASKS and TASKS[task].kind == "image_generation" else "nats"
        axis.set_ylabel(f"loss ({unit})")
    figure.supxlabel("communication round")
    config = runs[0].config
    standard = ", standard backbone" if config.model.backbone == "standard" else ""
    title = f"{MODELS[config.model.name]}, method {config.method}{standard}"
    _shared_legend(
        figure, axes[0], f"{title}; dots: mean of a round, lines: mean over ±{reach} round{'s' * (reach > 1)}"
    )
    return figure


def running_mean(rounds: Sequence[int], values: np.ndarray, reach: int) -> np.ndarray:
    """Per round the mean of the values of all rounds at most `reach` away."""
    at = np.asarray(rounds)
    return np.array([values[np.abs(at - centre) <= reach].mean() for centre in at])


def _curves(comparison: Comparison, name: str, task: str) -> np.ndarray:
    """[seeds, rounds]."""
    found = comparison.events(name)
    rounds = max(run.config.rounds for run, _ in found)
    return np.stack([cumulative(events, task, rounds) for _, events in found])


def _tasks(comparison: Comparison) -> list[str]:
    owners = comparison.owners()
    return [task for task in TASKS if task in owners] + [task for task in owners if task not in TASKS]


def _sorted(names: Iterable[str]) -> list[str]:
    """By their margins, ascending."""
    return sorted(names, key=_margins_in)


def _margins_in(name: str) -> list[float]:
    """tap@0.01-0.04 (replacement.scope=exclusive) -> 0.01, 0.04; none in a name without @."""
    label = name.partition(" ")[0].partition("@")[2]
    return [float(number) for number in re.split(r"(?<!e)-", label) if number]


def _others_in(name: str) -> str:
    """What stands behind the margins in such a name, with the space before it."""
    return name[len(name.partition(" ")[0]) :]


def _seeds(comparison: Comparison, name: str) -> str:
    count = len(comparison.events(name))
    return f" (mean of {count} seeds)" if count > 1 else ""


def _counts(axis: Axes) -> None:
    """Whole numbers from 0 on, rounds from 1 on."""
    axis.set_xlim(left=1)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))


def _shared_legend(figure: Figure, axis: Axes, title: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), title=title, frameon=False)
