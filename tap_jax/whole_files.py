"""Files that are there whole or not at all: written beside, and then put in their place."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replaced(path: str | os.PathLike, *, shared: bool = False) -> Iterator[pathlib.Path]:
    """A name beside `path` for the body to write a file under, which takes the path's place at the end, in one step.

    A reader meanwhile finds the old file or the new one, never half of it, and after a loss of power, too. If the
    body or the exchange fails, the old file is as it was, nothing is left of the new one, and the error goes on as it
    is.

    Args:
      path: in a folder that is there.
      shared: processes may write this file at the same time: each has a name of its own. Else the name is always the
        same, so that what a kill leaves is written over.
    """
    path = pathlib.Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield fresh
        descriptor = os.open(fresh, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Puts the content, a text as UTF-8, under the path; see `replaced`.

    Raises:
      OSError: it cannot be written; what was under the path is still there.
    """
    with replaced(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)
