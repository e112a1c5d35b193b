"""From the rows of a split to its samples: each row converted rightly, or named as one that cannot be used."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tap_jax import templates
from tap_jax.data import reading, values
from tap_jax.data.examples import IMAGE_SIDE, Examples
from tap_jax.data.images import to_rgb64
from tap_jax.data.places import SPLIT_SEED
from tap_jax.errors import UserError
from tap_jax.tasks import Task

Columns = Mapping[str, Sequence]
Tell = Callable[[str, int, int], None]  # what is being converted, how many rows are, of how many
_OFTEN = 500  # rows between two words of progress


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


def convert(
    task: Task,
    split: str,
    rows: reading.Joined,
    *,
    limit: int | None = None,
    client_column: str = "",
    on_bad_row: str = "stop",
    tell: Tell = silent,
) -> Examples:
    """Rows with the hub's columns -> `Examples`.

    Args:
      task: its kind, domains and number of classes.
      split: "train" or "test"; test rows that agree in the source's group_by become one sample.
      rows: with the source's columns; pictures as bytes or {"bytes": ..., "path": ...}.
      limit, client_column: see `loading.load`. Rows of several clients are never one sample.
      on_bad_row, tell: see `loading.load`.

    Raises:
      UserError: no rows, or none that can be used; a row that cannot be used (`values.BadRow`).
    """
    source, place = task.source, f"{task.name}/{split}"
    needed = dict.fromkeys((*source.needed, *((client_column,) if client_column else ())))
    named = source.label if task.class_names and isinstance(task.class_names[0], str) else ""
    columns = rows.columns([name for name in needed if name not in (source.image, named)])  # images come one by one
    if named:
        columns[named] = rows.classes(named)
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

    def converted(chosen: Iterable[int]) -> tuple[list[_Sample], np.ndarray]:
        """Samples of groups, in the order of their rows, and their pictures."""
        found = []
        for number, group in enumerate(groups[i] for i in sorted(chosen)):
            attempts = [(row, attempt(row, _fields, task, columns, row, client_column)) for row in group]
            if good := [(row, fields) for row, fields in attempts if fields is not _FAILED]:
                found.append(_Sample(good[0][0], [fields for _, fields in good]))
            if not source.image and number % _OFTEN == 0:
                tell(place, min(tried + number, most), most)
        if not source.image or not found:
            return found, _pictures(0)
        seen: list[_Sample] = []
        pictures = _pictures(len(found))
        images = rows.entries(source.image, [sample.row for sample in found])
        for number, (sample, image) in enumerate(zip(found, images, strict=True)):
            picture = attempt(sample.row, to_rgb64, image, column=source.image)
            if picture is not _FAILED:
                pictures[len(seen)] = picture
                seen.append(sample)
            if number % _OFTEN == 0:
                tell(place, min(tried + number, most), most)
        return seen, pictures[: len(seen)]

    # Those that a limit keeps; for each that cannot be used, the next.
    order = subset_order(len(groups), limit)
    samples: list[_Sample] = []
    parts: list[np.ndarray] = []  # their pictures
    most, tried = min(limit or len(order), len(order)), 0
    while tried < len(order) and len(samples) < most:
        chosen = order[tried : tried + most - len(samples)]
        more, pictures = converted(chosen)
        samples, parts, tried = samples + more, [*parts, pictures], tried + len(chosen)
    tell(place, most, most)
    if not samples:
        raise UserError(f"data.root: {place} has no row that can be used; the first: {attempt.first}")
    images = parts[0]
    if len(parts) > 1:  # each in the order of its rows
        by_row = sorted(range(len(samples)), key=lambda number: samples[number].row)
        samples = [samples[number] for number in by_row]
        images = np.concatenate(parts)[by_row] if source.image else images
    first = [sample.fields[0] for sample in samples]
    fields: dict[str, Any] = {"domains": np.array([mine["domain"] for mine in first], np.int32)}
    fields["notes"] = attempt.notes()
    if source.image:
        fields["images"] = images
    if source.label:
        fields["labels"] = np.array([mine["label"] for mine in first], np.int32)
    if source.text:
        fields["inputs"] = tuple(mine["input"] for mine in first)
        if templates.is_template(source.text):
            fields["shorten"] = np.array([mine["shorten"] for mine in first], np.int32)
    if source.answer:
        references = [[text for mine in sample.fields for text in mine["answers"]] for sample in samples]
        fields["references"] = tuple(map(tuple, references))
        fields["targets"] = tuple(group[0] for group in references)
    if client_column:
        fields["clients"] = tuple(mine["client"] for mine in first)
    return Examples(**fields)


_FAILED = object()


def _pictures(count: int) -> np.ndarray:
    return np.empty((count, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)


class _Sample(NamedTuple):
    """Its first row, and the fields of all rows of its group."""

    row: int
    fields: list[dict[str, Any]]


class _Attempts:
    """Conversions of single rows: a row that cannot be used ends them, or is counted."""

    def __init__(self, place: str, on_bad_row: str):
        self.place, self.skip = place, on_bad_row == "skip"
        self.rows: set[int] = set()
        self.first = ""

    def __call__(self, row: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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


def _fields(task: Task, columns: Columns, row: int, client_column: str, *, where: str) -> dict[str, Any]:
    """What a row has besides its image: domain, label, texts, whose it is."""
    source = task.source
    found: dict[str, Any] = {"domain": 0}
    if client_column:
        found["client"] = client_name(columns[client_column][row], where=where, column=client_column)
    if source.label:
        entry = columns[source.label][row]
        if task.class_names:
            remedy = f"name it in tasks.{task.name}.class_names, "
        elif isinstance(entry, str):
            remedy = f"name the classes in tasks.{task.name}.class_names, or leave both out, "
        else:
            remedy = f"raise classes of {task.name}, "
        found["label"] = values.label(
            entry, task.classes, where=where, column=source.label, remedy=remedy, names=task.class_names
        )
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
        entry, known = columns[source.domain_column][row], list(map(str, source.domain_values or task.domains))
        entry = str(int(entry) if isinstance(entry, float) and entry.is_integer() else entry).strip()
        if entry not in known:
            shown = f"{source.domain_column} {entry}"
            raise values.bad(where, source.domain_column, f"{shown} has no domain among {', '.join(task.domains)}")
        found["domain"] = known.index(entry)
    return found


def _answers(answer: str, record: Mapping) -> list[str]:
    """What a row may be answered with: one text for each entry where a column that is taken as it is has a list."""
    several = [name for name in templates.columns(answer) if isinstance(record[name], (list, tuple))]
    plain = [name for name in several if name == answer or f"{{{name}}}" in answer]
    if not plain:
        return [templates.fill(answer, record)[0]]
    if not record[plain[0]]:
        raise templates.Unfit(plain[0], "an empty list where an answer is expected")
    return [templates.fill(answer, {**record, plain[0]: entry})[0] for entry in record[plain[0]]]


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
    return np.sort(subset_order(count, limit)[:limit])


def subset_order(count: int, limit: int | None) -> np.ndarray:
    """The rows in the order in which a limit takes them."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.random.default_rng(SPLIT_SEED).permutation(count)
