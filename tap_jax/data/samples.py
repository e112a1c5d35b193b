"""From the rows of a split to its samples: each row converted rightly, or named as one that cannot be used."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tap_jax import templates
from tap_jax.data import reading, values
from tap_jax.data.examples import Examples
from tap_jax.data.images import to_rgb64
from tap_jax.data.places import SPLIT_SEED
from tap_jax.errors import UserError
from tap_jax.tasks import Task

Columns = Mapping[str, Sequence]


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
      limit, client_column: see `loading.load`. Rows of several clients are never one sample.
      on_bad_row: see `loading.load`.

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
        entry = columns[source.label][row]
        if task.class_names:
            remedy = f"name it in tasks.{task.name}.class_names, "
        elif isinstance(entry, str):
            remedy = f"name the classes in tasks.{task.name}.class_names, or leave both out, "
        else:
            remedy = f"raise classes of {task.name}, "
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
        entry, known = columns[source.domain_column][row], list(map(str, source.domain_values or task.domains))
        entry = str(int(entry) if isinstance(entry, float) and entry.is_integer() else entry).strip()
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
    return np.sort(np.random.default_rng(SPLIT_SEED).permutation(count)[:limit])
