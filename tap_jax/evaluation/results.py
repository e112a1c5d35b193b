"""What a run leaves: `results.json`, `report.md` and the same as `report.html`, each whole or not at all."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tap_jax.evaluation.page import html_page
from tap_jax.evaluation.scores import Row, finite
from tap_jax.evaluation.tables import client_table, markdown_table
from tap_jax.whole_files import write_file


def write_results(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    rows: Sequence[Row],
    replacements: Sequence[Mapping[str, Any]],
    timing: Mapping[str, Any],
    *,
    screening: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    config_hash: str = "",
    versions: Mapping[str, str] | None = None,
) -> None:
    """Writes `results.json`, `report.md` and `report.html` into the folder `workdir`, each whole or not at all.

    Args:
      workdir: made if it is not there.
      config: nested, of plain values.
      rows: scores; a non-finite value is written as null, which reads as diverged.
      replacements: {"round", "client", "task", "variant"} of each Stage-1 replacement; without a variant, of TAP.
      timing: what took how long, by name.
      screening: {"updates", "dropped", "clients": client -> why -> count}, of clients' updates; None: none were sent.
      privacy: {"epsilon", "delta", "covers", ...}; None: the run was not private.
      notes: lines for the report, such as `TextScorer.notes`.
      config_hash: of `tap_jax.config`; left out where empty, as are the versions.
      versions: of Python and the libraries that made the numbers.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [Row({**row, "value": float(row["value"] or 0) if finite(row["value"]) else None}) for row in rows]
    origin: dict[str, Any] = {"config_hash": config_hash} if config_hash else {}
    origin |= {"versions": versions} if versions else {}
    results = {"config": config, **origin, "results": rows, "replacements": list(replacements), "timing": timing}
    results |= {name: found for name, found in (("screening", screening), ("privacy", privacy)) if found}
    write_file(folder / "results.json", json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    report = _report(_plain(results), rows, notes, name=os.path.basename(os.path.abspath(folder)))
    write_file(folder / "report.md", report)
    write_file(folder / "report.html", html_page(report))


def _plain(value: Any) -> Any:
    """What strict JSON can hold: numpy becomes Python, infinities and NaN become strings, the unknown its str."""
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _report(results: Mapping[str, Any], rows: Sequence[Row], notes: Sequence[str], *, name: str) -> str:
    """The report in markdown; `name` is the folder's, which tells reports apart that are open side by side."""
    config, replacements, timing = results["config"], results["replacements"], results["timing"]
    model = config.get("model")
    about = {"method": config.get("method"), "model": model.get("name") if isinstance(model, Mapping) else model}
    title = ", ".join(f"{key} {value}" for key, value in about.items() if value)
    parts = [f"# `{' '.join(name.split())}`{': ' * bool(title)}{title}\n"]
    settings = ", ".join(f"{key} {config[key]}" for key in ("rounds", "seed") if key in config)
    parts += [f"{settings}\n"] if settings else []
    parts.append(markdown_table(rows))
    parts.append(
        "Mean ± standard deviation (population) over clients. **Best**, <u>second</u>; — diverged (the model holds"
        " values that are no numbers, or no update of any client was one); blank: not run. Averages weigh each task by"
        " its clients.\n"
    )
    parts.extend(f"Note: {note}\n" for note in notes)
    parts.extend(client_table(rows))
    if replacements:
        tasks = [entry["task"] for entry in replacements if entry.get("variant", "tap") == "tap"]
        counts = ", ".join(f"{task} {tasks.count(task)}" for task in dict.fromkeys(tasks))
        parts.append(f"Replacements of personal parameters: {len(tasks)} ({counts}).\n")
    if dropped := results.get("screening", {}).get("dropped"):
        found = results["screening"]
        whose = [f"client {k}: {n} x {why}" for k, whys in found["clients"].items() for why, n in whys.items()]
        parts.append(f"Updates dropped before aggregation: {dropped} of {found['updates']} ({', '.join(whose)}).\n")
    if privacy := results.get("privacy"):
        parts.append(
            f"Privacy: ε = {privacy['epsilon']:.4g} at δ = {privacy['delta']:g}, {privacy['neighbours']}, for"
            f" {privacy['covers']}; not for what clients keep (personal models, losses, these scores of them).\n"
        )
    if timing:
        parts.append("Timing: " + ", ".join(_measured(name, value) for name, value in timing.items()) + ".\n")
    return "\n".join(parts)


# Of `timing`: its words, unit, and how many of its own make one of that.
_MEASURES = {
    "build_seconds": ("building", "s", 1),
    "rounds_seconds": ("rounds", "s", 1),
    "post_and_evaluation_seconds": ("Stage 2, post-training and scoring", "s", 1),
    "total_seconds": ("in all", "s", 1),
    "stage2_seconds_per_client": ("Stage 2 of a client", "s", 1),
    "peak_host_bytes": ("peak memory of the host", "GB", 1e9),
    "peak_device_bytes": ("peak memory of a device", "GB", 1e9),
}


def _measured(name: str, value: Any) -> str:
    """An entry of `timing` in words and with its unit, to four digits."""
    if name not in _MEASURES or isinstance(value, str):
        return f"{name} {value}"
    words, unit, size = _MEASURES[name]
    return f"{words} {value / size:,.4g} {unit}"
