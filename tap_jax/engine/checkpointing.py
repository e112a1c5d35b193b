"""Checkpoints of a run: atomic, verified when read, the newest whole one wins. Orbax lives only here.

What is stored: Orbax takes about a millisecond per array whatever its size, and a federation has thousands of small
ones. Leaves under `PACK_BELOW` bytes are therefore packed, one flat array per top-level entry of the tree and dtype;
larger ones are stored flat, each by itself and without a copy. A manifest (JSON in Orbax's custom metadata, with a
checksum of its own) says for every leaf where it lies, its shape, dtype and CRC-32. Names of the tree, '/' included,
occur in the manifest only, never in a file name.
"""

import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from tap_jax.errors import UserError

PACK_BELOW = 1 << 18  # bytes; such a leaf takes about as long to write as Orbax adds
_FORMAT = 1
_TRASH = ".deleted-"


class Checkpoints:
    """The checkpoints of one run in one folder, named by step.

    Attributes:
      notes: one line for each checkpoint that `restore_latest` passed over, and why.

    Example:
      >>> checkpoints = Checkpoints(workdir / "checkpoints")
      >>> checkpoints.save(10, {"server": {"mote/image/attention": weights}}, {"config": "9f86d0"})
      >>> step, tree, metadata = checkpoints.restore_latest({"server": {"mote/image/attention": weights}})
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, report: Callable[[str], None] | None = None):
        """Opens a folder; nothing is created before the first save.

        Args:
          folder: holds one sub-folder per step, and nothing else.
          keep: how many of the newest to keep.
          report: is called with every line that goes to `notes`.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = pathlib.Path(folder).absolute()
        self.keep = keep
        self.notes: list[str] = []
        self._report = report

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Writes one checkpoint, then removes those beyond `keep`.

        A writer that is killed leaves a folder under another name, which the next save clears away. Checkpoints of
        later steps belong to a future that a resume has given up (they were not whole): they are removed too.
        On several hosts every process calls this with the same host arrays; the first one writes.

        Args:
          step: >= 0; an existing checkpoint of it is replaced.
          tree: arrays (numpy, or jax with all shards here) in dicts, lists, tuples, dataclasses; None is kept.
          metadata: whatever JSON can say.
        """
        arrays, entries = _pack(tree)
        manifest = json.dumps({"leaves": entries, "metadata": metadata})
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights shrink by 8 %, at half the speed
        with context:
            ocp.save(
                self.folder / str(step),
                arrays,
                overwrite=True,
                custom_metadata={"format": _FORMAT, "manifest": manifest, "checksum": _checksum(manifest.encode())},
            )
        if jax.process_index() == 0:
            self._tidy(step)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or not, in rising order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole and fits.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes to expect.

        Returns:
          The step, a tree like `like` of numpy arrays, bit for bit as saved, and the metadata; None where there are no
          checkpoints at all. Each one passed over adds a line to `notes`.

        Raises:
          UserError: there are checkpoints, but none that is whole and fits.
        """
        steps, problems, expected = self.steps(), [], _expected(like)
        for step in reversed(steps):
            try:
                tree, metadata = self._restore(step, like, expected)
            # Damage shows in as many ways as there are layers below: JSON, tensorstore, Orbax, the file system.
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                problems.append(f"checkpoint {step} passed over: {reason}")
                self.notes.append(problems[-1])
                if self._report:
                    self._report(problems[-1])
            else:
                return step, tree, metadata
        if steps:
            raise UserError(
                f"checkpoints in {self.folder}: none of {len(steps)} can be used ({problems[0]});"
                " delete the folder or choose another workdir to start afresh"
            )
        return None

    def _restore(self, step: int, like: Any, expected: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Reads and verifies one checkpoint; raises whatever is wrong with it."""
        path = self.folder / str(step)
        custom = ocp.metadata(path).custom_metadata
        if not isinstance(custom, dict) or custom.get("format") != _FORMAT:
            raise ValueError("not written by this version")
        if _checksum(custom["manifest"].encode()) != custom["checksum"]:
            raise ValueError("the manifest is damaged")
        manifest = json.loads(custom["manifest"])
        entries = manifest["leaves"]
        _match(entries, expected)
        leaves = _unpack(ocp.load(path, _abstract(entries)), entries)
        tree = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), [leaves[leaf] for leaf in expected])
        return tree, manifest["metadata"]

    def _tidy(self, newest: int) -> None:
        """Removes what `save(newest, ...)` made obsolete; each folder is renamed first, so none is ever half there."""
        kept = [step for step in self.steps() if step <= newest][-self.keep :]
        for step in set(self.steps()) - set(kept):
            os.replace(self.folder / str(step), self.folder / f"{_TRASH}{step}")
        for path in self.folder.iterdir():
            if path.name.startswith(_TRASH) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)


def _checksum(data: bytes | np.ndarray) -> int:
    return zlib.crc32(data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8))


def _leaves(tree: Any) -> list[tuple[str, str, Any]]:
    """Top-level entry, full path and value of each leaf."""
    return [
        (jax.tree_util.keystr(path[:1]), jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _pack(tree: Any) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The flat arrays to store, by name, and the manifest's entry of every leaf, in the order of the tree."""
    parts: dict[str, list[np.ndarray]] = {}
    names: dict[tuple[str, str], str] = {}  # of the packs
    filled: dict[str, int] = {}  # elements in each so far
    entries = []
    for top, path, leaf in _leaves(tree):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            raise TypeError(f"leaf {path} is a typed PRNG key; save jax.random.key_data(key)")
        array = np.asarray(leaf)
        shape, dtype, array = array.shape, array.dtype.name, np.ascontiguousarray(array).reshape(-1)
        if array.nbytes >= PACK_BELOW:
            name, offset = f"leaf{len(entries)}", 0
            parts[name] = [array]
        else:
            name = names.setdefault((top, dtype), f"pack{len(names)}_{dtype}")
            offset = filled.get(name, 0)
            filled[name] = offset + array.size
            parts.setdefault(name, []).append(array)
        entries.append(
            {"path": path, "shape": shape, "dtype": dtype, "array": name, "offset": offset, "crc32": _checksum(array)}
        )
    arrays = {name: group[0] if len(group) == 1 else np.concatenate(group) for name, group in parts.items()}
    return {name: array for name, array in arrays.items() if array.size}, entries


def _size(entry: dict[str, Any]) -> int:
    return int(np.prod(entry["shape"], dtype=np.int64))


def _abstract(entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What the manifest says is stored: arrays that take no memory."""
    sizes: dict[str, tuple[int, str]] = {}
    for entry in entries:
        end = entry["offset"] + _size(entry)
        sizes[entry["array"]] = (max(end, sizes.get(entry["array"], (0, ""))[0]), entry["dtype"])
    return {
        name: np.broadcast_to(np.zeros((), jax.numpy.dtype(dtype)), (size,))
        for name, (size, dtype) in sizes.items()
        if size
    }


def _expected(like: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every leaf, by path and in the order of the tree."""
    return {
        path: (tuple(np.shape(leaf)), np.dtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype).name)
        for _, path, leaf in _leaves(like)
    }


def _match(entries: list[dict[str, Any]], expected: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises on the first difference between what is stored and what is expected."""
    stored = {entry["path"]: (tuple(entry["shape"]), entry["dtype"]) for entry in entries}
    for path, kind in expected.items():
        if path not in stored:
            raise ValueError(f"has no {path}; it is of another configuration")
        if stored[path] != kind:
            raise ValueError(f"{path} is {_kind(stored[path])}, not {_kind(kind)}; it is of another configuration")
    for path in stored:
        if path not in expected:
            raise ValueError(f"has {path}, which is not expected; it is of another configuration")


def _kind(kind: tuple[tuple[int, ...], str]) -> str:
    return f"{kind[1]}[{', '.join(map(str, kind[0]))}]"


def _unpack(arrays: dict[str, np.ndarray], entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Every leaf by path, verified."""
    leaves = {}
    for entry in entries:
        dtype, size = jax.numpy.dtype(entry["dtype"]), _size(entry)
        if not size:
            leaves[entry["path"]] = np.zeros(entry["shape"], dtype)
            continue
        flat = np.asarray(arrays[entry["array"]])[entry["offset"] : entry["offset"] + size]
        if flat.dtype != dtype or flat.size != size or _checksum(flat) != entry["crc32"]:
            raise ValueError(f"{entry['path']} is damaged: its checksum differs")
        # Packed leaves become their own arrays, so that one does not keep its whole group alive.
        flat = flat.copy() if size < arrays[entry["array"]].size else flat
        leaves[entry["path"]] = flat.reshape(entry["shape"])
    return leaves
