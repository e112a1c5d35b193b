"""Files that one process at a time holds."""

import fcntl
import os


def hold(path: str | os.PathLike) -> int:
    """A descriptor that holds the file's lock until it is closed, which the end of the process does, however it comes.

    The file is made where it is missing. On a file system without locks no process is kept out.

    Raises:
      BlockingIOError: it is held, in this process or in another.
      OSError: the file can be neither opened nor made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor
