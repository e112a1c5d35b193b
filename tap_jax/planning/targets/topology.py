"""Devices of a target by its name: a GPU and how many of them (`h100x8`), or a TPU topology (`v5e:2x4`).

JAX makes such devices from a description; none of them has to be here. Programs are compiled for them, not run.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from tap_jax.errors import UserError
from tap_jax.platforms import Platform, known

# Of one device, as XLA's GPU specs give them (openxla/xla, among its GPU specs).
_GPU_COMMON = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
}
_A100 = {
    "core_count": 108,
    "fpus_per_core": 64,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "l2_cache_size": 41943040,
    "clock_rate_ghz": 1.41,
}
# name -> (JAX's name of the device, compute capability, figures)
GPUS = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        9,
        {
            "core_count": 132,
            "fpus_per_core": 128,
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "memory_bandwidth": 3352320000000,
            "l2_cache_size": 52428800,
            "clock_rate_ghz": 1.98,
            "device_memory_size": 84942979072,
        },
    ),
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        8,
        {**_A100, "memory_bandwidth": 2039040000000, "device_memory_size": 85100068864},
    ),
    "a100-40": (
        "NVIDIA A100-SXM4-40GB",
        8,
        {**_A100, "memory_bandwidth": 1555000000000, "device_memory_size": 42298834944},
    ),
}
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_ONE_PER_CHIP = ("v4", "v5p")  # both cores of a chip are one device
# The threads on which libtpu compiles have stacks of 72 kB, which a program of many row loops overflows.
_ARGUMENTS, _STACK = "LIBTPU_INIT_ARGS", "fibers_default_thread_stack_size"
KNOWN = f"{', '.join(GPUS)}, one of them times a count such as h100x8, or a TPU topology such as v5e:2x4 or v4:2x2x1"


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
      name: as the user gives it.
      kind: "gpu" or "tpu".
      model: "h100", "v5e" and so on.
      devices: how many GPUs; of a TPU the topology says it, and this is 0.
    """

    name: str
    kind: str
    model: str
    devices: int = 0


def parse(name: str) -> Target:
    """A target's name, taken apart.

    Raises:
      UserError: it is none.
    """
    text = name.strip().lower()
    if match := re.fullmatch(rf"({'|'.join(sorted(GPUS, key=len, reverse=True))})(?:x(\d+))?", text):
        count = int(match[2] or 1)
        if 0 < count <= 1024:
            return Target(text, "gpu", match[1], count)
        raise UserError(f"target: '{name}' has {count} devices; use 1 to 1024")
    if match := re.fullmatch(rf"({'|'.join(TPUS)}):\d+(x\d+)*", text):
        return Target(text, "tpu", match[1])
    raise UserError(f"target: unknown '{name}'; use {KNOWN}")


def platform(target: Target) -> Platform:
    """What data sheets say of the target's devices; no compiler is asked."""
    return known(target.kind, GPUS[target.model][0] if target.kind == "gpu" else f"TPU {target.model}")


def count(target: Target) -> int:
    """How many devices it has, by its name."""
    return target.devices or math.prod(int(axis) for axis in target.name.split(":")[1].split("x"))


def environment(target: Target) -> dict[str, str]:
    """What has to be in the environment before a compiler is loaded, so that it looks for no device."""
    found = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if target.kind == "tpu":
        given = os.environ.get(_ARGUMENTS, "")
        found |= {
            _ARGUMENTS: given if _STACK in given else f"{given} --{_STACK}={2**28}".strip(),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU, so that any number may compile
        }
    return found


def require(target: Target) -> None:
    """Raises a UserError that names the extra, where the target's compiler is not installed."""
    if target.kind == "tpu":
        missing = importlib.util.find_spec("libtpu") is None
    else:
        missing = all(importlib.util.find_spec(f"jax_cuda{version}_plugin") is None for version in (12, 13))
    if missing:
        raise UserError(
            f"target: '{target.name}' needs the compiler of its maker; pip install 'tap-jax[target-{target.kind}]'"
        )


def devices(target: Target) -> tuple[jax.Device, ...]:
    """The target's devices; to be called before JAX has started on this machine's own.

    Raises:
      UserError: the extra is missing, or the compiler does not take the topology.
    """
    from jax.experimental import topologies

    require(target)
    wanted = environment(target)
    os.environ.update({name: wanted[name] for name in wanted if name not in os.environ or name == _ARGUMENTS})
    jax.config.update("jax_platforms", "cpu")  # the plugin for GPUs would look for a driver
    if target.kind == "gpu":
        arguments = {
            "platform": "cuda",
            "topology_name": "",
            "target_config": gpu_description(target.model),
            "topology": f"1x1x{target.devices}",
        }
    else:
        arguments = {"platform": "tpu", "topology_name": target.name}
        if target.model in _ONE_PER_CHIP:
            arguments["chip_config_name"] = "megacore"
        shape = [int(axis) for axis in target.name.split(":")[1].split("x")]
        if all(axis == 1 for axis in shape):
            arguments["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return tuple(topologies.get_topology_desc(**arguments).devices)
    except Exception as error:  # each plugin has its own, and JAX's when there is none
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"target: the compiler does not take '{target.name}' ({reason}); use {KNOWN}") from None


def gpu_description(model: str) -> str:
    """The text protocol buffer by which XLA knows a GPU."""
    name, capability, figures = GPUS[model]
    listed = " ".join(f"{key}: {value}" for key, value in (_GPU_COMMON | figures).items())
    return (
        f"gpu_device_info {{ {listed} cuda_compute_capability {{ major: {capability} }} }}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 8 patch: 0 }\n"
        f'device_description_str: "{name}"\n'
    )
