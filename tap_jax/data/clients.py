"""Clients as the data name them: by a column that says whose a row is, or by a folder for each.

What is read to find them is that column, or the number of rows of each file. A client is known by its name alone: the
order of names, in a set or between training and test set, means nothing.
"""

import collections
import dataclasses
import os
import pathlib
import urllib.parse

from tap_jax.data import loading, places, reading, samples, sites
from tap_jax.data.examples import Examples
from tap_jax.data.settings import DataSettings
from tap_jax.data.values import BadRow
from tap_jax.errors import UserError
from tap_jax.federation import Client, Federation
from tap_jax.tasks import TASKS, Task, find_task

MOST_BYTES = 200  # of a client's name as files' names have it, escaped; file systems take 255


def natural_federation(settings: DataSettings) -> Federation:
    """The clients that have training samples, by name; a client's tasks are those in which it has rows.

    Shares are parts of a task's rows, all clients are of group 0, and clients with the same tasks are of one pattern.

    Raises:
      UserError: no data, a row without a client, or a name that cannot be one.
    """
    chosen = [find_task(name) for name in settings.tasks] or _present(settings)
    counts = {task.name: collections.Counter(names_of(task, "train", settings)) for task in chosen}
    counted: dict[str, dict[str, int]] = {}
    for task, found in counts.items():
        for name, mine in found.items():
            counted.setdefault(name, {})[task] = mine
    totals = {task: found.total() for task, found in counts.items()}
    patterns: dict[frozenset[str], int] = {}
    clients = []
    for name in sorted(counted):
        if len(urllib.parse.quote(name)) > MOST_BYTES or not name.isprintable():
            wanted = f"a printable name of at most {MOST_BYTES} bytes (3 for 'ü')"
            raise UserError(f"data: client {name[:40]!r}: use {wanted}")
        pattern = patterns.setdefault(frozenset(counted[name]), len(patterns))
        shares = {task: mine / totals[task] for task, mine in counted[name].items()}
        clients.append(Client(name, shares, 0, pattern, counted[name]))
    return Federation(tuple(clients), named=True)


def names_of(task: Task, split: str, settings: DataSettings) -> list[str]:
    """Whose each row of a split is, in the order of `read`."""
    if settings.root == "sites":
        names = sites.names(task.name, split)
    elif settings.split == "column":
        column, place, names = settings.client_column, f"{task.name}/{split}", []
        rows = places.rows_of(task, split, **settings.place, also=(column,))
        for row, value in enumerate(rows.columns((column,))[column]):
            try:
                names.append(samples.client_name(value, where=f"{place} row {row}", column=column))
            except BadRow:
                if settings.on_bad_row != "skip":
                    raise
                names.append("")  # no client's
    else:
        counts = [(name, places.rows_of(task, split, **mine.place).count) for name, mine in _with_task(task, settings)]
        names = [name for name, count in counts for _ in range(count)]
    return [names[row] for row in samples.subset(len(names), settings.size(split) or None) if names[row]]


def read(
    task: Task, split: str, settings: DataSettings, *, limit: int | None = None, tell: samples.Tell = samples.silent
) -> Examples:
    """One split of one task, with `Examples.clients`.

    Args:
      limit: samples at most, of all clients together; None for all.
      tell: see `loading.load`.

    Raises:
      UserError: as of `loading.load`.
    """
    if settings.root == "sites":
        examples = sites.load(task, split, seed=settings.seed)
    elif settings.split == "column":
        given = settings.place | {"on_bad_row": settings.on_bad_row, "client_column": settings.client_column}
        return loading.load(task, split, limit=limit, tell=tell, **given)
    else:
        found = _with_task(task, settings)
        parts = [loading.load(task, split, **mine.place, on_bad_row=mine.on_bad_row, tell=tell) for _, mine in found]
        whose = tuple(name for (name, _), part in zip(found, parts, strict=True) for _ in range(len(part)))
        examples = dataclasses.replace(Examples.joined(parts), clients=whose)
    return examples.take(samples.subset(len(examples), limit))


def training_rows(task: Task, settings: DataSettings) -> list[reading.Joined]:
    """A task's training rows: of `settings.root`, or of every client's folder there."""
    all_of_it = [mine for _, mine in _with_task(task, settings)] if settings.split == "folder" else [settings]
    return [places.rows_of(task, "train", **mine.place) for mine in all_of_it]


def _present(settings: DataSettings) -> list[Task]:
    """The known tasks that have data."""
    root, by_column = settings.root, settings.split == "column"
    if root == "sites":
        if settings.client_column != sites.COLUMN:
            raise UserError(
                f"data.client_column: '{settings.client_column}'; the embedded sites have a column '{sites.COLUMN}'"
            )
        return [find_task(name) for name in sites.tasks()]
    roots = [root] if by_column else [place for _, place in _folders(root)]
    found = [
        task
        for task in TASKS.values()
        if task.source.needed and (task.source.path or any(_has(place, task) for place in roots))
    ]
    if not found:
        where = root if by_column else f"any folder of {root}"
        raise UserError(f"data.root: no task has data in {where}; there has to be one sub-folder per task")
    return found


def _folders(root: str) -> list[tuple[str, str]]:
    """(name, folder) of each client, by name."""
    base = pathlib.Path(root)
    if not base.is_dir():
        raise UserError(f"data.root: there is no folder {base}; name one with a sub-folder for each client")
    names = sorted(path.name for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UserError(f"data.root: {base} has no folders; make one per client, with one per task in it")
    return [(name, os.path.join(root, name)) for name in names]


def _with_task(task: Task, settings: DataSettings) -> list[tuple[str, DataSettings]]:
    """(name, settings with its folder as root) of each client that has the task."""
    found = [
        (name, dataclasses.replace(settings, root=place))
        for name, place in _folders(settings.root)
        if _has(place, task)
    ]
    if not found:
        raise UserError(
            f"data.root: no client in {settings.root} has {task.name}; add a folder of that name or drop the task"
        )
    return found


def _has(root: str, task: Task) -> bool:
    return (pathlib.Path(root) / task.name).is_dir()
