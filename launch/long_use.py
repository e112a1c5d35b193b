"""Long use of one process: many rounds of a small federation, and a run that is stopped and resumed again and again.

    python launch/long_use.py [--rounds 2000] [--resumes 300]

Prints in ten parts seconds per round (median; with all that lies between two rounds), memory of the process, threads,
open files, and the run folder's size and files. What grows shows from one line to the next. Needs Linux; half an hour
on two free cores.
"""

import argparse
import contextlib
import functools
import itertools
import os
import pathlib
import statistics
import tempfile
import time

from tap_jax.cli import startup
from tap_jax.config import load_config

SMALL = {
    "federation.table": "custom",
    "federation.rows": ({"ag_news": 0.2, "fashion_mnist": 0.2}, {"ag_news": 0.2}, {"fashion_mnist": 0.2}) * 2,
    "federation.groups": 1,
    "data.train_size": 120,
    "data.test_size": 12,
    "cohort_size": 2,
    "local_steps": 2,
    "post_steps": 2,
    "variants": ("tap",),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=2000, help="of the first run (default: %(default)s)")
    options.add_argument("--resumes", type=int, default=300, help="of the second, a round each (default: %(default)s)")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        startup.start_jax(load_config("demo", SMALL | {"compilation_cache": str(root / "programs")}))
        if chosen.rounds:
            print(f"{chosen.rounds} rounds in one go", flush=True)
            play(root / "rounds", root, chosen.rounds, every=10, at_once=chosen.rounds)
        if chosen.resumes:
            print(f"{chosen.resumes} starts in one process, a round each", flush=True)
            play(root / "resumes", root, chosen.resumes, every=1, at_once=1)


def play(workdir: pathlib.Path, root: pathlib.Path, rounds: int, *, every: int, at_once: int) -> None:
    """A run of so many rounds, `at_once` of them with each call of `run`; a line for every tenth part."""
    from tap_jax.errors import Preempted
    from tap_jax.runs.runner import Reporter, run

    fields = SMALL | {"rounds": rounds, "checkpoint_every": every, "compilation_cache": str(root / "programs")}
    config = load_config("demo", fields)
    print("rounds  s per round  MB of memory  threads  open files  MB of the run  files", flush=True)
    ended = [time.perf_counter()]  # when each round since the last line did

    def progress(line: dict) -> None:
        played.append(line["round"])
        ended.append(time.perf_counter())
        if (line["round"] + 1) % max(1, rounds // 10) == 0:
            median = statistics.median(after - before for before, after in itertools.pairwise(ended))
            print(f"{line['round'] + 1:6d}  {median:11.3f}  {state_of(workdir)}", flush=True)
            del ended[:-1]

    played: list[int] = []
    while len(played) < rounds:
        goal = len(played) + at_once
        with contextlib.suppress(Preempted):
            run(config, workdir, Reporter(progress=progress), stop=functools.partial(reached, played, goal, rounds))


def reached(played: list[int], goal: int, rounds: int) -> bool:
    """So many rounds are played, and not all."""
    return goal <= len(played) < rounds


def state_of(workdir: pathlib.Path) -> str:
    """Memory, threads and open files of this process, size and files of a folder."""
    process = pathlib.Path("/proc/self")
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    threads, files = (len(list((process / name).iterdir())) for name in ("task", "fd"))
    mine = [path.stat().st_size for path in workdir.rglob("*") if path.is_file()]
    return f"{resident:12.0f}  {threads:7d}  {files:10d}  {sum(mine) / 1e6:13.1f}  {len(mine):5d}"


if __name__ == "__main__":
    main()
