"""Which scores of which runs belong together: runs that may stand in one table, one per variant and seed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tap_jax.config import NEUTRAL_FIELDS, margin_label
from tap_jax.config.fields import flat
from tap_jax.errors import UserError
from tap_jax.evaluation.finished import FinishedRun
from tap_jax.evaluation.scores import Row, Summary, summarise
from tap_jax.registry import METHODS

_SHARED = ("seed", "method", "variants", "model.backbone")  # what runs of one comparison may differ in


def _fields_of_methods() -> dict[str, tuple[str, ...]]:
    """What a method reads besides the fields that all share, by the first of its variants.

    A variant belongs to the method with whose first one its name begins.
    """
    return {entry.default: entry.reads for entry in METHODS.values() if entry.reads}


Key = tuple[str, str]  # (backbone, variant)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs that differ in seed and method only, and may stand in one table.

    Attributes:
      model: "flava" or "vilt".
      differing: the fields that tell it from the others of its model, "rounds=20"; empty where it is the only one.
      runs: in the order given.
      chosen: (backbone, variant) -> the runs whose scores are used, at most one per seed.
      names: (run id, variant in the run) -> variant here, of those used.
      notes: what was left out and why.
    """

    model: str
    differing: tuple[str, ...]
    runs: tuple[FinishedRun, ...]
    chosen: Mapping[Key, tuple[FinishedRun, ...]]
    names: Mapping[tuple[str, str], str]
    notes: tuple[str, ...]

    def rows(self, key: Key) -> list[Row]:
        """Scores of a variant over the seeds; empty where it was not run."""
        return [
            row
            for run in self.chosen.get(key, ())
            for row in run.rows
            if self.names.get((run.id, row["variant"])) == key[1]
        ]

    def summaries(self, key: Key) -> dict[tuple[str, str], Summary]:
        """(task, metric) -> mean and std over clients and seeds."""
        return {(s["task"], s["metric"]): s for s in summarise([{**row, "variant": key[1]} for row in self.rows(key)])}

    def events(self, name: str) -> list[tuple[FinishedRun, list[Mapping[str, Any]]]]:
        """Replacements of a variant, per run of it."""
        found = []
        for run in self.chosen.get(("routed", name), ()):
            found.append((run, [e for e in run.replacements if self.names.get((run.id, e["variant"])) == name]))
        return found

    def owners(self) -> dict[str, int]:
        """Task -> number of clients that own it: the largest of the runs, since a centralised one has one client."""
        owners: dict[str, int] = {}
        for run in self.runs:
            clients: dict[str, set] = {}
            for row in run.rows:
                clients.setdefault(row["task"], set()).add(row["client"])
            owners |= {task: max(len(found), owners.get(task, 0)) for task, found in clients.items()}
        return owners


def comparisons(runs: Sequence[FinishedRun], across: Sequence[str] = ()) -> list[Comparison]:
    """Sorts runs into comparisons by everything in their configs but seed, method and what only a method reads.

    Args:
      across: fields or sections in which runs of one comparison may differ, too, such as learning rates that were
        chosen for each method.

    Raises:
      UserError: a field that no configuration of the runs has.
    """
    known = {field for run in runs for field in flat(run.config)}
    for name in across:
        if not any(_within(field, name) for field in known):
            raise UserError(f"across: no field '{name}' in the runs; use one such as optimizer.learning_rate")
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_identity(run, across), sort_keys=True), []).append(run)
    found = []
    for group in groups.values():
        model = group[0].config.model.name
        rivals = [_identity(other[0], across) for other in groups.values() if other[0].config.model.name == model]
        mine = _identity(group[0], across)
        fields = [field for field in mine if any(rival.get(field) != mine[field] for rival in rivals)]
        found.append(_chosen(model, tuple(f"{field}={_shown(mine[field])}" for field in fields), group))
    return found


def _identity(run: FinishedRun, across: Sequence[str]) -> dict[str, Any]:
    free = (*_SHARED, *across, *(name for names in _fields_of_methods().values() for name in names))
    return {
        field: value
        for field, value in flat(run.config).items()
        if field not in NEUTRAL_FIELDS and not any(_within(field, own) for own in free)
    }


def _chosen(model: str, differing: tuple[str, ...], runs: Sequence[FinishedRun]) -> Comparison:
    """Of runs that yield the same variant with the same seed the one of method TAP, else the first, is used.

    Where runs differ in what only a method reads, most of them have its usual settings; variants of the others carry
    theirs in the name: tap@0.05 for margins, else "tap (replacement.scope=exclusive)".
    """
    ranked = sorted(runs, key=lambda run: run.config.method != "tap")  # stable
    methods = _fields_of_methods()
    usual = {method: _usual([run for run in ranked if _reads(run, method)], method) for method in methods}
    chosen: dict[tuple[str, str, int], FinishedRun] = {}
    names: dict[tuple[str, str], str] = {}
    spare: dict[tuple[str, str], list[str]] = {}
    for run in ranked:
        for variant in dict.fromkeys(row["variant"] for row in run.rows):
            name = variant
            method = next((method for method in methods if variant.startswith(method)), None)
            if method and (other := _differing(run, usual[method], method)):
                name = _renamed(run, variant, other)
            first = chosen.setdefault((run.config.model.backbone, name, run.config.seed), run)
            if first is run:
                names[run.id, variant] = name
            else:
                spare.setdefault((run.id, first.id), []).append(variant)
    merged: dict[Key, tuple[FinishedRun, ...]] = {}
    for backbone, name, _ in chosen:
        mine = [run for (b, n, _), run in chosen.items() if (b, n) == (backbone, name)]
        merged[backbone, name] = tuple(sorted(mine, key=runs.index))
    notes = tuple(
        f"Of {left} these are left out, since {used} has them with the same seed: {', '.join(variants)}."
        for (left, used), variants in spare.items()
    )
    return Comparison(model, differing, tuple(runs), merged, names, notes)


def _reads(run: FinishedRun, method: str) -> bool:
    return any(row["variant"].startswith(method) for row in run.rows)


def _settings(run: FinishedRun, method: str) -> dict[str, Any]:
    """What only this method reads, margins as one value whichever way they were written."""
    found = flat({**run.config, "margins": tuple(sorted(run.margins.items()))})
    return {
        field: found[field] for field in found if any(_within(field, name) for name in _fields_of_methods()[method])
    }


def _usual(runs: Sequence[FinishedRun], method: str) -> dict[str, Any]:
    """The settings of most runs, of equally many the first."""
    found = [_settings(run, method) for run in runs]
    return max(found, key=found.count, default={})


def _renamed(run: FinishedRun, variant: str, differing: Sequence[str]) -> str:
    """The variant of a run with unusual settings: it must not be averaged with the usual ones."""
    settings = flat(run.config)
    others = ", ".join(f"{field}={_shown(settings[field])}" for field in differing if field != "margins")
    if "margins" in differing and "@" not in variant:
        variant = f"{variant}@{margin_label(run.margins)}"
    return f"{variant} ({others})" if others else variant


def _differing(run: FinishedRun, usual: Mapping[str, Any], method: str) -> list[str]:
    return [field for field, value in _settings(run, method).items() if value != usual[field]]


def _within(field: str, name: str) -> bool:
    return field == name or field.startswith(f"{name}.")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
