"""Measured memory: what there is, and what a process and its devices have held at most so far."""

import ctypes
import os
import pathlib
import resource
import sys
from collections.abc import Iterable

import jax


def peak_memory(devices: Iterable[jax.Device]) -> dict[str, int]:
    """Bytes: "peak_host_bytes" of this process and, where devices tell, "peak_device_bytes" of the fullest of them."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return found | ({"peak_device_bytes": max(peaks)} if all(peaks) else {})


def machine_memory() -> int:
    """Bytes that this process can hope for: the machine's, or its container's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = pathlib.Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdecimal() else physical


def give_back_memory() -> None:
    """Gives back to the system what is free in the C library's heap; compilers leave gigabytes there.

    Only glibc keeps it, and only glibc has a way; elsewhere nothing happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
