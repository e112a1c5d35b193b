"""Folders that are there whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from tap_jax.errors import UserError


def check_free(out: str | os.PathLike) -> pathlib.Path:
    """The folder to write, absolute.

    Raises:
      UserError: something is there already (an empty folder is fine), or it cannot be made.
    """
    out = pathlib.Path(out).resolve()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"out: {out} is not empty; name another folder or remove it")
    place = out
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"out: {place} is no folder; name another")
    if not os.access(out.parent if place == out else place, os.W_OK | os.X_OK):
        raise UserError(f"out: no permission to write in {place}; name another folder")
    return out


@contextlib.contextmanager
def staged(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A new folder beside `out` that takes its place at the end; if the body fails nothing of it is left.

    Folders above `out` are made where they are missing, and removed again if the body fails.

    Raises:
      UserError: see `check_free`.
    """
    out = check_free(out)
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def write_json(path: pathlib.Path, value: Any) -> None:
    """For people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
