"""A file of equally long rows of float32, mapped into memory.

Reading copies out of the map, and lets go of its pages: else they would count as this process's memory until the system
needs them. Writing goes through the file, so that a full disk is an OSError and not a SIGBUS.
"""

import mmap
import os
import pathlib
import weakref
from typing import IO

import numpy as np


class RowFile:
    """One file of rows of n float32; without any there need be no file.

    Attributes:
      stride: bytes of a row. rows: how many the file has room for. free: those without a reference, the next one last.
    """

    def __init__(self, path: pathlib.Path, n: int):
        self.path, self.stride, self.free = path, 4 * n, []
        try:
            self.rows = path.stat().st_size // self.stride
        except OSError:
            self.rows = 0
        self._map: mmap.mmap | None = None
        self._descriptor: int | None = None
        self._dirty = False

    def read(self, row: int) -> np.ndarray:
        """float32 [n]."""
        start, stop = row * self.stride, (row + 1) * self.stride
        if self._map is None or len(self._map) < stop:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = np.frombuffer(self._map[start:stop], np.float32)  # a slice of a map is a copy
        if found.nbytes < self.stride:
            raise OSError(f"{self.path} has no row {row}")
        first = start - start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):  # the pages stay in the system's cache, and no longer count as ours
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)
        return found

    def write(self, row: int, vector: np.ndarray) -> None:
        """Writes float32 [n]."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY)
            weakref.finalize(self, os.close, self._descriptor)
        left, at = memoryview(vector).cast("B"), int(row) * self.stride
        if len(left) != self.stride:
            raise ValueError(f"a row of {self.path} has {self.stride} bytes, not {len(left)}")
        self._dirty = True
        try:
            while left:
                written = os.pwrite(self._descriptor, left, at)
                left, at = left[written:], at + written
        except OSError as error:  # it knows no name
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def grow(self, count: int) -> None:
        """Adds free rows; they take no room on the disk before they are written."""
        self.path.touch()
        os.truncate(self.path, (self.rows + count) * self.stride)
        self.free = [*range(self.rows, self.rows + count)[::-1], *self.free]
        self.rows += count

    def sync(self) -> None:
        """What has been written is on the disk."""
        if self._dirty:
            self._dirty = False
            os.fsync(self._descriptor)


def flush(file: IO) -> None:
    """What was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: pathlib.Path) -> None:
    """The names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
