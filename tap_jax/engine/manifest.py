"""A tree of arrays as few flat ones and a manifest, and back, verified.

Orbax takes about a millisecond per array whatever its size, and a federation has thousands of small ones. Leaves under
`PACK_BELOW` bytes are therefore packed, one flat array per top-level entry of the tree and dtype; larger ones are
stored flat, each by itself and without a copy. The manifest, ready for JSON, says for every leaf where it lies, its
shape, dtype and CRC-32. Names of the tree, '/' included, occur in the manifest only, never in a file name.
"""

import zlib
from typing import Any

import jax
import numpy as np

# Leaves of older checkpoints -> today's; other leaves under `_GONE` are no longer kept.
_FORMER = {".finite['federated']": ".heard"}
_GONE = ".finite["
PACK_BELOW = 1 << 18  # bytes; such a leaf takes about as long to write as Orbax adds


def checksum(data: bytes | np.ndarray) -> int:
    """CRC-32 of the bytes of an array of any layout, or of bytes."""
    return zlib.crc32(data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8))


def _leaves(tree: Any) -> list[tuple[str, str, Any]]:
    """Top-level entry, full path and value of each leaf."""
    return [
        (jax.tree_util.keystr(path[:1]), jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def pack(tree: Any) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The flat arrays to store, by name, and the manifest's entry of every leaf, in the order of the tree."""
    parts: dict[str, list[np.ndarray]] = {}
    names: dict[tuple[str, str], str] = {}  # of the packs
    filled: dict[str, int] = {}  # elements in each so far
    entries = []
    for top, path, leaf in _leaves(tree):
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
            {"path": path, "shape": shape, "dtype": dtype, "array": name, "offset": offset, "crc32": checksum(array)}
        )
    arrays = {name: group[0] if len(group) == 1 else np.concatenate(group) for name, group in parts.items()}
    return {name: array for name, array in arrays.items() if array.size}, entries


def _size(entry: dict[str, Any]) -> int:
    return int(np.prod(entry["shape"], dtype=np.int64))


def abstract(entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
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


def expectation(like: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every leaf, by path and in the order of the tree."""
    return {
        path: (tuple(np.shape(leaf)), np.dtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype).name)
        for _, path, leaf in _leaves(like)
    }


def under_todays_names(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest's entries of an older version by the names of this one, without those that it does not keep."""
    named = [{**entry, "path": _FORMER.get(entry["path"], entry["path"])} for entry in entries]
    return [entry for entry in named if not entry["path"].startswith(_GONE)]


def match(entries: list[dict[str, Any]], expected: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises on the first difference between what is stored and what is expected."""
    stored = {entry["path"]: (tuple(entry["shape"]), entry["dtype"]) for entry in entries}
    for path, kind in expected.items():
        if path not in stored:
            raise ValueError(f"has no {path}; it is of other settings or data")
        if stored[path] != kind:
            raise ValueError(f"{path} is {_kind(stored[path])}, not {_kind(kind)}; it is of other settings or data")
    for path in stored:
        if path not in expected:
            raise ValueError(f"has {path}, which is not expected; it is of other settings or data")


def _kind(kind: tuple[tuple[int, ...], str]) -> str:
    return f"{kind[1]}[{', '.join(map(str, kind[0]))}]"


def unpack(arrays: dict[str, np.ndarray], entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Every leaf by path, verified."""
    leaves = {}
    for entry in entries:
        dtype, size = jax.numpy.dtype(entry["dtype"]), _size(entry)
        if not size:
            leaves[entry["path"]] = np.zeros(entry["shape"], dtype)
            continue
        flat = np.asarray(arrays[entry["array"]])[entry["offset"] : entry["offset"] + size]
        if flat.dtype != dtype or flat.size != size or checksum(flat) != entry["crc32"]:
            raise ValueError(f"{entry['path']} is damaged: its checksum differs")
        # Packed leaves become their own arrays, so that one does not keep its whole group alive.
        flat = flat.copy() if size < arrays[entry["array"]].size else flat
        leaves[entry["path"]] = flat.reshape(entry["shape"])
    return leaves
