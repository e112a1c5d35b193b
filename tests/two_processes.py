"""A program in two processes that meet over loopback, with two CPU devices each."""

import os
import socket
import subprocess
import sys

import pytest

_START = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv.pop(1), num_processes=2, process_id=int(sys.argv.pop(1)))
"""


def run_together(program: str, *arguments) -> None:
    """Both run to their end; `arguments` are theirs, from sys.argv[1] on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _START + program + "\nprint('at the end')", coordinator, me, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in "01"
    ]
    try:
        ended = [process.communicate(timeout=120) for process in started]
    except subprocess.TimeoutExpired:
        pytest.fail("the processes wait for each other")
    finally:
        for process in started:
            process.kill()
    for process, (out, error) in zip(started, ended, strict=True):
        assert process.returncode == 0, error
        assert out.splitlines()[-1] == "at the end"
