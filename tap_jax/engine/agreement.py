"""What the processes of a run on several hosts have to decide alike, such as to stop or which checkpoint to use."""

import jax
import numpy as np
from jax.experimental import multihost_utils

_BYTES = 512  # of a text


def first_said(text: str) -> str:
    """The text of the first process that has one, cut to 512 bytes, the same in all of them; "" where none has any.

    Every process must call it, at the same place between the programs that it runs: the answer travels over the
    devices. A process that is alone gets its own text back.
    """
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer(text.encode()[:_BYTES].ljust(_BYTES, b"\0"), np.uint8)
    texts = [row.tobytes().rstrip(b"\0") for row in np.asarray(multihost_utils.process_allgather(mine))]
    return next(filter(None, texts), b"").decode(errors="ignore")


def any_says(flag: bool) -> bool:
    """Whether it is true in some process; to be called as `first_said`."""
    return bool(first_said("yes" if flag else ""))
