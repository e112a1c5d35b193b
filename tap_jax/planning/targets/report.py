"""The text of `tap-jax describe --target`: a line per program, what does not fit, estimated hours."""

from collections.abc import Sequence

from tap_jax.planning.columns import columns
from tap_jax.planning.targets import hlo, roofline
from tap_jax.planning.targets.compile import Built, Found, gib

LOWER = "lower engine.microbatch, engine.clients_at_once, or set engine.remat"
_HEAD = (
    "program",
    "fits",
    "peak",
    "arguments",
    "temporaries",
    "host",
    "TFLOP",
    "useful",
    "GB",
    "in loops",
    "outside",
    "to host",
    "compiled in",
    "row loops",
    "at the peak",
)


def report(built: Built, found: Sequence[Found]) -> str:
    """All of it.

    Args:
      built: of the run. found: of its programs.
    """
    lines = [*built.about, "", *columns([_HEAD, *(_row(built, one) for one in found)]), ""]
    lines += [
        "Memory in GiB on one device (host: of the compiler's process). TFLOP of one call on all devices, by the plans",
        f"of {roofline.PLANS} rounds; useful: the share of real samples and tokens. GB as the compiler counts them,",
        "each loop's body once. Collectives in loops and outside. At the peak: seconds of a call or more.",
        f"compiled in {sum(one.seconds for one in found):,.0f} s together"
        f" ({sum(one.processor for one in found):,.0f} CPU seconds);"
        f" {sum(one.bodies for one in found)} row loops in {len(found)} programs",
    ]
    lines += problems(built, found)
    if hours := estimate(built):
        lines.append(hours)
    return "\n".join(lines) + "\n"


def problems(built: Built, found: Sequence[Found]) -> list[str]:
    """One line for each program that does not fit, or of which nothing is known."""
    lines = []
    memory = built.platform.memory
    for one in found:
        if one.fits(built.platform) is False:
            lines.append(f"does not fit: {one.name} wants {gib(one.peak)} of {gib(memory)} GiB; {LOWER}")
        elif one.problem:
            lines.append(f"not compiled: {one.name}: {one.problem}")
    return lines


def estimate(built: Built) -> str:
    """The schedule's hours, labelled as an estimate; empty where nothing is known of its work."""
    total = 0.0
    for phase, calls in built.calls.items():
        work = built.work.get(phase)
        time = roofline.seconds(work, None, built.platform, built.devices)
        if time is None:
            return ""
        total += time * calls
    return (
        f"estimate, not measured: {total / 3600:.3g} hours of training at the devices' peak,"
        f" {total / 3600 / roofline.ACHIEVED:.3g} at {roofline.ACHIEVED:.0%} of it (plans of some rounds;"
        " evaluation and what the host does are not in it)"
    )


def _row(built: Built, one: Found) -> tuple[str, ...]:
    work = built.work.get(one.phase)
    time = roofline.seconds(work, one.accessed, built.platform, built.devices)
    fits = {True: "yes", False: "no", None: "?"}[one.fits(built.platform)]
    known = not one.problem

    def if_known(text: str) -> str:
        return text if known else "-"

    return (
        one.name,
        fits,
        gib(one.peak) if one.peak else "-",
        if_known(gib(one.arguments)),
        if_known(gib(one.temporaries)),
        gib(one.host) if one.host else "-",
        f"{work.computed / 1e12:,.4g}" if work else "-",
        f"{work.useful / work.computed:.2f}" if work and work.useful is not None else "-",
        f"{one.accessed / 1e9:,.3g}" if one.accessed else "-",
        if_known(hlo.short(one.inside)),
        if_known(hlo.short(one.outside)),
        if_known(str(one.transfers)),
        f"{one.seconds:,.0f} s" + (f" ({one.processor:,.0f} CPU s)" if one.processor else ""),
        if_known(str(one.loops)),
        "-" if time is None else f"{time:,.3g} s",
    )


def markdown(name: str, built: Built, found: Sequence[Found]) -> list[str]:
    """Rows of the table program x target in launch/benchmarks.md."""
    rows = []
    for one in found:
        row = _row(built, one)
        peak = f"{row[2]} of {gib(built.platform.memory)}" if built.platform.memory else row[2]
        status = one.problem if one.problem and one.problem != "refused" else row[1]
        cells = (name, one.name, status, peak, *row[5:7], row[9], row[10], row[12], row[13], row[14])
        rows.append("| " + " | ".join(cells) + " |")
    return rows
