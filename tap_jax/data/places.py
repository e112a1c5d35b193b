"""Where the rows of a split are: local files, or a data set of the hub; and these rows, opened.

VQA's one split serves both training and test, so it is divided here.
"""

import dataclasses
import difflib
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tap_jax.data import reading
from tap_jax.errors import UserError
from tap_jax.tasks import Task

_LOG = logging.getLogger(__name__)

VQA_TRAIN_ROWS = 17_000
SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a split is.

    Attributes:
      field: of the configuration, that says so.
      hub: a data set's id; "" where the rows are in `files`.
      files: on this machine.
      guessed: the id could be that of a folder that is missing.
    """

    field: str
    hub: str = ""
    files: tuple[reading.Files, ...] = ()
    guessed: bool = False

    @property
    def identity(self) -> list:
        """JSON that changes with the files."""
        return [file.identity for file in self.files] or ["hub", self.hub]


def find(task: Task, split: str, root: str) -> Place:
    """Where the rows of a task are: what its own path says, or else `root`.

    Raises:
      UserError: the task has no data, or they are not there.
    """
    source = task.source
    if not source.needed:
        raise UserError(f"data.root: no data for task {task.name}, which names no columns; declare it in config.tasks")
    field, named = (f"tasks.{task.name}.path", source.path) if source.path else ("data.root", root)
    named = os.path.expanduser(named)
    if named == "synthetic":
        raise UserError(
            f"data.root: no synthetic data for task {task.name}; set tasks.{task.name}.path or data.root to its files"
        )
    if named == "hub":
        if not source.hub:
            raise UserError(f"data.root: 'hub', but task {task.name} names no data set; set tasks.{task.name}.hub")
        return Place(field, source.hub)
    if is_hub_id(named):
        return Place(field, named, guessed=True)
    if source.path:
        place = pathlib.Path(named)
        if not place.exists():
            raise UserError(
                f"{field}: there is no file or folder {place}, and no data set owner/name of the hub is named"
            )
    else:
        place, stand_in = locate(task, named)
        if stand_in and split == "train":  # it is the same of the test split
            _LOG.warning("%s", stand_in)
    words = source.train or "train", source.test or "test"
    return Place(field, files=tuple(reading.local(place, split, named=words, parts=source.configs, field=field)))


def open_rows(task: Task, split: str, place: Place, cache_dir: str | None, also: Sequence[str] = ()) -> reading.Joined:
    """The rows of a place; a split that serves both is divided."""
    source = task.source
    opened = [reading.of_files(file, field=place.field) for file in place.files]
    if not opened:
        name = getattr(source, split) or split
        opened = [
            reading.of_hub(place.hub, part, name, cache_dir=cache_dir, field=place.field, guessed=place.guessed)
            for part in source.configs or (None,)
        ]
    for rows in opened:
        _check_columns((*source.needed, *also), rows, place.field)
    if source.train and source.train == source.test and (not place.files or place.files[0].divided):
        halves = divide_by_image(opened[0].entries(source.image), train_rows=VQA_TRAIN_ROWS, seed=SPLIT_SEED)
        opened = [opened[0].take(halves[0 if split == "train" else 1])]
    return reading.Joined(tuple(opened))


def rows_of(
    task: Task, split: str, *, root: str, cache_dir: str | None = None, also: Sequence[str] = ()
) -> reading.Joined:
    """The rows of a split before any is read: how many there are, and columns by name. Arguments: `loading.load`.

    Args:
      also: columns that there have to be beside the task's own.

    Raises:
      UserError: data that are missing or lack a column.
    """
    return open_rows(task, split, find(task, split, root), cache_dir, also)


def is_hub_id(place: str) -> bool:
    """Whether a place is the id of a data set on the hub, owner/name, and no folder or file here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place)) and not pathlib.Path(place).exists()


def locate(task: Task, root: str) -> tuple[pathlib.Path, str | None]:
    """The local folder of a task, and a line to show where it is another data set standing in (else None).

    Raises:
      UserError: `root` is no folder, or it has neither the task's folder nor a stand-in.
    """
    base = pathlib.Path(root)
    if not base.is_dir():
        raise UserError(
            f"data.root: there is no folder {base}; name one with a sub-folder for each task, or use"
            " data.root=hub or data.root=synthetic"
        )
    names = (task.name, *task.source.stand_ins)
    for name in names:
        if (base / name).is_dir():
            differs = name != task.name
            return base / name, f"data: {name} stands in for {task.name}" if differs else None
    raise UserError(
        f"data.root: no folder {' or '.join(names)} in {base}; put the files of {task.name} there, or use data.root=hub"
    )


def divide_by_image(images: Iterable[Mapping], *, train_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides rows in two so that no picture is in both (VQA v2 asks several questions per picture).

    Pictures are told apart by their bytes, shuffled by `seed`, and taken with all their rows as long as `train_rows`
    is not exceeded.

    Returns:
      int64 row numbers of train (at most `train_rows`) and of test (the rest), each ascending.
    """
    rows_of: dict[bytes, list[int]] = {}
    for row, image in enumerate(images):
        rows_of.setdefault(_digest(image), []).append(row)
    pictures = list(rows_of.values())
    train: list[int] = []
    test: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(pictures)):
        (train if len(train) + len(pictures[i]) <= train_rows else test).extend(pictures[i])
    return np.sort(np.array(train, np.int64)), np.sort(np.array(test, np.int64))


def _digest(image: Mapping | None) -> bytes:
    """Of a picture's bytes; what cannot be read is told from every picture, and is named when it is converted."""
    image = image or {}
    try:
        found = image.get("bytes") or pathlib.Path(image.get("path") or "").read_bytes()
    except OSError:
        found = repr(image.get("path")).encode()
    return hashlib.sha256(found).digest()


def _check_columns(needed: Sequence[str], rows: reading.Rows, field: str) -> None:
    """Whether there are all columns."""
    for name in needed:
        if name in rows.names:
            continue
        if not rows.names:
            raise UserError(f"{field}: {rows.place} has no rows; put data there")
        (first, *others), shown = rows.names, [repr(n) if n != n.strip() else n for n in rows.names]
        near = difflib.get_close_matches(name.lower(), [n.lower().strip() for n in rows.names], n=1, cutoff=0.8)
        hint = next((f"did you mean {n!r}? " for n in rows.names if [n.lower().strip()] == near), "")
        if not others and ";" in first:
            hint = "its separator is ';': save it with commas; "
        if "image" in rows.names and name == "label":
            hint = "a metadata file takes the place of class folders: add a column 'label' to it; "
        raise UserError(
            f"{field}: {rows.place} has no column '{name}' (it has {', '.join(shown)}); {hint}rename or add it"
        )
