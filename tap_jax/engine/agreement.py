"""What the processes of a run on several hosts have to decide alike, such as to stop or which checkpoint to use.

Whatever is here travels over the devices: every process must call it, at the same place between the programs that it
runs. A process that is alone agrees with itself.
"""

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from tap_jax.errors import UserError

_BYTES = 512  # of a text


def first_said(text: str) -> str:
    """The text of the first process that has one, cut to 512 bytes, the same in all of them; "" where none has any.

    A process that is alone gets its own text back, whole.
    """
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer(text.encode()[:_BYTES].ljust(_BYTES, b"\0"), np.uint8)
    texts = [row.tobytes().rstrip(b"\0") for row in np.asarray(multihost_utils.process_allgather(mine))]
    return next(filter(None, texts), b"").decode(errors="ignore")


def any_says(flag: bool) -> bool:
    """Whether it is true in some process."""
    return bool(first_said("yes" if flag else ""))


def all_said(message: bytes) -> list[bytes]:
    """Every process's message, of any length, by its index."""
    if jax.process_count() == 1:
        return [message]
    lengths = np.ravel(multihost_utils.process_allgather(np.array(len(message), np.int32)))
    mine = np.frombuffer(message.ljust(max(1, lengths.max()), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    return [row.tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """A block that all processes leave together; where it fails in some, it fails in all.

    Raises:
      UserError: the block raised an OSError or UserError in another process; in that one its own goes on.
    """
    failed: OSError | UserError | None = None
    try:
        yield
    except (OSError, UserError) as error:
        failed = error
    reason = first_said(_reason(failed) if failed else "")
    if failed:
        raise failed
    if reason:
        raise UserError(reason)


def _reason(error: OSError | UserError) -> str:
    if isinstance(error, OSError) and error.errno:
        return f"workdir: {os.strerror(error.errno)}: {error.filename}; free some space or mend the folder"
    return str(error)
