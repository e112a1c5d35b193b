"""Several processes that make one run: how they are named, meet, speak and end (jax.distributed).

All run the same program, each on its own devices. Process 0 also listens for the others at the coordinator's address,
so the run cannot outlive it.
"""

import dataclasses
import logging
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from tap_jax.errors import UserError

MEETING_SECONDS = 300  # for all processes to come
# A process may end up to this long before the last one does, as those that write nothing do. One that dies is missed
# after 100 s without a heartbeat at the latest, JAX's default.
LEAVING_SECONDS = 24 * 3600
PARTING_SECONDS = 3  # that a failing process 0 leaves to those that fail alike: without it JAX aborts them

_index: int | None = None  # of this process, once it is known


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of the processes of one run this is; all are started with the same command, up to `index`.

    Attributes:
      coordinator: HOST:PORT at which process 0 listens and all meet; "auto": JAX finds everything in the environment
        of SLURM, Open MPI, Cloud TPU or Kubernetes.
      count: how many there are; None with "auto".
      index: of this one, from 0; None with "auto".
    """

    coordinator: str
    count: int | None = None
    index: int | None = None


def processes(coordinator: str, count: int, index: int) -> Processes | None:
    """What the flags `coordinator`, `processes` (0: not given) and `process` (-1: not given) say; None: there is one.

    Raises:
      UserError: they do not fit together.
    """
    if not coordinator:
        if count or index != -1:
            raise UserError("coordinator: is missing; --processes and --process go with --coordinator=HOST:PORT")
        return None
    if coordinator == "auto":
        if count or index != -1:
            raise UserError(
                "coordinator: 'auto' finds --processes and --process by itself; drop them or name HOST:PORT"
            )
        return Processes(coordinator)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator: '{coordinator}'; use HOST:PORT, where process 0 listens, or auto")
    if count < 1 or index == -1:
        raise UserError("coordinator: HOST:PORT goes with --processes=N and --process=I, or use auto; see --help")
    if not 0 <= index < count:
        raise UserError(f"process: {index} of {count}; processes count from 0 to {count - 1}")
    return Processes(coordinator, count, index)


def joined() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def index() -> int | None:
    """This process's number among several; None where there is one, or where "auto" has not found it yet."""
    return _index


def lost_contact(error: BaseException | None) -> str:
    """What an error says of another process of the run that cannot be reached any more; "" if it says nothing of it.

    JAX names no cause but in words, and raises them as a JaxRuntimeError or a ValueError: "UNKNOWN: Gloo all-reduce
    failed: ...". Errors of Gloo (CPU) and of NCCL (GPU) between processes, of the coordinator and of its barriers, at
    which checkpoints wait, are counted as such.
    """
    words = "gloo|nccl|heartbeat|coordination|barrier|unavailable|socket closed|connection (closed|reset|refused)"
    while joined() and error is not None:
        if re.match(f"[A-Z_]+: (?s:.*)(?i:{words})", str(error)):
            return str(error).partition("\n")[0][:200]
        error = error.__cause__ or error.__context__
    return ""


def leave(status: int, *, together: bool) -> NoReturn:
    """Ends one of several processes that has failed; or, `together`, one that stops because all do, once all have.

    JAX would wait for the others in either case; but those that work on with this one would never come.
    """
    import jax

    sys.stdout.flush()
    try:
        if together:
            jax.distributed.shutdown()
        elif _index == 0:
            time.sleep(PARTING_SECONDS)
    finally:
        os._exit(status)


def join(processes: Processes) -> None:
    """Meets the others; afterwards jax.process_count() and jax.devices() are those of the whole run.

    It is done beside the main thread because JAX ends the process where they do not come, and says nothing useful.
    """
    import jax

    global _index
    _index = processes.index
    arguments: dict[str, Any] = {
        "initialization_timeout": 2 * MEETING_SECONDS,
        "shutdown_timeout_seconds": LEAVING_SECONDS,
    }
    if processes.coordinator == "auto":
        if _has_its_own_devices():
            arguments["local_device_ids"] = []  # all that it sees; else JAX takes one by the process's local number
    else:
        arguments |= {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.count,
            "process_id": processes.index,
            "cluster_detection_method": "deactivate",  # which would choose a device as with "auto"
        }
        loopback = re.match(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):", processes.coordinator)
        if loopback:
            arguments["coordinator_bind_address"] = processes.coordinator  # not for other machines to reach
        if processes.index == 0:
            _check_port(processes.coordinator, "localhost" if loopback else "")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is for `train` to handle
    found: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(**arguments)
        except Exception as error:
            found.append(error)

    meeting = threading.Thread(target=initialize, daemon=True)
    meeting.start()
    meeting.join(MEETING_SECONDS)
    if meeting.is_alive():
        raise UserError(
            f"coordinator: {MEETING_SECONDS} s have passed and not all {processes.count or ''} processes have come"
            f" ({processes.coordinator}); start all, each with its own --process, at an address that all can reach"
        )
    if found:
        raise UserError(_why(processes, found[0])) from found[0]


def _check_port(coordinator: str, host: str) -> None:
    """Whether process 0 can listen; where it cannot, JAX may crash."""
    try:
        socket.create_server((host, int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"coordinator: process 0 cannot listen at {coordinator} ({reason}); choose a free port of its machine"
        ) from error


def _why(processes: Processes, error: Exception) -> str:
    if processes.coordinator == "auto" and isinstance(error, ValueError):
        return (
            "coordinator: 'auto' finds neither SLURM (srun), Open MPI, Cloud TPU nor, with jax[k8s], Kubernetes here;"
            " use HOST:PORT with --processes and --process"
        )
    return f"coordinator: '{processes.coordinator}' does not work here ({error})"


def only_first_speaks() -> None:
    """Leaves stdout to process 0's own words: not to the others', nor to Gloo, which writes there on its own."""
    import jax

    global _index
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    _index = jax.process_index()  # starts the backend, and with it Gloo
    if _index == 0:
        os.close(nowhere)
    else:
        os.close(kept)
        kept = nowhere
        logging.getLogger("tap_jax").setLevel(logging.ERROR)  # process 0 warns of the same
    sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)


def count_of_cluster() -> int:
    """Processes of a run under SLURM or Open MPI, where CPU devices matter; 1 elsewhere."""
    return int(os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)


def _has_its_own_devices() -> bool:
    """Whether all devices that this process sees are its own: it is alone on its node, or sees one GPU."""
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return False  # the user says which
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    return bool(
        re.fullmatch(r"1(\(x\d+\))?", tasks) or re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    )
