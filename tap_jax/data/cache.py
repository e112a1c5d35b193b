"""Converted splits on disk: pictures in an .npy that is mapped into memory, all else in an .npz beside it.

Arrays are kept as they are and texts as JSON; nothing is ever unpickled.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tap_jax.data.examples import Examples
from tap_jax.tasks import Task
from tap_jax.whole_files import replaced

FORMAT = 4  # raise it when the conversion changes
_LOG = logging.getLogger(__name__)


def cache_path(cache_dir: str, task: Task, split: str, settings: Sequence) -> pathlib.Path:
    """A file name that changes with the source (`settings`: JSON values) and with the conversion."""
    described = json.dumps([FORMAT, dataclasses.astuple(task), split, settings])
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    return pathlib.Path(cache_dir) / f"{task.name}-{split}-{digest}.npz"


def write_cache(path: pathlib.Path, examples: Examples) -> None:
    """Stores a split; a reader meanwhile sees the old file or the new one, never half of it."""
    arrays: dict[str, Any] = {name: value for name, value in vars(examples).items() if isinstance(value, np.ndarray)}
    pictures = arrays.pop("images", None)
    texts = {name: getattr(examples, name) for name in ("inputs", "targets", "references", "clients", "notes")}
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if pictures is not None:
        arrays["checksum"] = np.array(_checksum(pictures), np.uint32)
        with replaced(_pictures(path), shared=True) as fresh, open(fresh, "wb") as file:
            np.save(file, pictures)
    with replaced(path, shared=True) as fresh, open(fresh, "wb") as file:  # to a name, savez would add its suffix
        np.savez(file, **arrays)


def read_cache(path: pathlib.Path) -> Examples | None:
    """The stored split, its pictures mapped and not copied; None where there is no usable file."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if "checksum" in arrays:
            arrays["images"] = np.load(_pictures(path), mmap_mode="r", allow_pickle=False)
            if _checksum(arrays["images"]) != arrays.pop("checksum"):
                raise ValueError("pictures are not those that were stored")
        texts = json.loads(arrays.pop("texts").tobytes())
        for name, value in texts.items():
            if value is not None:
                arrays[name] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        return Examples(**arrays)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        _LOG.warning("data: %s is damaged; building it anew", path)
        return None


def _pictures(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".npy")


def _checksum(pictures: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(pictures).data)
