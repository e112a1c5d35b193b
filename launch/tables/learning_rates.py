"""Chooses each method's learning rate by held-out loss, of one grid for all methods.

    python launch/tables/learning_rates.py configs/demo.py --out=runs/rates/flava

Every method trains with every rate and seed on four fifths of each client's training samples. Its finished models are
scored by their loss on the fifth that was held out; no test set is read. A rate is that of the rounds and of the
iterations after them; the rounds begin with a quarter of it, and rise. A method's score is the mean over its tasks and
seeds of the loss, mean over clients, relative to the least of the grid: tasks count alike whatever their loss's units.

Seeds are those of choosing (101, 102); tables use others. OUT gets losses.csv, a line for each method, rate, seed and
task, from which a second call goes on; the last lines printed are a table of scores and the rates chosen.
"""

import argparse
import csv
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

import tap_jax
from tap_jax.config import load_config
from tap_jax.errors import UserError

# Method -> the variant that is scored: the one with its last phase.
SCORED = {
    "tap": "tap",
    "local": "local",
    "fedavg": "fedavg+post",
    "per_fedavg": "per-fedavg+post",
    "disentafl": "disentafl+post",
    "feddat": "feddat+post",
}
HELD_OUT = 0.2
COLUMNS = ("method", "rate", "seed", "task", "loss")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration's file or name")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--rates", type=float, nargs="+", default=(2e-3, 4e-3, 8e-3, 1.6e-2))
    parser.add_argument("--seeds", type=int, nargs="+", default=(101, 102))
    parser.add_argument("--methods", nargs="+", choices=SCORED, default=tuple(SCORED))
    chosen = parser.parse_args(argv)
    try:
        rows = measure(chosen)
    except UserError as error:
        print(f"learning_rates: {error}", file=sys.stderr)
        return 2
    print(table(rows, chosen.methods, chosen.rates))
    return 0


def measure(chosen: argparse.Namespace) -> list[dict]:
    """Trains what OUT has no losses of -> its lines of the seeds asked for."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "losses.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(row["method"], float(row["rate"]), int(row["seed"])) for row in rows}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for seed in chosen.seeds:
            for method in chosen.methods:
                for rate in chosen.rates:
                    if (method, rate, seed) not in done:
                        found = losses(chosen.config, method, rate, seed)
                        mine = [dict(zip(COLUMNS, (method, rate, seed, *one), strict=True)) for one in found.items()]
                        writer.writerows(mine)
                        file.flush()
                        rows += mine
                        print(f"{method}, rate {rate:g}, seed {seed}: mean loss {np.mean(list(found.values())):.4f}")
    return [row for row in rows if int(row["seed"]) in chosen.seeds]


def losses(config: str, method: str, rate: float, seed: int) -> dict[str, float]:
    """Task -> held-out loss of the finished models, mean over clients; inf where one of them diverged."""
    fields = {
        "method": method,
        "variants": (SCORED[method],),
        "seed": seed,
        "data.held_out": HELD_OUT,
        "data.test_size": 1,  # none is read
        "optimizer.learning_rate_initial": rate / 4,
        "optimizer.learning_rate": rate,
        "optimizer.post_learning_rate": rate,
    }
    experiment = tap_jax.build(load_config(config, fields))
    state = experiment.init()
    for _ in range(experiment.config.rounds):
        state, _ = experiment.round(state)
    found: dict[str, list[float]] = {}
    for row in experiment.held_out_loss(experiment.finish(state)):
        found.setdefault(row["task"], []).append(np.inf if row["value"] is None else row["value"])
    return {task: float(np.mean(values)) for task, values in found.items()}


def table(rows: Sequence[dict], methods: Sequence[str], rates: Sequence[float]) -> str:
    """A method's scores by rate, and which it takes, as Markdown."""
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} | chosen |", "|---" * (len(rates) + 2) + "|"]
    for method in methods:
        mine = {(float(r["rate"]), r["seed"], r["task"]): float(r["loss"]) for r in rows if r["method"] == method}
        cases = sorted({(str(seed), task) for _, seed, task in mine})
        found = {(rate, str(seed), task): loss for (rate, seed, task), loss in mine.items()}
        losses = np.array([[found[rate, *case] for case in cases] for rate in rates])
        with np.errstate(invalid="ignore"):  # where a task has diverged at every rate
            scores = np.nan_to_num(losses / losses.min(0), nan=np.inf).mean(1)
        best = rates[int(np.argmin(scores))]
        lines.append(f"| {method} | {' | '.join(f'{score:.3f}' for score in scores)} | {best:g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
