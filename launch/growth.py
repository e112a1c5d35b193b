"""What a federation's size costs: rounds of a fixed cohort among 30, 300 and 3,000 clients, of larger cohorts, memory.

All sizes are in one process and take turns round by round, so that whatever else the machine does hits all of them. A
cohort has equally many clients of each of the ten patterns, on the same part of the data at every size, so that rounds
differ in nothing but the federation around them. `federation.parts` gives thousands of clients the demo's data.
"""

import argparse
import ctypes
import gc
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from tap_jax.blocks import size_bytes
from tap_jax.cli import startup
from tap_jax.config import load_config

PATTERNS, PARTS = 10, 3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", default="configs/demo.py")
    options.add_argument("--clients", type=int, nargs="+", default=[30, 300, 3000], help="multiples of 30")
    options.add_argument("--cohorts", type=int, nargs="*", default=[10, 20, 40], help="multiples of 10")
    options.add_argument("--rounds", type=int, default=10, help="timed rounds of each")
    chosen = options.parse_args()
    startup.start_jax(load_config(chosen.config, {"cohort_size": chosen.cohorts[0] if chosen.cohorts else PATTERNS}))
    with tempfile.TemporaryDirectory() as folder:
        of_memory(chosen, pathlib.Path(folder) / "memory")  # first: freed memory would be used again, and not show
        of_size(chosen, pathlib.Path(folder))
        of_cohort(chosen)


def build(chosen, clients: int, cohort: int):
    """An experiment and the seconds that it took, those of its initial state included."""
    from tap_jax import experiment

    fields = {"federation.groups": clients // PATTERNS, "federation.parts": PARTS, "cohort_size": cohort}
    # Any store will do; it is named where one is wanted.
    fields |= {"variants": ("tap",), "data.test_size": 20, "engine.host_gigabytes": 1e-9}
    config = load_config(chosen.config, fields)
    started = time.perf_counter()
    built = experiment.build(config)
    built.init()
    return built, time.perf_counter() - started


def cohort_of(clients: int, size: int, round_: int) -> list[int]:
    """Equally many clients of each pattern, all of groups that have part number `round_` of the data, modulo 3."""
    rng = np.random.default_rng([clients, round_])
    groups = np.arange(round_ % PARTS, clients // PATTERNS, PARTS)
    drawn = [rng.choice(groups, size // PATTERNS, replace=len(groups) < size // PATTERNS) for _ in range(PATTERNS)]
    return sorted(int(PATTERNS * group + pattern) for pattern, mine in enumerate(drawn) for group in mine)


def play(built, state, clients):
    """One round -> (state, seconds, client steps in all of its local trainings)."""
    started = time.perf_counter()
    state, line = built.round(state, clients)
    jax.block_until_ready(state.server)
    seconds = time.perf_counter() - started
    settings = built.engine.settings
    steps = sum(min(settings.local_steps, -(-built.engine.data[k].samples // settings.batch)) for k in clients)
    return state, seconds, steps * len(line["losses"])


def of_size(chosen, folder: pathlib.Path) -> None:
    print(f"\nRounds of {PATTERNS} clients among more and more; ratios to the first, round by round", flush=True)
    print(
        "clients  blocks in  build s  compile s  ms a round  client steps/s  checkpoint ms  speed, median (quartiles)",
        flush=True,
    )
    runs = []
    for clients in chosen.clients:
        built, seconds = build(chosen, clients, PATTERNS)
        runs.append([clients, "memory", built, built.init(), seconds])
    runs.append([*runs[-1][:1], "store", built, built.init(folder), seconds])
    compiling = []
    for run in runs:  # and one round more, for what only a second one needs
        clients, _, built, state, _ = run
        state, first, _ = play(built, state, cohort_of(clients, PATTERNS, 0))
        run[3], second, _ = play(built, state, cohort_of(clients, PATTERNS, 1))
        compiling.append(first - second)
    times = [[] for _ in runs]
    for round_ in range(2, chosen.rounds + 2):
        for run, mine in zip(runs, times, strict=True):
            clients, _, built, state, _ = run
            run[3], seconds, steps = play(built, state, cohort_of(clients, PATTERNS, round_))
            mine.append((seconds, steps))
    for run, mine, compile_seconds in zip(runs, times, compiling, strict=True):
        rates = [steps / seconds for seconds, steps in mine]
        ratio = np.array(rates) / [steps / seconds for seconds, steps in times[0]]
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        print(
            f"{run[0]:7,}  {run[1]:9}  {run[4]:7.1f}  {compile_seconds:9.1f}"
            f"  {1e3 * statistics.median(seconds for seconds, _ in mine):10.0f}"
            f"  {statistics.median(rates):14.1f}  {1e3 * save(run[3], folder / f'{run[0]} {run[1]}'):13.0f}"
            f"  {middle:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )


def save(state, folder: pathlib.Path) -> float:
    """Seconds that a checkpoint takes, the second of two."""
    from tap_jax.engine import store
    from tap_jax.engine.checkpointing import Checkpoints

    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            started = time.perf_counter()
            store.commit(state, step)
            checkpoints.save(step, state, {})
            checkpoints.wait()
    return time.perf_counter() - started


def of_cohort(chosen) -> None:
    if not chosen.cohorts:
        return
    clients = 300
    print(f"\nRounds of larger cohorts among {clients} clients; seconds per client as a ratio to the first", flush=True)
    print("cohort  ms a round  ms a client  ratio, median (quartiles)", flush=True)
    runs = []
    for size in chosen.cohorts:
        built, _ = build(chosen, clients, size)
        state = built.init()
        for round_ in range(2):
            state, *_ = play(built, state, cohort_of(clients, size, round_))
        runs.append([size, built, state, []])
    for round_ in range(2, chosen.rounds + 2):
        for run in runs:
            size, built, state, mine = run
            run[2], seconds, _ = play(built, state, cohort_of(clients, size, round_))
            mine.append(seconds / size)
    for size, _, _, mine in runs:
        low, middle, high = np.quantile(np.array(mine) / runs[0][3], (0.25, 0.5, 0.75))
        each = statistics.median(mine)
        print(f"{size:6}  {1e3 * each * size:10.0f}  {1e3 * each:11.0f}  {middle:.3f} ({low:.3f} to {high:.3f})")


def of_memory(chosen, folder: pathlib.Path) -> None:
    from tap_jax.methods.base import put_models

    clients = chosen.clients[-1]
    print(f"\nPersonal blocks of {clients:,} clients, as more and more have blocks of their own; in MB", flush=True)
    print("owners  their blocks  memory, in memory  memory, in a store  on disk", flush=True)
    built, _ = build(chosen, clients, PATTERNS)
    ends = [round(clients * part / 4) for part in range(1, 5)]
    found = {}
    for where in ("store", "memory"):
        models = built.init(folder if where == "store" else None).client_models["personal"]
        before, owned = resident(), 0
        for start, stop in zip([0, *ends], ends, strict=False):
            for k in range(start, stop):
                mine = jax.tree.map(np.array, dict(models[k]))
                owned += size_bytes(mine)
                models = put_models(models, {k: mine})
            disk = models.store.size_bytes() if where == "store" else 0
            found[where, stop] = owned, resident() - before, disk
    for owners in ends:
        owned, memory, _ = found["memory", owners]
        _, stored, disk = found["store", owners]
        print(f"{owners:6,}  {owned / 1e6:12.1f}  {memory / 1e6:17.1f}  {stored / 1e6:18.1f}  {disk / 1e6:7.1f}")


def resident() -> int:
    """Bytes of this process that are in memory now, free ones given back before (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
