"""`tap-jax report`: the paper's tables and figures from whatever finished runs are there."""

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tap_jax.errors import UserError
from tap_jax.evaluation import appendix_tables, paper_tables
from tap_jax.evaluation.appendix_tables import Grid, Parameters
from tap_jax.evaluation.finished import FinishedRun, read_runs
from tap_jax.evaluation.illustrations import illustrations, text_samples
from tap_jax.evaluation.layouts import LAYOUTS, MODELS
from tap_jax.evaluation.page import html_page
from tap_jax.evaluation.paper_tables import Table
from tap_jax.evaluation.selection import Comparison, comparisons

MARK = "<!-- made by tap-jax report -->"
_FIELDS, _LONGEST = 3, 40  # in a heading: fields, and characters of each
PARTS = ("figures", "report.html", "report.md", "tables")  # all that a report's folder holds


def write_report(
    folders: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    parameters: Parameters,
    across: Sequence[str] = (),
) -> list[str]:
    """Writes report.md, the same as report.html, tables/*.csv and figures/*.png into the folder `out`, all or nothing.

    Args:
      folders: of finished runs, or folders that contain such.
      out: a new or empty folder, or an earlier report, which is replaced.
      parameters: run -> the numbers of Table 7, from shapes alone.
      across: see `selection.comparisons`.

    Returns:
      The files' paths within `out`.

    Raises:
      UserError: no finished run, one that cannot be read, `out` holds something else, or `across` names no field.
    """
    out = Path(out)
    _check_out(out)
    runs, notes = read_runs(folders)
    files = compose(runs, notes, parameters, across)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.parent / f".{out.name}.{os.getpid()}.{end}" for end in ("tmp", "old"))
    try:
        for name, content in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return sorted(files)


def compose(
    runs: Sequence[FinishedRun], notes: Sequence[str], parameters: Parameters, across: Sequence[str] = ()
) -> dict[str, bytes]:
    """All files of a report, path -> content; nothing is written."""
    found = comparisons(runs, across)
    models = [comparison.model for comparison in found]
    # Two experiments of one model never share a table.
    together = len(set(models)) == len(models)
    order = list(MODELS)
    sections = [sorted(found, key=lambda e: order.index(e.model))] if together else [[one] for one in found]
    files: dict[str, bytes] = {}
    records: dict[str, list[dict]] = {}
    names = ", ".join(MODELS[model] for model in order if model in models)
    text = [MARK, f"# Report: {names}, {len(runs)} run{'s' if len(runs) > 1 else ''}", _LEGEND]
    for number, section in enumerate(sections, 1):
        if not together:
            text += _heading(number, section[0])
        prefix = "" if together else f"experiment{number}_"
        text.append("## Tables")
        tables = _tables(section, parameters)
        for table in tables:
            label = "" if together else str(number)
            records.setdefault(_slug(table.name), []).extend(_records(table, label))
            text += [] if _is_empty(table) else _table_text(table)
        text += _not_run([table.name for table in tables if _is_empty(table)])
        text += _absent(section)
        drawn = illustrations(section, prefix)
        if drawn:
            text.append("## Figures")
        for picture in drawn:
            path = f"figures/{picture.name}.png"
            files[path] = picture.png
            text += [f"![{picture.caption}]({path})", f"*{picture.caption}.* {_runs(picture.runs)}"]
        for title, body, run in text_samples(section):
            text += [f"## {title}", body, _runs([run])]
    for comparison in found:
        notes = [*notes, *comparison.notes, *_mixed(comparison)]
    text += _sources(runs, notes)
    files |= {f"tables/{name}.csv": _csv(rows) for name, rows in records.items()}
    files["tables/runs.csv"] = _csv([_source(run) for run in runs])
    markdown = "\n\n".join(part.strip() for part in text) + "\n"
    files |= {"report.md": markdown.encode(), "report.html": html_page(markdown, files).encode()}
    return files


_LEGEND = (
    "Scores are mean ± standard deviation (population) over clients and seeds; averages (Avg.) weigh each task by the"
    " clients that own it. **Best**, <u>second</u> of a model; — diverged; `not run`: no run at hand has it. Tables and"
    " figures are numbered as in the paper; every one names its runs, which are listed under Sources. The CSV files"
    " hold the unrounded numbers."
)


def _tables(section: Sequence[Comparison], parameters: Parameters) -> list[Table | Grid]:
    """In the paper's order, then what it does not have."""
    further = appendix_tables.costs(section, parameters), appendix_tables.significance(section)
    ordered: list[Table | Grid] = [*paper_tables.paper_tables(section), *further]
    ordered.sort(key=lambda table: int(table.name.removeprefix("Table ")))
    others = map(paper_tables.further_table, section)
    return ordered + [table for table in others if table is not None]


def _heading(number: int, comparison: Comparison) -> list[str]:
    """What sets an experiment apart: in the heading as far as it fits, and below in full."""
    fields = comparison.differing
    short = [field if len(field) <= _LONGEST else field.partition("=")[0] for field in fields[:_FIELDS]]
    left = len(fields) - _FIELDS
    more = f" and {left} other field{'s' * (left > 1)}" if left > 0 else ""
    heading = f"# Experiment {number}: {MODELS[comparison.model]} with {', '.join(short)}{more}"
    whole = short == list(fields)
    return [heading, *([] if whole else [f"All that differs: `{'`, `'.join(fields)}`."])]


def _table_text(table: Table | Grid) -> list[str]:
    title = f"### {table.name}. {table.caption}"
    file = f"[CSV](tables/{_slug(table.name)}.csv)"
    if isinstance(table, Grid):
        return [title, table.markdown(), f"{table.note} {_runs(table.runs)} {file}"]
    return [title, paper_tables.markdown(table), f"{_seeds(table)} {_runs(table.runs)} {file}"]


def _is_empty(table: Table | Grid) -> bool:
    return not table.runs or (isinstance(table, Table) and table.empty)


def _not_run(names: Sequence[str]) -> list[str]:
    """Tables of which there is nothing to show but TAP's own line, if that."""
    listed = ", ".join(f"[{name}](tables/{_slug(name)}.csv)" for name in names)
    return [f"Not run, but for TAP at most: {listed}."] if names else []


def _seeds(table: Table) -> str:
    """The seeds once where all lines have the same, else of each."""
    ran = [line for line in table.lines if line.seeds]
    if len({line.seeds for line in ran}) == 1:
        return f"Seed{'s' * (len(ran[0].seeds) > 1)} {', '.join(map(str, ran[0].seeds))}."
    several = len({line.model for line in ran}) > 1
    listed = [
        f"{f'{MODELS[line.model]} ' * several}{line.entry.label} {', '.join(map(str, line.seeds))}" for line in ran
    ]
    return f"Seeds differ: {'; '.join(listed)}."


def _runs(ids: Sequence[str]) -> str:
    return f"Runs: {', '.join(sorted(set(ids), key=lambda name: int(name[1:])))}."


def _absent(section: Sequence[Comparison]) -> list[str]:
    """Names the tables of models without a run."""
    here = {comparison.model for comparison in section}
    absent = [layout.number for layout in LAYOUTS if not here.intersection(layout.models)]
    missing = [name for model, name in MODELS.items() if model not in here]
    if not missing:
        return []
    return [f"No run of {' and '.join(missing)} is at hand: Tables {', '.join(map(str, absent))} are not run."]


def _records(table: Table | Grid, label: str) -> list[dict]:
    if isinstance(table, Grid):
        return [{**record, "experiment": label} for record in table.records]
    return paper_tables.csv_rows(table, label)


def _mixed(comparison: Comparison) -> list[str]:
    """Warns where runs that are averaged or compared were made in different ways."""
    notes = []
    for what in ("device", "versions"):
        made: dict[str, list[str]] = {}
        for run in comparison.runs:
            made.setdefault(_source(run)[what], []).append(run.id)
        if len(made) > 1:
            listed = "; ".join(f"{', '.join(ids)}: {value}" for value, ids in made.items())
            notes.append(f"{MODELS[comparison.model]} runs differ in {what} ({listed}).")
    return notes


def _source(run: FinishedRun) -> dict:
    return {
        "run": run.id,
        "folder": str(run.folder),
        "config_hash": run.hash,
        "seed": run.config.seed,
        "method": run.config.method,
        "model": MODELS[run.config.model.name],
        "backbone": run.config.model.backbone,
        "device": run.timing.get("device", "unknown"),
        "seconds": run.timing.get("total_seconds", ""),
        "versions": " ".join(f"{name}={version}" for name, version in run.versions.items()) or "unknown",
    }


def _sources(runs: Sequence[FinishedRun], notes: Sequence[str]) -> list[str]:
    rows = [_source(run) for run in runs]
    shown = [
        {
            **row,
            "config_hash": f"`{row['config_hash'][:12]}`",
            "folder": f"`{row['folder']}`",
            "seconds": f"{float(row['seconds'] or 0):,.0f}",
        }
        for row in rows
    ]
    lines = [" | ".join(name.replace("_", " ") for name in rows[0]), " | ".join(":--" for _ in rows[0])]
    lines += [" | ".join(map(str, row.values())) for row in shown]
    table = "\n".join(f"| {line} |" for line in lines)
    listed = "\n".join(f"- {note}" for note in notes)
    return ["## Sources", table, "Full hashes are in [tables/runs.csv](tables/runs.csv).", *([listed] if notes else [])]


def _csv(rows: Sequence[dict]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def _slug(name: str) -> str:
    """table_01 of Table 1."""
    words = name.lower().split()
    return "_".join(word.zfill(2) if word.isdecimal() else word for word in words)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; name a folder")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if not held:
        return
    report = out / "report.md"
    ours = report.is_file() and report.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    foreign = [name for name in held if name not in PARTS]
    if not ours or foreign:
        raise UserError(f"out: {out} holds {(foreign or held)[0]}, which is no report's; name a new or empty folder")
