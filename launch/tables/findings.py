"""What is left of TAP's lead when one thing in the demo is changed: the tables of launch/docs/findings.md.

    python launch/tables/findings.py runs/tables-demo/flava-tap-51 runs/tables-demo/change-rounds-14-51 ... --out=DIR

Runs of one change differ in the seed at the end of their folders' names; flava-tap is the demo unchanged. OUT gets
findings.md: for each change how often a client took federated blocks over, and TAP's lead over

- FedAvg + Post-train,
- FedAvg + 2P, which trains as long after the rounds as teacher and student together,
- its own Stage 2 without replacement: what Stage 1 gives,
- itself without a teacher: what distillation gives.

A lead is relative, in percent of the rival's score, and positive where TAP is better; of a text task it is METEOR's.
Shown are its mean over tasks, and over seeds mean and standard error.
"""

import argparse
import collections
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from tap_jax.errors import UserError
from tap_jax.evaluation.finished import FinishedRun, read_runs
from tap_jax.evaluation.scores import find_metric

RIVALS = {
    "fedavg+post": "FedAvg + Post-train",
    "fedavg+2p": "FedAvg + 2P",
    "tap-stage2": "no replacement",
    "tap-no-kd": "no distillation",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished runs, as findings.sh trains them")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder")
    chosen = parser.parse_args(argv)
    try:
        runs, notes = read_runs(chosen.runs)
    except UserError as error:
        print(f"findings: {error}", file=sys.stderr)
        return 2
    changes: dict[str, list[FinishedRun]] = {}
    for run in runs:
        name = run.folder.name.rpartition("-")[0]
        changes.setdefault("none" if name == "flava-tap" else name.removeprefix("change-"), []).append(run)
    text = "\n\n".join([by_change(changes), by_task(changes), *notes]) + "\n"
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "findings.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def by_change(changes: dict[str, list[FinishedRun]]) -> str:
    """A line for each change: share of replacements, leads over the rivals."""
    lines = [f"| change | seeds | taken over | {' | '.join(f'lead, {name}' for name in RIVALS.values())} |"]
    lines.append("|:--|" + "--:|" * (len(RIVALS) + 2))
    for change, runs in changes.items():
        found = [leads(run) for run in runs]
        cells = [spread([float(np.mean(list(one[rival].values()))) for one in found]) for rival in RIVALS]
        shares = 100 * np.array([taken_over(run) for run in runs])
        lines.append(f"| {change} | {len(runs)} | {shares.mean():.0f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_task(changes: dict[str, list[FinishedRun]]) -> str:
    """A line for each change: the lead over FedAvg + Post-train, task by task."""
    tasks = list(dict.fromkeys(task for runs in changes.values() for run in runs for task in leads(run)["fedavg+post"]))
    lines = [f"| lead, {RIVALS['fedavg+post']} | {' | '.join(tasks)} |", "|:--|" + "--:|" * len(tasks)]
    for change, runs in changes.items():
        found = [leads(run)["fedavg+post"] for run in runs]
        lines.append(f"| {change} | {' | '.join(spread([one[task] for one in found]) for task in tasks)} |")
    return "\n".join(lines)


def leads(run: FinishedRun) -> dict[str, dict[str, float]]:
    """Rival -> task -> TAP's lead in percent, by each task's last metric, mean over clients."""
    metrics = {row["task"]: row["metric"] for row in run.rows}
    scores: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for row in run.rows:
        if row["metric"] == metrics[row["task"]] and row["value"] is not None:
            scores[row["task"], row["variant"]].append(row["value"])
    found: dict[str, dict[str, float]] = {}
    for rival in RIVALS:
        for task, metric in metrics.items():
            ours, theirs = np.mean(scores[task, "tap"]), np.mean(scores[task, rival])
            sign = 1 if find_metric(metric).higher_is_better else -1
            found.setdefault(rival, {})[task] = float(sign * 100 * (ours - theirs) / theirs)
    return found


def taken_over(run: FinishedRun) -> float:
    """Replacements over tasks seen, without each client's first participation, at which it always replaces."""
    seen, taken, known = 0, 0, set()
    for line in run.lines():
        tasks = line["losses"]["federated"]
        seen += sum(len(tasks[client]) for client in known & tasks.keys())
        taken += sum(event["variant"] == "tap" and str(event["client"]) in known for event in line["replacements"])
        known |= tasks.keys()
    return taken / max(seen, 1)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.1f}{error}"


if __name__ == "__main__":
    sys.exit(main())
