"""Finished runs, read from their folders."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tap_jax import config as configuration
from tap_jax.config import ConfigDict
from tap_jax.engine.rounds import read_lines
from tap_jax.errors import UserError
from tap_jax.evaluation.scores import Row

_ROW = {"variant", "client", "task", "metric", "value"}
_EVENT = {"round", "client", "task"}


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """One finished run.

    Attributes:
      id: short name within a report, "r1", "r2", ... in the order given.
      folder: where it was found.
      config: as the run had it; fields that it lacks have their defaults.
      margins: the run's own, per task kind; further ones in the config make further variants.
      hash: the config's (`tap_jax.config.config_hash`).
      rows: scores.
      replacements: {"round", "client", "task", "variant"} of each Stage-1 replacement.
      timing, versions: as in results.json; empty where it has none.
    """

    id: str
    folder: Path
    config: ConfigDict
    margins: Mapping[str, float]
    hash: str
    rows: tuple[Row, ...]
    replacements: tuple[Mapping[str, Any], ...]
    timing: Mapping[str, Any]
    versions: Mapping[str, str]

    def lines(self) -> list[dict]:
        """metrics.jsonl, a line per round; empty where it is gone."""
        return read_lines(self.folder / "metrics.jsonl")


def read_runs(folders: Sequence[str | os.PathLike]) -> tuple[list[FinishedRun], list[str]]:
    """Reads finished runs.

    Args:
      folders: of runs, or folders that contain such; one that is found twice is read once.

    Returns:
      The runs in the order given (within a folder by name), and a note on each run that was passed over.

    Raises:
      UserError: a folder that is no run and contains none, or a run that has not finished or cannot be read.
    """
    found: dict[Path, Path] = {}  # by what they really are
    notes = []
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"report: no folder {folder}; name the folders of finished runs")
        if _is_run(folder):
            if not (folder / "results.json").is_file():
                raise UserError(f"report: the run in {folder} has not finished; call train again or leave it out")
            found.setdefault(folder.resolve(), folder)
            continue
        inside = sorted((path for path in folder.iterdir() if path.is_dir() and _is_run(path)), key=_natural)
        done = [path for path in inside if (path / "results.json").is_file()]
        if not done:
            raise UserError(f"report: no finished run in {folder}; name the folder of one, or train one first")
        for path in done:
            found.setdefault(path.resolve(), path)
        notes += [f"{path} has not finished and is left out." for path in inside if path not in done]
    return [_read(f"r{number}", folder) for number, folder in enumerate(found.values(), 1)], notes


def _is_run(folder: Path) -> bool:
    return (folder / "results.json").is_file() or (folder / "config.json").is_file()


def _natural(path: Path) -> list:
    """Sorts seed9 before seed10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read(id_: str, folder: Path) -> FinishedRun:
    path = folder / "results.json"

    def broken(what: str) -> UserError:
        remedy = "call train again, which makes it anew, or leave the run out"
        return UserError(f"report: {path} is broken ({what}); {remedy}")

    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise broken(str(error)) from None
    if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
        raise broken("no config")
    rows, replacements = stored.get("results"), stored.get("replacements") or []
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and row.keys() >= _ROW for row in rows):
        raise broken("no list of scores under results")
    if any(not isinstance(row["value"], int | float | None) for row in rows):
        raise broken("a score that is no number")
    if not isinstance(replacements, list) or not all(
        isinstance(event, dict) and event.keys() >= _EVENT for event in replacements
    ):
        raise broken("replacements")
    try:
        config = configuration.from_json(json.dumps(stored["config"]))
        margins = configuration.margins_of(config)[""]
        hash_ = stored.get("config_hash") or configuration.config_hash(config)
    except UserError as error:
        raise UserError(
            f"report: {folder} has a task or field that this tap_jax does not know ({error}); name the file that "
            "registers the task with --register, or leave the run out"
        ) from None
    return FinishedRun(
        id=id_,
        folder=folder,
        config=config,
        margins=margins,
        hash=hash_,
        rows=tuple(rows),
        replacements=tuple({"variant": "tap", **event} for event in replacements),
        timing=stored.get("timing") or {},
        versions=stored.get("versions") or {},
    )
