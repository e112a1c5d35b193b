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

from tap_jax.data import cache, reading
from tap_jax.data.examples import Examples
from tap_jax.data.images import to_rgb64
from tap_jax.data.sources import MMLU_DOMAINS, SOURCES, Source
from tap_jax.data.templates import TEMPLATES
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
) -> Examples:
    """Reads one split of one task.

    Args:
      task: its name is looked up in `SOURCES`.
      split: "train" or "test".
      root: "hub", or a folder with one sub-folder for each task, in any layout of `reading`.
      cache_dir: where converted splits are kept (and the hub's files); None converts every time.
      limit: at most so many samples, a fixed random subset in the file's order; None for all.
      folders: task name -> folder under `root`, where it is not the task's name.

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
    cached = cache_dir and cache.cache_path(cache_dir, task, split, [identity, *conversion, limit])
    if cached and (examples := cache.read_cache(cached)) is not None:
        return examples
    examples = convert(task, split, _opened(task, split, files, cache_dir), limit=limit)
    if cached:
        cache.write_cache(cached, examples)
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


def convert(task: Task, split: str, rows: reading.Joined, *, limit: int | None = None) -> Examples:
    """Rows with the hub's columns -> `Examples`.

    Args:
      task: its kind, domains and number of classes.
      split: "train" or "test"; test rows of common_gen with one concept_set_idx become one sample.
      rows: with the source's columns; pictures as bytes or {"bytes": ..., "path": ...}.
      limit: see `load`.

    Raises:
      UserError: no rows; no pictures, labels or texts for a task that needs them; several domains and nothing that
        tells them apart; an unreadable picture; an impossible label, subject or answer.
    """
    source, place = SOURCES[task.name], f"{task.name}/{split}"
    _check_source(task, source)
    columns = rows.columns([name for name in source.needed if name != source.image])  # images come one by one
    if not rows.count:
        raise UserError(f"data.root: {place} has no rows; put data there")
    groups = [[row] for row in range(rows.count)]
    if task.name == "common_gen" and split == "test":
        by_set: dict[int, list[int]] = {}
        for row, index in enumerate(columns["concept_set_idx"]):
            by_set.setdefault(index, []).append(row)
        groups = list(by_set.values())
    if limit is not None and limit < len(groups):
        kept = np.random.default_rng(_SPLIT_SEED).permutation(len(groups))[:limit]
        groups = [groups[i] for i in np.sort(kept)]
    chosen = [group[0] for group in groups]
    fields: dict = {"domains": np.zeros(len(chosen), np.int32)}
    if source.image:
        images = zip(chosen, rows.entries(source.image, chosen), strict=True)
        fields["images"] = np.stack([to_rgb64(image, where=f"{place} row {row}") for row, image in images])
    if source.label:
        fields["labels"] = _labels(task, place, columns[source.label], chosen)
    if task.name in TEMPLATES:
        cut = [[_cut(task, place, columns, row) for row in group] for group in groups]
        fields["inputs"] = tuple(group[0][0] for group in cut)
        fields["references"] = tuple(tuple(target for _, target in group) for group in cut)
        fields["targets"] = tuple(group[0] for group in fields["references"])
    elif "text" in source.columns:
        fields["inputs"] = tuple(columns["text"][row] for row in chosen)
    if task.name == "mmlu":
        fields["domains"] = _domains(task, place, columns["subject"], chosen)
    return Examples(**fields)


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


def _cut(task: Task, place: str, columns: Columns, row: int) -> tuple[str, str]:
    record = {name: columns[name][row] for name in SOURCES[task.name].columns}
    if "choices" in record and not 0 <= record["answer"] < len(record["choices"]):
        raise UserError(f"{place} row {row}: answer {record['answer']} of {len(record['choices'])} choices; mend it")
    return TEMPLATES[task.name](record)


def _labels(task: Task, place: str, column: Sequence, rows: Sequence[int]) -> np.ndarray:
    labels = np.array([column[row] for row in rows], np.int32)
    wrong = np.flatnonzero((labels < 0) | (labels >= task.classes))
    if len(wrong):
        raise UserError(
            f"{place} row {rows[wrong[0]]}: label {labels[wrong[0]]} is not in 0..{task.classes - 1}; "
            f"set classes of {task.name} to {labels.max() + 1} or mend the data"
        )
    return labels


def _domains(task: Task, place: str, subjects: Sequence, rows: Sequence[int]) -> np.ndarray:
    unknown = {subjects[row] for row in rows if MMLU_DOMAINS.get(subjects[row]) not in task.domains}
    if unknown:
        raise UserError(f"{place}: subject {sorted(unknown)[0]} has no domain among {task.domains}; remove its rows")
    return np.array([task.domains.index(MMLU_DOMAINS[subjects[row]]) for row in rows], np.int32)


def divide_by_image(images: Iterable[Mapping], *, train_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides rows in two so that no picture is in both (VQA v2 asks several questions per picture).

    Pictures are told apart by their bytes, shuffled by `seed`, and taken with all their rows as long as `train_rows`
    is not exceeded.

    Returns:
      int64 row numbers of train (at most `train_rows`) and of test (the rest), each ascending.
    """
    rows_of: dict[bytes, list[int]] = {}
    for row, image in enumerate(images):
        rows_of.setdefault(
            hashlib.sha256(image["bytes"] or pathlib.Path(image["path"]).read_bytes()).digest(), []
        ).append(row)
    pictures = list(rows_of.values())
    train, test = [], []
    for i in np.random.default_rng(seed).permutation(len(pictures)):
        (train if len(train) + len(pictures[i]) <= train_rows else test).extend(pictures[i])
    return np.sort(np.array(train, np.int64)), np.sort(np.array(test, np.int64))


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
