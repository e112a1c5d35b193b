"""What the experiment writes: every verdict as CSV, a summary that names each failure's reason, and the figure."""

import csv
import io
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tap_jax.theory.check import EQUATION_1, OF_PROOF, Verdict

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # of Okabe and Ito's palette


def write(folder: pathlib.Path, verdicts: Sequence[Verdict], grown: Sequence[Verdict]) -> list[pathlib.Path]:
    """Writes theory_bound.csv (all verdicts), .md (summary and failures) and .png (`draw`) -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"theory_bound.{suffix}" for suffix in ("csv", "md", "png")]
    files[0].write_text(as_csv([*verdicts, *grown]))
    files[1].write_text(summary(verdicts))
    draw(verdicts, grown).savefig(files[2], dpi=100)
    return files


def as_csv(verdicts: Sequence[Verdict]) -> str:
    """One line per verdict: the setting, both sides of both inequalities, what holds and what is broken."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    setting = ["R", "K_r", "tau", "coupled", "rate", "diminishing", "T", "cohort", "uneven", "by_data", "still"]
    sides = ["measured", "standard_error", "weighted", "start", "drift", "heterogeneity", "noise", "printed", "mended"]
    ends = ["printed_holds", "mended_holds", "printed_broken", "mended_broken"]
    writer.writerow(["objective", *setting, *sides, *ends])
    for v in verdicts:
        s = v.setting
        run = [s.pairs, s.owners, s.local_steps, s.coupled, s.rate, s.diminishing, s.rounds, s.cohort or "all"]
        numbers = [v.measured, v.deviation, v.weighted, *v.printed, sum(v.printed), v.mended]
        broken = ["; ".join(v.printed_broken), "; ".join(v.mended_broken)]
        shown = [f"{x:.6g}" for x in numbers]
        held = [v.printed_holds, v.mended_holds]
        writer.writerow([v.objective, *run, s.uneven, s.by_data, s.still, *shown, *held, *broken])
    return stream.getvalue()


def summary(verdicts: Sequence[Verdict]) -> str:
    """Markdown: how often each bound holds, with and without broken assumptions, and every failure with its reason."""
    lines = ["# Theorem 1 on block quadratics", "", "| bound | assumptions | points | holds | bound / measured |"]
    lines.append("|---|---|---|---|---|")
    for name in ("printed", "mended"):
        for state in ("all kept", "some broken"):
            chosen = [v for v in verdicts if bool(getattr(v, f"{name}_broken")) == (state == "some broken")]
            holding = [v for v in chosen if getattr(v, f"{name}_holds")]
            ratios = sorted(np.divide(*_sides(v, name)[::-1]) for v in holding)
            spread = f"{ratios[0]:.2g} to {ratios[-1]:.2g}, median {np.median(ratios):.2g}" if ratios else "—"
            lines.append(f"| {name} | {state} | {len(chosen)} | {len(holding)} | {spread} |")
    failing = [(name, v) for name in ("printed", "mended") for v in verdicts if not getattr(v, f"{name}_holds")]
    lines += ["", f"## Points on which a bound does not hold: {len(failing)}", ""]
    lines += ["| bound | f | R | K_r | τ | η·48Lτ | blocks | measured | bound | reason |", "|" + "---|" * 10]
    for name, v in failing:
        s, (left, right) = v.setting, _sides(v, name)
        reason = "; ".join(getattr(v, f"{name}_broken")) or "UNEXPLAINED"
        kind = "coupled" if s.coupled else "separable"
        row = [
            name,
            v.objective,
            s.pairs,
            s.owners,
            s.local_steps,
            f"{s.rate:.3g}",
            kind,
            f"{left:.3g}",
            f"{right:.3g}",
        ]
        lines.append("| " + " | ".join(map(str, [*row, reason])) + " |")
    return "\n".join(lines) + "\n"


def draw(verdicts: Sequence[Verdict], grown: Sequence[Verdict]) -> Figure:
    """Measured against bound for every point, then growth with R for both objectives (means over federations)."""
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    against, proof, equation = figure.subplots(1, 3)
    _against(against, verdicts)
    for axes, objective, title in (
        (proof, OF_PROOF, "f = Σ over blocks of the owners' mean\n(what the proof needs)"),
        (equation, EQUATION_1, "f = mean over clients\n(equation 1)"),
    ):
        _growth(axes, [v for v in grown if v.objective == objective], title)
    both = [limit for axes in (proof, equation) for limit in axes.get_ylim()]
    for axes in (proof, equation):
        axes.set_ylim(min(both), 30 * max(both))  # room for the legend
    proof.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def _against(axes: Axes, verdicts: Sequence[Verdict]) -> None:
    low, high = 1e-5, 1e6
    kinds = (
        ("printed", False, BLUE, "o", "Theorem 1, assumptions kept"),
        ("mended", False, GREEN, "s", "mended, assumptions kept"),
        ("printed", True, ORANGE, "x", "Theorem 1, one broken"),
        ("mended", True, GREY, "+", "mended, one broken"),
    )
    for name, is_broken, color, marker, label in kinds:
        chosen = [v for v in verdicts if bool(getattr(v, f"{name}_broken")) == is_broken]
        # What lies outside, divergence and negative right-hand sides above all, is drawn on the rim.
        points = np.clip([_sides(v, name) for v in chosen], low, high)
        axes.plot(*points.T, marker, color=color, markersize=4, fillstyle="none", label=label, clip_on=False)
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.fill_between([low, high], [low, high], low, color="#EEEEEE", linewidth=0)
    axes.text(2e2, 2e0, "bound fails", fontsize=9, color="#555555")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="measured left-hand side", ylabel="right-hand side")
    axes.set_title("Every point of the grid\n(beyond the axes: on the rim)", fontsize=10)
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.03), framealpha=1)


def _growth(axes: Axes, verdicts: Sequence[Verdict], title: str) -> None:
    pairs = sorted({v.setting.pairs for v in verdicts})
    lines: tuple[tuple[Callable[[Verdict], float], str, str, str], ...] = (
        (lambda v: sum(v.printed), BLUE, "o-", "Theorem 1"),
        (lambda v: sum(v.printed[1:]), BLUE, "o:", "its last three terms"),
        (lambda v: v.mended, GREEN, "s-", "mended bound"),
        (lambda v: v.weighted, "black", "^:", "measured, blocks weighted by p_r"),
        (lambda v: v.measured, "black", "^-", "measured, ‖∇f‖²"),
    )
    for value, color, style, label in lines:
        means = [np.mean([value(v) for v in verdicts if v.setting.pairs == r]) for r in pairs]
        axes.plot(pairs, means, style, color=color, markersize=4, fillstyle="none", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [str(r) for r in pairs])
    axes.set(yscale="log", xlabel="modality-task pairs R", ylabel="squared gradient norm")
    axes.set_title(title, fontsize=10)


def _sides(verdict: Verdict, name: str) -> tuple[float, float]:
    """(left-hand side, right-hand side) of the inequality called `name`."""
    if name == "printed":
        return verdict.measured, sum(verdict.printed)
    return verdict.weighted, verdict.mended
