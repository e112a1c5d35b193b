"""Who gains from TAP: a map of clients and tasks."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tap_jax.evaluation.drawing import new_figure, task_style
from tap_jax.evaluation.layouts import MODELS, TASK_LABELS
from tap_jax.evaluation.scores import find_metric
from tap_jax.evaluation.selection import Comparison
from tap_jax.tasks import TASKS

BASELINE = "fedavg+post"
_LIMIT = 50  # % of gain at which colours end at the latest
_MOST = 60  # clients that a map has room for


def client_scores(comparison: Comparison, variant: str) -> dict[tuple[int | str, str], tuple[str, float]]:
    """(client, task) -> (main metric, mean over seeds), without those that diverged.

    The main metric is accuracy, MSE, and for generated text the last one scored (METEOR of the paper's two).
    """
    values: dict[tuple[int | str, str], dict[str, list[float | None]]] = {}
    for row in comparison.rows(("routed", variant)):
        values.setdefault((row["client"], row["task"]), {}).setdefault(row["metric"], []).append(row["value"])
    found = {}
    for key, metrics in values.items():
        metric, scores = list(metrics.items())[-1]
        numbers = [score for score in scores if score is not None]
        if len(numbers) == len(scores):
            found[key] = (metric, float(np.mean(numbers)))
    return found


def gains(comparison: Comparison) -> dict[tuple[int | str, str], tuple[str, float, float]]:
    """(client, task) -> (metric, TAP's score, its gain over FedAvg + Post-train in % of the latter)."""
    ours, theirs = client_scores(comparison, "tap"), client_scores(comparison, BASELINE)
    found = {}
    for key, (metric, mine) in ours.items():  # in the order of the rows, which is also that of the drawing
        other, base = theirs.get(key, ("", 0.0))
        if metric == other and base:
            sign = 1 if find_metric(metric).higher_is_better else -1
            found[key] = (metric, mine, 100 * sign * (mine - base) / abs(base))
    return found


def gain_map(comparison: Comparison) -> Figure | None:
    """Clients x tasks: the score of TAP, coloured by its gain over FedAvg + Post-train; None where either lacks.

    Of more clients than a map has room for, how the gains are spread over each task's clients.
    """
    found = gains(comparison)
    if not found:
        return None
    tasks = [task for task in TASKS if any(name == task for _, name in found)]
    tasks += sorted({name for _, name in found} - set(tasks))
    clients = sorted({client for client, _ in found})
    if len(clients) > _MOST:
        return _spread(
            {task: [gain for (_, t), (_, _, gain) in found.items() if t == task] for task in tasks}, comparison
        )
    table = np.full((len(tasks), len(clients)), np.nan)
    for (client, task), (_, _, gain) in found.items():
        table[tasks.index(task), clients.index(client)] = gain
    width = 0.42 * len(clients) + 3.2
    figure, axes = new_figure(1, 1, width=max(width, 6), height=0.42 * len(tasks) + 1.7)
    axis = axes[0, 0]
    axis.grid(False)
    axis.set_facecolor("#F4F4F4")
    most = max(abs(gain) for _, _, gain in found.values())
    limit = min(_LIMIT, max(1, most))
    image = axis.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (client, task), (metric, score, gain) in found.items():
        corner = clients.index(client) - 0.5, tasks.index(task) - 0.5
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#8C8C8C", linewidth=0.6))
        axis.text(
            clients.index(client),
            tasks.index(task),
            _short(metric, score),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if abs(gain) > 0.7 * limit else "black",
        )
    metrics = {task: metric for (_, task), (metric, _, _) in found.items()}
    labels = [f"{TASK_LABELS.get(task, task)}, {find_metric(metrics[task]).heading}" for task in tasks]
    axis.set_yticks(range(len(tasks)), labels)
    axis.set_xticks(range(len(clients)), [str(client) for client in clients], fontsize=7)
    axis.set_xlabel("client")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    bar = figure.colorbar(image, ax=axis, extend="both" if most > limit else "neither", pad=0.01, aspect=14)
    bar.set_label("gain of TAP over\nFedAvg + Post-train (%)")
    bar.outline.set_visible(False)
    figure.suptitle(f"{MODELS[comparison.model]}: scores of TAP; colour: their gain; grey: not the client's task")
    return figure


def _spread(gains: Mapping[str, Sequence[float]], comparison: Comparison) -> Figure:
    """Per task, the part of its clients with at most so much gain."""
    figure, axes = new_figure(1, 1, width=7, height=3.4)
    axis = axes[0, 0]
    for task, found in gains.items():
        axis.step(
            np.sort(found),
            100 * np.arange(1, len(found) + 1) / len(found),
            where="post",
            label=f"{TASK_LABELS.get(task, task)} ({len(found)})",
            **task_style(task),
        )
    axis.axvline(0, color="#8C8C8C", linewidth=0.8)
    axis.set_xlabel("gain of TAP over FedAvg + Post-train (%)")
    axis.set_ylabel("clients with at most this gain (%)")
    axis.legend(title="task (clients)", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(MODELS[comparison.model])
    return figure


def _short(metric: str, score: float) -> str:
    return f"{score:.3f}".lstrip("0") if find_metric(metric).digits > 2 else f"{score:.1f}"
