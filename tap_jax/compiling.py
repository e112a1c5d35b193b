"""How hard XLA works on a program, where the machine's own compiler is slower than what it saves."""

import os
from typing import Any

from tap_jax import platforms
from tap_jax.platforms import Platform


def compiler_options(platform: Platform | None = None, *, once: bool = False) -> dict[str, Any] | None:
    """Options for `jax.jit` on a platform; default: that of this process.

    On CPU, LLVM's level 1 makes programs as fast as its level 3 for three quarters of the compile time (measured on
    the demo's local training); `once` asks for level 0, for programs that run only once. And operations are put in the
    order that needs least memory rather than the one in which most could run at a time: a step of FLAVA at base size
    takes a third of the memory, and no more time, since each core has clients or products of its own. Accelerators keep
    theirs, and so does whoever has set a level in XLA_FLAGS.
    """
    told = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    if told or (platform or platforms.here()).accelerated:
        return None
    return {
        "xla_backend_optimization_level": 0 if once else 1,
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    }
