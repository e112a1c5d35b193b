"""Rows of a data set, read by the `datasets` library: from the hub, or from files as people have them.

A folder may hold parquet, csv, json lines or arrow files (also of `Dataset.save_to_disk`), or images in a folder per
class, in any number of files. Which split a file belongs to is said by a word in its name or in its folder's name:
`train.csv`, `data/train-00000-of-00002.parquet`, `test/cat/1.png`. Files are read in the order of their names, a batch
of rows at a time, and nothing is copied.
"""

import csv
import dataclasses
import functools
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from tap_jax.errors import UserError

_READERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".arrow": "arrow",
}
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_ABOUT_IMAGES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # the library's, with a column file_name
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # the library's
_ROLES = {"train": (("train", "training"),), "test": (("test", "testing"), ("validation", "valid", "val", "dev"))}
_WORDS = tuple(word for tiers in _ROLES.values() for tier in tiers for word in tier)
_USES = {"train": "train on", "test": "test on"}
_FOLDER = "imagefolder"  # the library's reader of images
_ROWS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Files:
    """One split in local files.

    Attributes:
      place: the folder or file that was named.
      reader: the library's name of the format.
      splits: "train" and "test" -> their files, or only the split that was asked for.
      split: which one.
      divided: the same files serve both splits, so they have to be divided.
    """

    place: pathlib.Path
    reader: str
    splits: Mapping[str, tuple[pathlib.Path, ...]]
    split: str
    divided: bool = False

    @property
    def name(self) -> str:
        """For messages: the file, or the folder where there are several."""
        mine = self.splits[self.split]
        return str(mine[0] if len(mine) == 1 else self.place)

    @property
    def identity(self) -> list:
        """JSON that changes with the files."""
        files = [
            [split, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
            for split, paths in self.splits.items()
            for path in paths
        ]
        return [self.reader, self.split, self.divided, hashlib.sha256(repr(files).encode()).hexdigest()]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a split; columns are read when they are asked for.

    Attributes:
      dataset: `datasets.Dataset` or `datasets.IterableDataset`.
      place: where they are, for messages.
      wrong: what to say where they cannot be read, before and after the reason.
      kept: int64, ascending: only these rows of it; None for all.
    """

    dataset: Any
    place: str
    wrong: tuple[str, str]
    kept: np.ndarray | None = None

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The columns."""
        known = self.dataset.column_names
        if known is None:  # of csv and json, which are not looked into before they are read
            known = next((batch.column_names for batch in self._batches(None)), ())
        return tuple(known)

    @property
    def features(self) -> Mapping[str, Any]:
        """Column -> the library's feature, such as `ClassLabel`, where the files say so."""
        return self.dataset.features or {}

    @functools.cached_property
    def count(self) -> int:
        """How many there are."""
        if self.kept is not None:
            return len(self.kept)
        if hasattr(self.dataset, "__len__"):
            return len(self.dataset)
        import datasets

        plain = (datasets.Value, datasets.ClassLabel)
        small = [name for name, kind in self.features.items() if isinstance(kind, plain) and "binary" not in kind.dtype]
        return sum(batch.num_rows for batch in self._batches((small or self.names)[:1] or None))

    def columns(self, names: Sequence[str]) -> dict[str, list]:
        """Whole columns, in memory."""
        found: dict[str, list] = {name: [] for name in names}
        if names:
            for batch in self._batches(names):
                for name in names:
                    found[name].extend(_entries(batch[name]))
        if self.kept is not None:
            found = {name: [column[row] for row in self.kept] for name, column in found.items()}
        return found

    def entries(self, name: str, rows: Sequence[int] | np.ndarray | None = None) -> Iterator:
        """The entries of one column one after the other, a batch in memory at a time.

        Args:
          name: of the column.
          rows: ascending, only these; None for all.
        """
        wanted = self.kept
        if rows is not None:
            wanted = np.asarray(rows, np.int64) if wanted is None else wanted[np.asarray(rows, np.int64)]
        start = 0
        for batch in self._batches((name,)):
            stop = start + batch.num_rows
            if wanted is None:
                yield from _entries(batch[name])
            else:
                first, last = np.searchsorted(wanted, (start, stop))
                if first < last:
                    yield from _entries(batch[name].take(wanted[first:last] - start))
                if last == len(wanted):
                    return
            start = stop

    def take(self, rows: np.ndarray) -> "Rows":
        """Only these rows, int64 ascending."""
        return dataclasses.replace(self, kept=rows if self.kept is None else self.kept[rows])

    def _batches(self, names: Sequence[str] | None) -> Iterator:
        """Arrow tables of the columns."""
        chosen = self.dataset if names is None else self.dataset.select_columns(list(names))
        batches = chosen.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
        while True:
            with self._readable():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _readable(self) -> "readable":
        return readable(*self.wrong)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Rows of several places, one after the other.

    Attributes:
      parts: one or more.
    """

    parts: tuple[Rows, ...]

    @functools.cached_property
    def count(self) -> int:
        """How many there are."""
        return sum(part.count for part in self.parts)

    def classes(self, name: str) -> list:
        """A column as `columns` has it, but by their names where the files number classes and name them."""
        found: list = []
        for part in self.parts:
            named, column = getattr(part.features.get(name), "names", None), part.columns((name,))[name]
            known = named and dict(enumerate(named))
            found += [known.get(entry, entry) for entry in column] if known else column
        return found

    def columns(self, names: Sequence[str]) -> dict[str, list]:
        """Whole columns, in memory."""
        found = [part.columns(names) for part in self.parts]
        return {name: [entry for columns in found for entry in columns[name]] for name in names}

    def entries(self, name: str, rows: Sequence[int]) -> Iterator:
        """As of `Rows`."""
        wanted, start = np.asarray(rows, np.int64), 0
        for part in self.parts:
            stop = start + part.count
            first, last = np.searchsorted(wanted, (start, stop))
            yield from part.entries(name, wanted[first:last] - start)
            start = stop


def _entries(column: Any) -> list:
    """An arrow column as Python's values; what a json file has of several types comes as JSON, and is decoded."""
    entries = column.to_pylist()
    if str(column.type) != "extension<arrow.json>":
        return entries
    return [None if entry is None else json.loads(entry) for entry in entries]


class readable:  # noqa: N801 - used like a function
    """A context in which the library's complaints become one line: `before` (reason) `after`.

    What it logs of them besides is not shown.

    Raises:
      UserError: what was read in it cannot be.
    """

    def __init__(self, before: str, after: str):
        self.before, self.after = before, after
        self.log = logging.getLogger("datasets")
        self.level = self.log.level

    def __enter__(self) -> None:
        self.log.setLevel(logging.CRITICAL + 1)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.log.setLevel(self.level)
        import datasets
        import pyarrow

        known = (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
        if isinstance(error, known) and not isinstance(error, UserError):
            said = str(error.__cause__ or error).strip() or type(error).__name__
            after = "; save it as UTF-8" if "codec can't decode" in said else self.after
            raise UserError(f"{self.before} ({said.splitlines()[0]}){after}") from error


def local(
    place: pathlib.Path, split: str, *, named: tuple[str, str] = ("", ""), parts: Sequence[str] = (), field: str
) -> list[Files]:
    """Finds a split's files in a folder, or takes a file as it is.

    Where the folder has both `train.parquet` and `test.parquet`, they are the splits, whatever else is there.

    Args:
      place: the folder or file.
      split: "train" or "test".
      named: what the files call training and test data where they have no `train`, such as ("test", "validation"); the
        same name twice: those files are to be divided. A name "" is found: train, and test or else validation.
      parts: sub-folders to be put one after the other where they are all there.
      field: named in errors.

    Returns:
      One `Files`, or one for each of the sub-folders `parts`.

    Raises:
      UserError: nothing that can be read, files of several formats, no such split, or several that could be it.
    """
    if parts and all((place / part).is_dir() for part in parts):
        return [found for part in parts for found in local(place / part, split, named=named, field=field)]
    plain = {role: (place / f"{role}.parquet",) for role in _ROLES}
    if all(path.is_file() for (path,) in plain.values()):
        return [Files(place, "parquet", {split: plain[split]}, split)]
    reader, by_word = _sorted_out(place, field)
    roles = tuple(_ROLES) if reader == _FOLDER else (split,)
    words = {role: _word(place, role, tuple(by_word), named, field) for role in roles}
    # The classes of an image folder are those of both splits.
    files = {role: by_word[word] for role, word in words.items() if role == split or word != words[split]}
    divided = "" != named[0] == named[1] == words[split]
    return [Files(place, reader, files, split, divided)]


def _sorted_out(place: pathlib.Path, field: str) -> tuple[str, dict[str, tuple[pathlib.Path, ...]]]:
    """The library's reader for what is in a place, and the files by the word for their split."""
    files = [place] if place.is_file() else sorted(_files_below(place))
    readers: dict[str, list[pathlib.Path]] = {}
    for path in files:
        suffix = path.suffix.lower()
        if path.name not in (*_NO_ROWS, *_ABOUT_IMAGES) and suffix in _READERS:
            readers.setdefault(_READERS[suffix] + suffix * (suffix == ".tsv"), []).append(path)
    if len(readers) > 1:
        shown = " and ".join(str(paths[0].relative_to(place)) for paths in readers.values())
        raise UserError(f"{field}: {place} has {shown}; keep the files of one format")
    if readers:
        ((reader, mine),) = readers.items()
    else:
        reader = _FOLDER
        mine = [path for path in files if path.suffix.lower() in _IMAGES or path.name in _ABOUT_IMAGES]
    if not mine and place.is_file():
        raise UserError(
            f"{field}: {place.name} is of no format that is read; unpack it, or save it as parquet, csv or json lines"
        )
    if not mine:
        among = f", but {files[0].name}" if files else ""  # it may be data in another form, such as train.csv.gz
        raise UserError(
            f"{field}: {place} has no data (parquet, csv, json lines, arrow or images{among}); put"
            " train.parquet and test.parquet there, or other files with train and test in their names"
        )
    by_word: dict[str, list[pathlib.Path]] = {}
    for path in mine:
        by_word.setdefault(_word_of(path.relative_to(place), reader == _FOLDER), []).append(path)
    return reader, {word: tuple(paths) for word, paths in by_word.items()}


def _files_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files in a folder and in folders below it, but hidden ones."""
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (pathlib.Path(where, name) for name in names if not name.startswith("."))


def _word_of(path: pathlib.Path, folders_only: bool) -> str:
    """The first of `_WORDS` that is a folder's name, else the first in the file's; "" for none."""
    words = [part.lower() for part in path.parts[:-1]]
    if not folders_only:
        words += re.findall("[a-z]+", path.stem.lower())
    return next((word for word in words if word in _WORDS), "")


def _word(place: pathlib.Path, split: str, words: tuple[str, ...], named: tuple[str, str], field: str) -> str:
    """What the files call a split."""
    mine = named[split == "test"]
    if mine != split and mine in words and ("train" not in words or named[0] == "train"):
        return mine
    for tier in _ROLES[split]:
        found = [word for word in words if word in tier]
        if len(found) > 1:
            raise UserError(
                f"{field}: {place} has two splits to {_USES[split]}, {' and '.join(found)}; remove or rename one"
            )
        if found:
            return found[0]
    if split == "train" and "" in words:
        return ""
    present = ", ".join(word or "files without a split in their name" for word in words)
    raise UserError(
        f"{field}: {place} has nothing to {_USES[split]} (it has {present}); name files or a folder there"
        f" '{split}', such as {split}.parquet, {split}-00000-of-00002.parquet or {split}/"
    )


def of_files(files: Files, *, field: str = "data.root") -> Rows:
    """Opens local files.

    Args:
      files: of `local`.
      field: named in errors.

    Raises:
      UserError: they cannot be read in their format.
    """
    import datasets

    reader, _, tabs = files.reader.partition(".")
    wrong = f"{field}: {files.name} is not readable as {'images' if reader == _FOLDER else reader}", "; replace it"
    options: dict[str, Any] = {"batch_size": _ROWS_AT_ONCE} if reader == "parquet" else {}
    patterns = {split: [glob.escape(str(path.absolute())) for path in paths] for split, paths in files.splits.items()}
    with readable(*wrong), tempfile.TemporaryDirectory() as scratch:  # for the library's lock; nothing else goes there
        if reader == "csv":
            options = _as_texts(files.splits[files.split], "\t" if tabs else ",")
        builder = datasets.load_dataset_builder(reader, data_files=patterns, cache_dir=scratch, **options)
        dataset = builder.as_streaming_dataset(files.split)
    return Rows(dataset, files.name, wrong)


def _as_texts(paths: Sequence[pathlib.Path], separator: str) -> dict[str, Any]:
    """Options by which csv cells stay the texts that they are: 007 and NA, too. An empty cell is null.

    Columns are those that all files have, in any order.
    """
    import datasets

    headers = []
    for path in paths:
        with open(path, encoding="utf-8-sig", newline="") as file:
            headers.append(next(csv.reader(file, delimiter=separator), []))
    common = [name for name in headers[0] if name and all(name in header for header in headers)]
    features = datasets.Features({name: datasets.Value("string") for name in common}) if common else None
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}


def of_hub(
    name: str,
    config: str | None,
    split: str,
    *,
    cache_dir: str | None = None,
    field: str = "data.root",
    guessed: bool = False,
) -> Rows:
    """Opens a split of a data set of the hub, which is downloaded once.

    Args:
      name: of its repository.
      config: one of its configurations; None for the default one.
      split: as it is called there.
      cache_dir: where the library keeps it; None for the library's own place.
      field: named in errors.
      guessed: the name could be that of a folder that is missing.

    Raises:
      UserError: it is not to be had.
    """
    import datasets

    missing = f"there is no folder {name}, and as a data set of the hub it cannot be loaded"
    wrong = f"{field}: {missing if guessed else f'cannot load {name}'}", "; check the network or use a local folder"
    with readable(*wrong):
        dataset = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    return Rows(dataset, name, wrong)
