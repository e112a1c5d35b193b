"""Samples of a task, from the hub or from local files, with the columns that the task's source names.

Each split is converted once to arrays (pictures to 64x64, texts by their templates) and kept as one .npz file,
named by a hash of where it came from and how it was converted; a damaged one is built anew. A split is only ever
seen complete: it is written beside its place and moved there.
"""

import dataclasses
import hashlib
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tap_jax import templates
from tap_jax.data import cache, reading, values
from tap_jax.data.examples import Examples
from tap_jax.data.images import to_rgb64
from tap_jax.errors import UserError
from tap_jax.tasks import Task

_LOG = logging.getLogger(__name__)


VQA_TRAIN_ROWS = 17_000
_SPLIT_SEED = 0

Columns = Mapping[str, Sequence]


def load(
    task: Task,
    split: str,
    *,
    root: str,
    cache_dir: str | None = None,
    limit: int | None = None,
    folders: Mapping[str, str] | None = None,
    client_column: str = "",
    on_bad_row: str = "stop",
) -> Examples:
    """Reads one split of one task.

    Args:
      task: with a source.
      split: "train" or "test".
      root: "hub", the id of a data set there, or a folder with one sub-folder for each task, in any layout of
        `reading`. A task whose source has a path is read from there.
      cache_dir: where converted splits are kept (and the hub's files); None converts every time.
      limit: at most so many samples, a fixed random subset in the file's order; None for all.
      folders: task name -> folder under `root`, where it is not the task's name.
      client_column: the column that says whose a row is; "" where none does.
      on_bad_row: "stop" at a row that cannot be used, or "skip" it; what was skipped is in the examples' notes.

    Raises:
      UserError: as of `convert`, or data that are missing or lack a column.
    """
    if split not in ("train", "test"):
        raise UserError(f"split: unknown '{split}'; use one of train, test")
    if limit is not None and limit < 1:
        raise UserError(f"data.{split}_size: {limit}; use at least 1, or leave it out for all")
    owner = (client_column,) if client_column else ()
    place = _place(task, split, root, folders)
    settings = [place.identity, _SPLIT_SEED, VQA_TRAIN_ROWS, limit, on_bad_row, *owner]
    cached = cache_dir and cache.cache_path(cache_dir, task, split, settings)
    if cached and (examples := cache.read_cache(cached)) is not None:
        return examples
    rows = _opened(task, split, place, cache_dir, owner)
    examples = convert(task, split, rows, limit=limit, client_column=client_column, on_bad_row=on_bad_row)
    if cached:
        try:
            cache.write_cache(cached, examples)
        except OSError as error:
            _LOG.warning("data: converted sets are not kept in %s (%s)", cached.parent, error.strerror or error)
    return examples


def rows_of(
    task: Task,
    split: str,
    *,
    root: str,
    cache_dir: str | None = None,
    folders: Mapping[str, str] | None = None,
    also: Sequence[str] = (),
) -> reading.Joined:
    """The rows of a split before any is read: how many there are, and columns by name. Arguments as of `load`.

    Args:
      also: columns that there have to be beside the task's own.

    Raises:
      UserError: data that are missing or lack a column.
    """
    return _opened(task, split, _place(task, split, root, folders), cache_dir, also)


def client_name(value: object, *, where: str, column: str) -> str:
    """The name of a client as a cell gives it: text, or a number, of which 3 and 3.0 are one.

    Raises:
      BadRow: the cell is empty.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = "" if values.is_null(value) else str(value).strip()
    if not name:
        raise values.bad(where, column, "no client's name")
    return name


def subset(count: int, limit: int | None) -> np.ndarray:
    """Which of `count` rows a limit keeps, ascending: a fixed random subset; all of them without a limit."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(_SPLIT_SEED).permutation(count)[:limit])


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a split is.

    Attributes:
      field: of the configuration, that says so.
      hub: a data set's id; "" where the rows are in `files`.
      files: on this machine.
    """

    field: str
    hub: str = ""
    files: tuple[reading.Files, ...] = ()

    @property
    def identity(self) -> list:
        """JSON that changes with the files."""
        return [file.identity for file in self.files] or ["hub", self.hub]


def _place(task: Task, split: str, root: str, folders: Mapping[str, str] | None) -> _Place:
    """Where the rows of a task are: what its own path says, or else `root`.

    Raises:
      UserError: the task has no data, or they are not there.
    """
    source = task.source
    if source is None:
        raise UserError(f"data.root: no data for task {task.name}, which names no columns; declare it in config.tasks")
    field, named = (f"tasks.{task.name}.path", source.path) if source.path else ("data.root", root)
    if named == "hub":
        if not source.hub:
            raise UserError(f"data.root: 'hub', but task {task.name} names no data set; set tasks.{task.name}.hub")
        return _Place(field, source.hub)
    if is_hub_id(named):
        return _Place(field, named)
    if source.path:
        place = pathlib.Path(named)
        if not place.exists():
            raise UserError(
                f"{field}: there is no file or folder {place}, and no data set owner/name of the hub is named"
            )
    else:
        place, stand_in = locate(task, root, folders)
        if stand_in and split == "train":  # it is the same of the test split
            _LOG.warning("%s", stand_in)
    words = source.train or "train", source.test or "test"
    return _Place(field, files=tuple(reading.local(place, split, named=words, parts=source.configs, field=field)))


def is_hub_id(place: str) -> bool:
    """Whether a place is the id of a data set on the hub, owner/name, and no folder or file here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place)) and not pathlib.Path(place).exists()


def _opened(task: Task, split: str, place: _Place, cache_dir: str | None, also: Sequence[str] = ()) -> reading.Joined:
    """The rows of a place; a split that serves both is divided."""
    source = task.source
    opened = [reading.of_files(file, field=place.field) for file in place.files]
    if not opened:
        name = getattr(source, split) or split
        parts = source.configs or (None,)
        opened = [reading.of_hub(place.hub, part, name, cache_dir=cache_dir, field=place.field) for part in parts]
    for rows in opened:
        _check_columns((*source.needed, *also), rows, place.field)
    if source.train and source.train == source.test and (not place.files or place.files[0].divided):
        halves = divide_by_image(opened[0].entries(source.image), train_rows=VQA_TRAIN_ROWS, seed=_SPLIT_SEED)
        opened = [opened[0].take(halves[0 if split == "train" else 1])]
    return reading.Joined(tuple(opened))


def locate(task: Task, root: str, folders: Mapping[str, str] | None = None) -> tuple[pathlib.Path, str | None]:
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
    chosen = (folders or {}).get(task.name)
    names = (chosen,) if chosen else (task.name, *task.source.stand_ins)
    for name in names:
        if (base / name).is_dir():
            differs = name != task.name
            return base / name, f"data: {name} stands in for {task.name}" if differs else None
    raise UserError(
        f"data.root: no folder {' or '.join(names)} in {base}; put the files of {task.name} there, or use data.root=hub"
    )


def convert(
    task: Task,
    split: str,
    rows: reading.Joined,
    *,
    limit: int | None = None,
    client_column: str = "",
    on_bad_row: str = "stop",
) -> Examples:
    """Rows with the hub's columns -> `Examples`.

    Args:
      task: its kind, domains and number of classes.
      split: "train" or "test"; test rows that agree in the source's group_by become one sample.
      rows: with the source's columns; pictures as bytes or {"bytes": ..., "path": ...}.
      limit, client_column: see `load`. Rows of several clients are never one sample.
      on_bad_row: see `load`.

    Raises:
      UserError: no rows, or none that can be used; a row that cannot be used (`values.BadRow`).
    """
    source, place = task.source, f"{task.name}/{split}"
    needed = dict.fromkeys((*source.needed, *((client_column,) if client_column else ())))
    columns = rows.columns([name for name in needed if name != source.image])  # images come one by one
    if not rows.count:
        raise UserError(f"data.root: {place} has no rows; put data there")
    attempt = _Attempts(place, on_bad_row)
    groups = [[row] for row in range(rows.count)]
    if source.group_by and split == "test":
        together: dict[object, list[int]] = {}
        owners = columns[client_column] if client_column else [None] * rows.count
        for row, (entry, owner) in enumerate(zip(columns[source.group_by], owners, strict=True)):
            if attempt(row, values.check, entry, column=source.group_by) is not _FAILED:
                together.setdefault((repr(entry), owner), []).append(row)
        groups = list(together.values())
    groups = [groups[i] for i in subset(len(groups), limit)]
    samples = []  # (row, its fields, those of the further rows of its group)
    for group in groups:
        found = [(row, attempt(row, _fields, task, columns, row, client_column)) for row in group]
        found = [(row, fields) for row, fields in found if fields is not _FAILED]
        if found:
            samples.append((found[0][0], [fields for _, fields in found]))
    if source.image and samples:
        images = zip(samples, rows.entries(source.image, [row for row, _ in samples]), strict=True)
        images = [(s, attempt(s[0], to_rgb64, image, column=source.image)) for s, image in images]
        samples = [sample for sample, image in images if image is not _FAILED]
        images = [image for _, image in images if image is not _FAILED]
    if not samples:
        raise UserError(f"data.root: {place} has no row that can be used; the first: {attempt.first}")
    first = [group[0] for _, group in samples]
    fields: dict = {"domains": np.array([mine["domain"] for mine in first], np.int32), "notes": attempt.notes()}
    if source.image:
        fields["images"] = np.stack(images)
    if source.label:
        fields["labels"] = np.array([mine["label"] for mine in first], np.int32)
    if source.text:
        fields["inputs"] = tuple(mine["input"] for mine in first)
        if templates.is_template(source.text):
            fields["shorten"] = np.array([mine["shorten"] for mine in first], np.int32)
    if source.answer:
        references = [[text for mine in group for text in mine["answers"]] for _, group in samples]
        fields["references"] = tuple(map(tuple, references))
        fields["targets"] = tuple(group[0] for group in references)
    if client_column:
        fields["clients"] = tuple(mine["client"] for mine in first)
    return Examples(**fields)


_FAILED = object()


class _Attempts:
    """Conversions of single rows: a row that cannot be used ends them, or is counted."""

    def __init__(self, place: str, on_bad_row: str):
        self.place, self.skip = place, on_bad_row == "skip"
        self.rows: set[int] = set()
        self.first = ""

    def __call__(self, row: int, function: Callable, *args, **kwargs):
        """What the function returns, or `_FAILED`."""
        try:
            return function(*args, where=f"{self.place} row {row}", **kwargs)
        except values.BadRow as error:
            if not self.skip:
                raise
            self.first = self.first or str(error).rpartition("; ")[0]
            self.rows.add(row)
            return _FAILED

    def notes(self) -> tuple[str, ...]:
        """One line, where rows were skipped."""
        if not self.rows:
            return ()
        return (
            f"data: {self.place}: {len(self.rows):,} rows skipped as data.on_bad_row says; the first: {self.first}",
        )


def _fields(task: Task, columns: Columns, row: int, client_column: str, *, where: str) -> dict:
    """What a row has besides its image: domain, label, texts, whose it is."""
    source, found = task.source, {"domain": 0}
    if client_column:
        found["client"] = client_name(columns[client_column][row], where=where, column=client_column)
    if source.label:
        names = f"name it in tasks.{task.name}.class_names, "
        remedy = names if task.class_names else f"raise classes of {task.name}, "
        entry = columns[source.label][row]
        given = {"where": where, "column": source.label, "remedy": remedy, "names": task.class_names}
        found["label"] = values.label(entry, task.classes, **given)
    record = {name: columns[name][row] for name in source.texts}
    for name, entry in record.items():
        values.check(entry, where=where, column=name)
    try:
        if templates.is_template(source.text):
            found["input"], found["shorten"] = templates.fill(source.text, record)
        elif source.text:
            found["input"] = values.text(record[source.text], where=where, column=source.text)
        if source.answer:
            found["answers"] = _answers(source.answer, record)
    except templates.Unfit as unfit:
        raise values.bad(where, unfit.column, unfit.reason) from None
    if source.domain_column:
        entry, known = columns[source.domain_column][row], source.domain_values or task.domains
        if entry not in known:
            shown = f"{source.domain_column} {entry}"
            raise values.bad(where, source.domain_column, f"{shown} has no domain among {', '.join(task.domains)}")
        found["domain"] = known.index(entry)
    return found


def _answers(answer: str, record: Mapping) -> list[str]:
    """What a row may be answered with: one text for each entry where a column that is taken as it is has a list.

    Raises:
      templates.Unfit: an empty list, or an entry that the template cannot use.
    """
    several = [name for name in templates.columns(answer) if isinstance(record[name], (list, tuple))]
    plain = [name for name in several if name == answer or f"{{{name}}}" in answer]
    if not plain:
        return [templates.fill(answer, record)[0]]
    if not record[plain[0]]:
        raise templates.Unfit(plain[0], "an empty list where an answer is expected")
    return [templates.fill(answer, {**record, plain[0]: entry})[0] for entry in record[plain[0]]]


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
    train, test = [], []
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
    for name in needed:
        if name not in rows.names:
            raise UserError(
                f"{field}: {rows.place} has no column '{name}' (it has {', '.join(rows.names)}); rename or add it"
            )
