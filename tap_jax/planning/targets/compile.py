"""Compiles one lowered program for a target and says what the compiler says of it.

Nothing runs. A TPU's compiler refuses what does not fit and names the bytes needed; a GPU's does not refuse, so what
it reports is to be compared with the device's memory.
"""

import dataclasses
import pathlib
import re
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from tap_jax.planning.targets import hlo
from tap_jax.platforms import GIB, Platform

_OPTIONS = {
    "gpu": {
        # The compiler cannot time kernels without a device, and without autotuning its Triton products want tile sizes
        # that have not been chosen. That says nothing of a device that is there.
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_autotune_level": 0,
        # Where a softmax is a Triton kernel, the fusion pass looks for tiles of all that could join it, which takes
        # half of the compiler's time. Kernels themselves are of no interest here. Memory is the same without both.
        "xla_disable_hlo_passes": "triton-softmax-rewriter",
        "xla_backend_optimization_level": 0,
        "xla_gpu_disable_gpuasm_optimizations": True,
    },
    # A TPU's compiler looks for fast tiles of every product, which takes most of its time and changes memory little.
    "tpu": {"exec_time_optimization_effort": -1.0},
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Found:
    """What is known of one program on one device of the target.

    Attributes:
      name, phase, bodies: of the `programs.RunProgram`.
      seconds: of the compiler, on this machine; tracing is not in it. processor: its processor seconds, on all cores.
      arguments, temporaries: bytes.
      peak: bytes at most at a time.
      host: bytes that this process took at most while compiling; 0: not known.
      accessed: bytes read and written, by the compiler's own count of each instruction once; None where it gives none.
      inside, outside: kind -> collectives in loops and outside of them. transfers: instructions that reach the host.
      loops: row loops in the optimised program.
      problem: why there is no program; empty where there is one.
    """

    name: str
    phase: str = ""
    bodies: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    host: int = 0
    accessed: float | None = None
    inside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    outside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    transfers: int = 0
    loops: int = 0
    problem: str = ""

    def fits(self, platform: Platform) -> bool | None:
        """Whether a device has so much memory; None where that is not known."""
        if not self.peak or platform.memory is None:
            return None
        return self.peak <= platform.memory


class Built(NamedTuple):
    """What a process knows before it compiles anything.

    Attributes:
      about: lines on the target and how the run would lie on it.
      names: of the programs, in order.
      platform: of the devices. devices: how many.
      work: phase -> `roofline.Work` of one call. calls: phase -> how often a run makes it.
    """

    about: tuple[str, ...]
    names: tuple[str, ...]
    platform: Any
    devices: int
    work: dict[str, Any]
    calls: dict[str, float]


def compile_program(lower: Callable[[], jax.stages.Lowered], platform: Platform, **known) -> tuple[Found, str]:
    """Compiles -> (what is found, the optimised HLO's text, empty where there is none).

    Args:
      lower: traces the program.
      known: further attributes of what is returned: its name and the like.
    """
    lowered = lower()
    before, started, used = _reset_peak(), time.perf_counter(), _processor()
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS.get(platform.kind))
    except jax.errors.JaxRuntimeError as error:
        known |= {"seconds": time.perf_counter() - started, "processor": _processor() - used}
        needed = refused_bytes(str(error))
        if not needed:
            return Found(**known, problem=" ".join(str(error).split())[:200]), ""
        return Found(**known, peak=needed, host=_peak(before), problem="refused"), ""
    known |= {"seconds": time.perf_counter() - started, "processor": _processor() - used}
    memory = compiled.memory_analysis()
    text = compiled.as_text() or ""
    program = hlo.Program(text)
    inside, outside = hlo.collectives(program)
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    found = Found(
        **known,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        host=_peak(before),
        accessed=_accessed(compiled),
        inside=dict(inside),
        outside=dict(outside),
        transfers=len(hlo.host_transfers(program)),
        loops=hlo.row_loops(program),
    )
    return found, text


def refused_bytes(message: str) -> int:
    """The bytes that a program needs, out of a TPU compiler's refusal; 0 where it says nothing of memory.

    Example:
      >>> refused_bytes("Ran out of memory in memory space hbm. Used 32.00G of 15.75G hbm. Exceeded ...")
      34359738368
    """
    if not re.search(r"memory", message, re.IGNORECASE):
        return 0
    total = re.search(r"Total hbm usage >= ([\d.]+)([KMGT]?)", message)
    used = total or re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return int(float(used[1]) * _UNITS[used[2]]) if used else 0


def _accessed(compiled: jax.stages.Compiled) -> float | None:
    try:
        found = compiled.cost_analysis()
    except jax.errors.JaxRuntimeError:  # a GPU's compiler has none without a device
        return None
    value = (found or {}).get("bytes accessed")
    return float(value) if value and value > 0 else None


def _processor() -> float:
    """Seconds that this process and those that it has waited for (a GPU's assembler) have taken of processors."""
    found = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


_CLEAR, _STATUS = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")


def _reset_peak() -> bool:
    """Begins to measure this process's peak of memory anew; whether that can be had (Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak(measured: bool) -> int:
    if not measured:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return 1024 * int(found[1]) if found else 0


def gib(count: float) -> str:
    """Bytes in GiB, three digits."""
    return f"{count / GIB:.3g}"
