"""Samples of a task, from the hub or from a local folder, with the columns that the task's source names.

Each split is converted once to arrays (pictures to 64x64, texts cut by their template) and kept as one .npz file,
named by a hash of where it came from and how it was converted; a damaged one is built anew. A split is only ever
seen complete: it is written beside its place and moved there.
"""

import dataclasses
import hashlib
import logging
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tap_jax.data import cache, reading, values
from tap_jax.data.examples import Examples
from tap_jax.data.images import to_rgb64
from tap_jax.data.sources import MMLU_DOMAINS, SOURCES, Source
from tap_jax.data.templates import LETTERS, TEMPLATES
from tap_jax.errors import UserError
from tap_jax.federation import Task

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
      task: its name is looked up in `SOURCES`.
      split: "train" or "test".
      root: "hub", or a folder with one sub-folder for each task, in any layout of `reading`.
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
    if task.name not in SOURCES:
        raise UserError(f"data.root: no source for task {task.name}; add it to tap_jax.data.sources.SOURCES")
    if limit is not None and limit < 1:
        raise UserError(f"data.{split}_size: {limit}; use at least 1, or leave it out for all")
    source = SOURCES[task.name]
    conversion = [dataclasses.astuple(source), _described(TEMPLATES.get(task.name)), _SPLIT_SEED, VQA_TRAIN_ROWS]
    files = _files(task, split, root, folders)
    identity = [file.identity for file in files] or ["hub"]
    owner = (client_column,) if client_column else ()
    settings = [identity, *conversion, limit, on_bad_row, *owner]
    cached = cache_dir and cache.cache_path(cache_dir, task, split, settings)
    if cached and (examples := cache.read_cache(cached)) is not None:
        return examples
    rows = _opened(task, split, files, cache_dir, owner)
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
    return _opened(task, split, _files(task, split, root, folders), cache_dir, also)


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


def _files(task: Task, split: str, root: str, folders: Mapping[str, str] | None) -> list[reading.Files]:
    """Where a split is on this machine; none for the hub."""
    if root == "hub":
        return []
    folder, stand_in = locate(task, root, folders)
    if stand_in and split == "train":  # it is the same of the test split
        _LOG.warning("%s", stand_in)
    source = SOURCES[task.name]
    return reading.local(folder, split, named=(source.train, source.test), parts=source.configs, field="data.root")


def _opened(
    task: Task, split: str, files: Sequence[reading.Files], cache_dir: str | None, also: Sequence[str] = ()
) -> reading.Joined:
    """The rows of `_files`; a split that serves both is divided."""
    source = SOURCES[task.name]
    opened = [reading.of_files(file) for file in files] or _from_hub(source, split, cache_dir)
    for rows in opened:
        _check_columns((*source.needed, *also), rows)
    if source.train == source.test and (not files or files[0].divided):
        halves = divide_by_image(opened[0].entries(source.image), train_rows=VQA_TRAIN_ROWS, seed=_SPLIT_SEED)
        opened = [opened[0].take(halves[0 if split == "train" else 1])]
    return reading.Joined(tuple(opened))


def _described(template: Callable | None) -> list | str | None:
    """A template by what it does, as JSON: its code, defaults and closure, but not the globals that it reads.

    Any other callable is described by its repr, which may differ in every process; then the set is converted again.
    """
    if template is None:
        return None
    if not isinstance(template, types.FunctionType):
        return repr(template)
    closure = [repr(cell.cell_contents) for cell in template.__closure__ or ()]
    return [_code(template.__code__), repr(template.__defaults__), repr(template.__kwdefaults__), closure]


def _code(code: types.CodeType) -> list:
    """Not by the repr of inner code or sets, which hold addresses or come in any order."""
    constants = [
        _code(value)
        if isinstance(value, types.CodeType)
        else sorted(map(repr, value))
        if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    ]
    return [code.co_code.hex(), constants, code.co_names]


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
    names = (chosen,) if chosen else (task.name, *SOURCES[task.name].stand_ins)
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
      split: "train" or "test"; test rows of common_gen with one concept_set_idx become one sample.
      rows: with the source's columns; pictures as bytes or {"bytes": ..., "path": ...}.
      limit, client_column: see `load`. Rows of several clients are never one sample.
      on_bad_row: see `load`.

    Raises:
      UserError: no rows, or none that can be used; no pictures, labels or texts for a task that needs them; several
        domains and nothing that tells them apart; a row that cannot be used (`values.BadRow`).
    """
    source, place = SOURCES[task.name], f"{task.name}/{split}"
    _check_source(task, source)
    needed = dict.fromkeys((*source.needed, *((client_column,) if client_column else ())))
    columns = rows.columns([name for name in needed if name != source.image])  # images come one by one
    if not rows.count:
        raise UserError(f"data.root: {place} has no rows; put data there")
    attempt = _Attempts(place, on_bad_row)
    groups = [[row] for row in range(rows.count)]
    if task.name == "common_gen" and split == "test":
        by_set: dict[object, list[int]] = {}
        owners = columns[client_column] if client_column else [None] * rows.count
        for row, (index, owner) in enumerate(zip(columns["concept_set_idx"], owners, strict=True)):
            if attempt(row, values.check, index, column="concept_set_idx") is not _FAILED:
                by_set.setdefault((index, owner), []).append(row)
        groups = list(by_set.values())
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
    if "input" in first[0]:
        fields["inputs"] = tuple(mine["input"] for mine in first)
    if "target" in first[0]:
        fields["references"] = tuple(tuple(mine["target"] for mine in group) for _, group in samples)
        fields["targets"] = tuple(group[0] for group in fields["references"])
        fields["shorten"] = np.array([mine["shorten"] for mine in first], np.int32)
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


def _check_source(task: Task, source: Source) -> None:
    if len(task.domains) > 1 and task.name != "mmlu":  # whose subjects are its domains
        raise UserError(
            f"task {task.name}: parquet and hub data have one domain, not {len(task.domains)}; register one task per "
            "domain, or use data.root=synthetic with a rule in data.synthetic.RULES"
        )
    for needed, column in (("image" in task.modalities, "image"), (task.kind.endswith("classification"), "label")):
        if needed and not getattr(source, column):
            raise UserError(f"task {task.name}: no {column}s; name the column as `{column}` in data/sources.py")
    if task.name in TEMPLATES:
        return
    if task.kind == "text_generation":
        raise UserError(f"task {task.name}: no texts to write; give it a template in data/templates.py")
    if "text" in task.modalities and "text" not in source.columns:
        raise UserError(
            f"task {task.name}: no texts; name the column 'text' in data/sources.py, or give it a template in "
            "data/templates.py"
        )


def _fields(task: Task, columns: Columns, row: int, client_column: str, *, where: str) -> dict:
    """What a row has besides its image: domain, label, texts, whose it is."""
    source, found = SOURCES[task.name], {"domain": 0}
    if client_column:
        found["client"] = client_name(columns[client_column][row], where=where, column=client_column)
    if source.label:
        remedy = f"raise classes of {task.name}, "
        entry = columns[source.label][row]
        found["label"] = values.label(entry, task.classes, where=where, column=source.label, remedy=remedy)
    if task.name in TEMPLATES:
        found |= _cut(task, columns, row, where=where)
    elif "text" in source.columns:
        found["input"] = values.text(columns["text"][row], where=where, column="text")
    if task.name == "mmlu":
        subject = columns["subject"][row]
        if MMLU_DOMAINS.get(subject) not in task.domains:
            raise values.bad(where, "subject", f"subject {subject} has no domain among {', '.join(task.domains)}")
        found["domain"] = task.domains.index(MMLU_DOMAINS[subject])
    return found


def _cut(task: Task, columns: Columns, row: int, *, where: str) -> dict:
    """A row's texts by its template, and which part of the input may be shortened: its longest text."""
    record = {name: columns[name][row] for name in SOURCES[task.name].columns}
    for name, entry in record.items():
        values.check(entry, where=where, column=name)
    if "choices" in record and "answer" in record:
        if not 0 < len(record["choices"]) <= len(LETTERS):
            raise values.bad(where, "choices", f"{len(record['choices'])} choices; 1 to {len(LETTERS)} have letters")
        try:
            number = len(record["choices"])
            record["answer"] = values.label(record["answer"], number, where=where, column="answer", what="answer")
        except values.BadRow:
            if isinstance(record["answer"], int):
                wrong = f"answer {record['answer']} of {number} choices"
                raise values.bad(where, "answer", wrong) from None
            raise
    try:
        text, target = TEMPLATES[task.name](record)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise values.bad(where, ", ".join(record), f"the template of {task.name} cannot use it ({said})") from error
    longest = max((entry for entry in record.values() if isinstance(entry, str)), key=len, default="")
    start = max(text.find(longest), 0)
    shorten = (start, start + len(longest) if longest in text else start)
    return {"input": text, "target": target, "shorten": shorten}


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


def _check_columns(needed: Sequence[str], rows: reading.Rows) -> None:
    for name in needed:
        if name not in rows.names:
            raise UserError(
                f"data.root: {rows.place} has no column '{name}' (it has {', '.join(rows.names)}); rename or add it"
            )


def _from_hub(source: Source, split: str, cache_dir: str | None) -> list[reading.Rows]:
    return [
        reading.of_hub(source.hub_id, config, getattr(source, split), cache_dir=cache_dir)
        for config in source.configs or (None,)
    ]
