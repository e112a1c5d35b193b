"""What a run's devices are: their kind, memory and peaks; asked once, of devices that are here or of a target's.

Peaks are from the makers' data sheets. Other forms of the same chips (NVL, a part of one under MIG) have other peaks,
so whole names are matched.
"""

import dataclasses
import os
import re
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Platform:
    """One kind of device.

    Attributes:
      kind: "cpu", "gpu" or "tpu".
      device: JAX's name of the device.
      memory: bytes that a program can use on one device; None where it shares the host's, or is not known.
      peak: dense bfloat16 FLOP/s of one device; None where not known.
      bandwidth: bytes/s between a device and its memory; None where not known.
    """

    kind: str
    device: str
    memory: int | None = None
    peak: float | None = None
    bandwidth: float | None = None

    @property
    def accelerated(self) -> bool:
        """Whether it is no CPU."""
        return self.kind != "cpu"


# (name, kind, memory, peak in TFLOP/s, bandwidth in GB/s). The memory of a TPU is what its compiler lets programs have.
_KNOWN = (
    (r"NVIDIA H200( SXM.*)?", "gpu", 141e9, 989.0, 4800.0),
    (r"NVIDIA H100( SXM\d?)?( 80GB)?( HBM3)?", "gpu", 84942979072, 989.0, 3352.0),
    (r"NVIDIA H100 PCIe", "gpu", 84942979072, 756.0, 2039.0),
    (r"NVIDIA A100.*40GB( PCIe)?", "gpu", 42298834944, 312.0, 1555.0),
    (r"NVIDIA A100.*GB( PCIe)?", "gpu", 85100068864, 312.0, 2039.0),
    (r"TPU v4", "tpu", 31.25 * GIB, 275.0, 1228.0),
    (r"TPU (v5e|v5 lite)", "tpu", 15.75 * GIB, 197.0, 819.0),
    (r"TPU (v5p|v5)", "tpu", 95.74 * GIB, 459.0, 2765.0),
    (r"TPU (v6e|v6 lite)", "tpu", 31.25 * GIB, 918.0, 1640.0),
)


def platform_of(device: jax.Device) -> Platform:
    """The platform of a device, which need not be here (`jax.experimental.topologies`)."""
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    platform = known(kind, device.device_kind)
    if not platform.accelerated:
        return platform
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a device that is not here has none to look at; each plugin says so in its own way
        limit = None
    return dataclasses.replace(platform, memory=int(limit)) if limit else platform


def known(kind: str, device_kind: str) -> Platform:
    """What data sheets say of a device by JAX's name of it."""
    for pattern, of, memory, peak, bandwidth in _KNOWN:
        if of == kind and re.fullmatch(pattern, device_kind):
            return Platform(kind, device_kind, int(memory), peak * 1e12, bandwidth * 1e9)
    return Platform(kind, device_kind)


def here() -> Platform:
    """The platform of this process's devices."""
    if jax.default_backend() == "cpu":  # asks for no device, so that JAX need not have met the other processes
        return Platform("cpu", "cpu")
    return dataclasses.replace(platform_of(jax.local_devices()[0]), kind=jax.default_backend())


def peak_tflops(device_kind: str, dtype: str) -> float | None:
    """Dense TFLOP/s of one device at most; None where it is not known, or computes in another type than bfloat16."""
    if dtype != "bfloat16" or "MIG" in device_kind:
        return None
    found = [known(kind, device_kind).peak for kind in ("gpu", "tpu")]
    return next((peak / 1e12 for peak in found if peak), None)


def compiler_options(platform: Platform | None = None, *, once: bool = False) -> dict[str, Any] | None:
    """Options for `jax.jit` on a platform (default: this process's), where compiling takes longer than it saves.

    On CPU, LLVM's level 1 makes programs as fast as its level 3 for three quarters of the compile time (measured on
    the demo's local training); `once` asks for level 0, for programs that run only once. And operations are put in the
    order that needs least memory rather than the one in which most could run at a time: a step of FLAVA at base size
    takes a third of the memory, and no more time, since each core has clients or products of its own. Accelerators keep
    theirs, and a level that is set in XLA_FLAGS holds.
    """
    told = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    if told or (platform or here()).accelerated:
        return None
    return {
        "xla_backend_optimization_level": 0 if once else 1,
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    }
