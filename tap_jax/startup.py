"""What has to be decided before JAX starts: how many CPU devices, and where compiled programs are kept."""

import logging
import os
import pathlib
import platform
import zlib

from tap_jax.config import ConfigDict
from tap_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# Whoever has set one of them keeps it.
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
    for name in ("absl", "datasets", "huggingface_hub", "orbax", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_jax(config: ConfigDict) -> None:
    """Sets JAX up for a configuration; call it before anything asks for a device.

    Raises:
      UserError: the compilation cache's folder cannot be made.
    """
    import jax

    count = cpu_devices(config)
    if count is not None:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # JAX has started, in a notebook or a test: what it has will do
    folder = cache_folder(config)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cpu_devices(config: ConfigDict) -> int | None:
    """Host devices to make on a machine without accelerator: mesh.clients, or a core each for the cohort's clients.

    More devices than clients would hold frozen weights and do nothing.

    Returns:
      None where the user has told JAX already.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.mesh.clients or min(cores, config.cohort_size)


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
