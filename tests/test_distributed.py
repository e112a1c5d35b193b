"""How the processes of a run are named, meet, speak and end: real ones, on the CPU over loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from tap_jax.cli import distributed
from tap_jax.errors import UserError

# `tap-jax train` whose training is a few sums over all devices; EVENT is what happens to the process WHO after them.
STAND_IN = """
import dataclasses, os, signal, sys, time
from tap_jax.cli import main as cli
from tap_jax.cli import distributed
from tap_jax.cli import startup
from tap_jax.cli.commands import COMMANDS
from tap_jax.errors import Preempted, UserError

def train(config, workdir, coordinator, processes, process):
    caught = []
    signal.signal(signal.SIGTERM, lambda *_: caught.append("SIGTERM"))
    distributed.MEETING_SECONDS = int(os.environ.get("MEETING", distributed.MEETING_SECONDS))
    startup.start_jax(config, distributed.processes(coordinator, processes, process))
    import jax
    from jax.experimental.multihost_utils import process_allgather
    event, me = os.environ.get("EVENT", ""), jax.process_index() == int(os.environ.get("WHO", 0))
    for step in range(2 if not event else 10_000):
        ids = process_allgather(jax.numpy.full(3, jax.process_index()))
        if step == 1 and event == "both":
            raise UserError("rounds: wrong in both")
        if step == 1 and event == "stop":
            raise Preempted("stopped by all")
        if step == 1 and me and event == "wrong":
            raise UserError("rounds: wrong in one")
        if step == 1 and me and event == "bug":
            raise KeyError("a bug")
        if step == 1 and me and event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)
    print(f"{jax.process_count()} processes, {jax.local_device_count()} of {jax.device_count()} devices,"
          f" {ids.sum()}, {caught}", flush=True)

COMMANDS["train"] = dataclasses.replace(COMMANDS["train"], run=train)
sys.exit(cli.main())
"""
COMMAND = [
    sys.executable,
    "-c",
    STAND_IN,
    "train",
    "--config=configs/demo.py",
    "--workdir=w",
    "--config.mesh.clients=4",
]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(*flags, **environment):
    inherited = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    return subprocess.Popen(
        COMMAND + list(flags),
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*processes):
    """(status, stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def two(**environment):
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return ended(*(start(address, "--processes=2", f"--process={i}", **environment) for i in range(2)))


# --- what flags and environment mean -------------------------------------------------------------------------------


def test_without_flags_there_is_one_process():
    assert distributed.processes("", 0, -1) is None
    assert not distributed.joined() and distributed.index() is None


def test_flags_name_the_process():
    assert distributed.processes("node7:1234", 3, 2) == distributed.Processes("node7:1234", 3, 2)
    assert distributed.processes("[::1]:1234", 1, 0) == distributed.Processes("[::1]:1234", 1, 0)
    assert distributed.processes("auto", 0, -1) == distributed.Processes("auto")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("", 2, -1), "coordinator: is missing"),
        (("", 0, 0), "coordinator: is missing"),
        (("auto", 2, 0), "'auto' finds --processes and --process by itself"),
        (("node7", 2, 0), "coordinator: 'node7'; use HOST:PORT"),
        ((":1234", 2, 0), "coordinator: ':1234'; use HOST:PORT"),
        (("node7:http", 2, 0), "use HOST:PORT"),
        (("node7:70000", 2, 0), "use HOST:PORT"),
        (("node7:1234", 0, -1), "goes with --processes=N and --process=I"),
        (("node7:1234", 2, -1), "goes with --processes=N and --process=I"),
        (("node7:1234", 0, 1), "goes with --processes=N and --process=I"),
        (("node7:1234", 2, 2), "process: 2 of 2; processes count from 0 to 1"),
        (("node7:1234", 2, -3), "process: -3 of 2"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.processes(*flags)


@pytest.mark.parametrize(
    ("environment", "all_that_it_sees"),
    [
        ({}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
    ],
)
def test_one_process_per_node_keeps_all_its_gpus(environment, all_that_it_sees, monkeypatch):
    for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._has_its_own_devices() == all_that_it_sees


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),
        (ValueError("INTERNAL: Error dispatching computation: Gloo AllGather failed: Read error"), True),
        (RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nId: save"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes"), False),
        (ValueError("gloo: no such task"), False),
        (KeyError("barrier"), False),
    ],
)
def test_errors_that_say_that_another_has_gone(error, lost, monkeypatch):
    assert distributed.lost_contact(error) == "", "one process has lost nobody"
    monkeypatch.setattr(distributed, "joined", lambda: True)
    wrapped = OSError("checkpoint")
    wrapped.__cause__ = error
    assert [bool(distributed.lost_contact(found)) for found in (error, wrapped)] == [lost, lost]


# --- processes that meet -------------------------------------------------------------------------------------------


def test_two_processes_are_one_run_and_the_first_speaks():
    first, second = two()
    assert first == (0, "2 processes, 2 of 4 devices, 3, ['SIGTERM']\n", "")
    assert second == (0, "", ""), "SIGTERM ends no process: it is the trainer's to handle"


def test_the_environment_of_slurm_is_enough():
    environment = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
    }  # fmt: skip
    port = free_port()
    environment |= {"JAX_COORDINATOR_PORT": str(port), "JAX_COORDINATOR_BIND_ADDRESS": f"localhost:{port}"}
    ranks = ({"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2))
    first, second = ended(*(start("--coordinator=auto", **environment, **rank) for rank in ranks))
    assert first[:2] == (0, "2 processes, 2 of 4 devices, 3, ['SIGTERM']\n"), first
    assert second[:2] == (0, ""), second


def test_one_that_stops_because_all_do_waits_for_them():
    assert two(EVENT="stop") == [
        (143, "", "tap-jax: process 0: stopped by all\n"),
        (143, "", "tap-jax: process 1: stopped by all\n"),
    ]


# --- processes that do not -----------------------------------------------------------------------------------------


def test_whoever_fails_alike_ends_alike():
    assert two(EVENT="both") == [
        (2, "", "tap-jax: process 0: rounds: wrong in both\n"),
        (2, "", "tap-jax: process 1: rounds: wrong in both\n"),
    ]


@pytest.mark.parametrize(
    ("event", "status", "said"),
    [
        ("wrong", 2, "tap-jax: process 1: rounds: wrong in one\n"),
        ("bug", 1, "KeyError: 'a bug'\n"),
        ("kill", -signal.SIGKILL, ""),
    ],
)
def test_whoever_loses_another_says_so(event, status, said):
    first, second = two(EVENT=event, WHO="1")
    assert second[0] == status and second[2].endswith(said)
    assert first[:2] == (75, "")
    assert first[2].startswith(
        "tap-jax: process 0: another process of the run has gone; start all again with the same command, and it goes"
        " on from the last checkpoint ("
    )
    assert first[2].count("\n") == 1


def test_without_the_first_jax_ends_the_others():
    first, second = two(EVENT="kill", WHO="0")
    assert first[0] == -signal.SIGKILL
    assert second[0] in (75, -signal.SIGABRT), "which notices first, a sum or the coordinator's client, is a race"


def test_whoever_waits_in_vain_says_for_what():
    address = f"127.0.0.1:{free_port()}"
    alone = ended(*(start(f"--coordinator={address}", "--processes=3", f"--process={i}", MEETING="4") for i in (0, 2)))
    for status, out, err in alone:
        assert (status, out) == (2, "")
        assert f"coordinator: 4 s have passed and not all 3 processes have come ({address}); start all" in err
        assert err.count("\n") == 1


def test_a_port_that_is_taken_and_a_cluster_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        taken, nowhere = ended(
            start(f"--coordinator={address}", "--processes=2", "--process=0"),
            start("--coordinator=auto", KUBERNETES_SERVICE_HOST=""),
        )
    assert taken[:2] == (2, "") and nowhere[:2] == (2, "")
    reason = f"tap-jax: coordinator: process 0 cannot listen at {address} (Address already in use); choose"
    assert reason in taken[2] and taken[2].count("\n") == 1
    assert "coordinator: 'auto' finds neither SLURM (srun)" in nowhere[2] and nowhere[2].count("\n") == 1
