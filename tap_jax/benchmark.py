"""`tap-jax bench`: how fast local training runs here, as one JSON object. Every speed claim is a line of it.

What is timed is what a round does: drawing the plan on the host and N local steps of a whole cohort on the devices.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tap_jax import experiment
from tap_jax.config import ConfigDict
from tap_jax.data.sampling import sample_cohort
from tap_jax.engine.memory import peak_memory
from tap_jax.errors import UserError

REPEATS = 5


def bench(config: ConfigDict, *, steps: int = 0, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Times the local training of the cohort of round 0, every client taking N steps.

    Args:
      config: as for training; its own local_steps is N where `steps` is 0.
      say: gets a line before each slow part.

    Returns:
      client_steps_per_s and samples_per_s (median of `REPEATS` runs), compile_s (the first run less a median one),
      peak_bytes (of the fullest device, or of this process's host memory where devices do not tell, see `peak_of`),
      tflops and mfu (null so far), and what was run: device, devices, clients, steps, tasks, batch_size, dtype.

    Raises:
      UserError: what `experiment.build` objects to, or steps < 0.
    """
    if steps < 0:
        raise UserError(f"steps: {steps}; use at least 1, or 0 for the configuration's local_steps")
    config = config.copy_and_resolve_references()
    # The phase after the rounds takes all its steps however few samples a client has, a round one pass over them.
    config.local_steps = config.post_steps = steps or config.local_steps
    say("bench: reading data, building the model")
    run = experiment.build(config)
    engine = run.engine
    size = engine.settings.cohort_size
    number = sample_cohort(config.seed, 0, len(run.federation.clients), size)
    cohort = engine.cohort(number, 0)
    plan = cohort.plan("post", post=True)
    server = engine.server_stack(run.initial_blocks)

    def seconds() -> float:
        stack = jax.block_until_ready(cohort.broadcast(server))
        started = time.perf_counter()
        jax.block_until_ready(cohort.train(stack, "post", post=True))
        return time.perf_counter() - started

    say(f"bench: compiling, then {REPEATS} runs of {config.local_steps} steps with {size} clients")
    first = seconds()
    times = [seconds() for _ in range(REPEATS)]
    median = statistics.median(times)
    samples = sum(int((rows.table.weights > 0).sum()) for rows in plan.rows.values())
    peak = peak_memory(engine.mesh.devices.flat)
    peak_of = "device" if "peak_device_bytes" in peak else "host"
    names = {name for client in number for name in run.federation.clients[client].shares}
    return {
        "client_steps_per_s": _round(int(np.asarray(plan.active).sum()) / median),
        "samples_per_s": _round(samples / median),
        "tflops": None,
        "mfu": None,
        "compile_s": _round(max(0.0, first - median)),
        "peak_bytes": peak[f"peak_{peak_of}_bytes"],
        "peak_of": peak_of,
        "device": jax.devices()[0].device_kind,
        "devices": engine.mesh.size,
        "clients": size,
        "steps": config.local_steps,
        "seconds": [_round(value) for value in times],
        "batch_size": config.batch_size,
        "microbatch": engine.settings.microbatch,
        "rows_per_chunk": engine.settings.rows_per_chunk,
        "dtype": run.model.config.dtype,
        "tasks": [task.name for task in run.federation.tasks if task.name in names],
        "jax": jax.__version__,
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")
