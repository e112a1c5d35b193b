"""How all figures look: matplotlib without a display, the palette of Okabe and Ito, one colour per task and model."""

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tap_jax.tasks import TASKS

# Okabe & Ito, "Color universal design" (2008); grey in place of its yellow, which is faint on white.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C",
)  # fmt: skip
MODEL_COLOURS = {"federated": BLUE, "personal": VERMILION, "local": GREY}
MARGIN_STYLES = [
    {"color": color, "linestyle": style}
    for color, style in zip(
        (BLACK, ORANGE, BLUE, PURPLE, GREEN, VERMILION, SKY), ("-", "-", "--", "-.", ":", "--", "-."), strict=True
    )
]
_TASK_COLOURS = (ORANGE, SKY, GREEN, PURPLE, BLUE, VERMILION, BLACK, GREY)
_DASHES = {  # a second sign beside the colour
    "image_classification": "-",
    "image_generation": "--",
    "text_classification": "-",
    "text_generation": "-.",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def style() -> AbstractContextManager[None]:
    """The context in which figures are drawn: matplotlib's settings are `STYLE` within it."""
    return rc_context(STYLE)


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches and its axes [rows, columns]; no global state, no window."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def grid(count: int) -> tuple[Figure, list]:
    """A figure with `count` panels of 2.9 x 2.3 inches: three in a row, four where there are more than six."""
    columns = min(count, 4 if count > 6 else 3)
    rows = -(-count // columns)
    figure, axes = new_figure(rows, columns, width=2.9 * columns + 0.4, height=2.3 * rows + 0.9)
    for spare in axes.flat[count:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:count])


def task_style(task: str) -> dict:
    """Colour and dashes of a task's lines, the same in every figure."""
    names = list(TASKS)
    place = names.index(task) if task in names else len(names)
    kind = TASKS[task].kind if task in TASKS else "text_generation"
    return {"color": _TASK_COLOURS[place % len(_TASK_COLOURS)], "linestyle": _DASHES[kind]}


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def pictures(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Figure:
    """Rows of pictures with a label each.

    Args:
      rows: (label, N times uint8 [H, W, 3]).
    """
    most = max(len(images) for _, images in rows)
    figure, axes = new_figure(len(rows), most, width=1.1 * most + 1.6, height=1.13 * len(rows) + 0.4)
    for (label, images), line in zip(rows, axes, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
        for axis in line:
            axis.set_axis_off()
        line[0].text(
            -0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9, linespacing=1.3
        )
    return figure
