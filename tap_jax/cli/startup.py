"""What has to be decided before JAX starts: CPU devices, the processes of a run, where compiled programs are kept."""

import logging
import os
import pathlib
import platform
import sys
import zlib

from tap_jax.cli import distributed
from tap_jax.config import ConfigDict
from tap_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# One that the user has set stays.
QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
BARS = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def quiet(*, bars: bool) -> None:
    """Keeps other libraries from talking; with `bars`, downloads may still show theirs."""
    for name, value in (QUIET if bars else QUIET | BARS).items():
        os.environ.setdefault(name, value)
    for name in ("datasets", "huggingface_hub", "orbax", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it also raises, each time with a traceback


def drop_late_callbacks() -> None:
    """Keeps off stderr what comes after a write or read that failed, and was reported; for the rest of the process.

    Orbax closes the event loop of a failed operation while tensorstore still has callbacks for it.
    """
    hook = sys.unraisablehook

    def report(unraisable) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    sys.unraisablehook = report


def start_jax(config: ConfigDict, processes: distributed.Processes | None = None) -> None:
    """Sets JAX up for a configuration; call it before anything asks for a device.

    With several processes it returns once all have met; from then on only process 0 has a stdout.

    Raises:
      UserError: the compilation cache's folder cannot be made, the processes do not find each other, or there is no
        device of the kind that JAX_PLATFORMS asks for.
    """
    import jax

    if jax.config.jax_enable_x64:
        _LOG.warning("JAX_ENABLE_X64 has no effect: everything here is float32 or bfloat16")
        jax.config.update("jax_enable_x64", False)
    count = cpu_devices(config, processes)
    if count is not None:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # JAX has started, in a notebook or a test: what it has will do
    folder = cache_folder(config)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if processes is not None:
        distributed.join(processes)
        distributed.only_first_speaks()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a word, where a plugin is not installed
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
        if not asked:
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"JAX_PLATFORMS: '{asked}' has no device on this machine{f' ({reason})' if reason else ''}; unset it or"
            " use JAX_PLATFORMS=cpu"
        ) from error


def cpu_devices(config: ConfigDict, processes: distributed.Processes | None = None) -> int | None:
    """Host devices that a process makes on a machine without accelerator: its share of what the mesh asks for.

    That is mesh.clients · mesh.data, or a core each for the cohort's clients: more devices than clients would hold
    frozen weights and do nothing.

    Returns:
      None where the user has told JAX already.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = 1 if processes is None else processes.count or distributed.count_of_cluster()
    if config.mesh.clients:
        return -(-config.mesh.clients * (config.mesh.data or 1) // share)
    return min(cores, -(-config.cohort_size // share)) * (config.mesh.data or 1)


def cache_folder(config: ConfigDict) -> str | None:
    """The folder of XLA's persistent cache, made if need be; None where it is off.

    Raises:
      UserError: the folder named by the configuration cannot be made.
    """
    chosen = config.compilation_cache
    if chosen == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    default = os.path.join(home, "tap_jax", "xla", _processor())
    folder = chosen or os.environ.get("JAX_COMPILATION_CACHE_DIR") or default
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        if chosen:
            raise UserError(f"compilation_cache: cannot make {folder} ({reason}); name another or 'off'") from error
        _LOG.warning("compiled programs are not kept: cannot make %s (%s)", folder, reason)
        return None
    return folder


def _processor() -> str:
    """Tells processors apart: XLA's programs for one may use instructions that another under the same home lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
