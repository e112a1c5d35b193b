"""Kills `tap-jax train` at random moments, lets it go on, and compares with a run that was left alone, bit by bit.

    python -m tests.faults [--seed=0] [--chains=4] [--folder=DIR]

A chain is one run that is killed again and again: while programs compile (with an empty compilation cache), in a round,
while a checkpoint is being written, after the last round in training and in evaluation; and once it gets SIGTERM. The
moment is drawn within what the phase lasted when nobody disturbed it; the table says where it really was. Two runs are
left alone, since they have to agree for the rest to mean anything. Compared is all that a run leaves but for times:
models, results.json, metrics.jsonl, samples, reports, tokenizer, the last checkpoint's contents, and which files
there are. In the last chain, personal blocks are in a store on disk.

Exit status: 1 if anything differs, if more rounds are lost than were played since the last checkpoint, or if a phase or
the number of moments was not reached. About ten minutes on two free cores.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

ROUNDS, EVERY, CLIENTS = 16, 3, 4
VARIANTS = ("tap", "local", "fedavg", "fedavg+post")
MODELS = CLIENTS * (len(VARIANTS) - 1)  # FedAvg's is the server's
ROWS = ({"ag_news": 0.3, "fashion_mnist": 0.5}, {"ag_news": 0.3}, {"fashion_mnist": 0.5}, {"ag_news": 0.4})
CONFIG = (
    f"configs/demo.py:rounds={ROUNDS},checkpoint_every={EVERY},variants={VARIANTS},local_steps=4,post_steps=5,"
    f"federation.table=custom,federation.groups=1,federation.rows={ROWS},cohort_size=2,engine.clients_at_once=2,"
    "data.train_size=120,data.test_size=24,optimizer.state=persist,model.lora_dropout=0.1"
)
KILL, TERM = signal.SIGKILL, signal.SIGTERM
IN_LOOP = ("round", "checkpoint")
PLAN = ("compile", "round", "checkpoint", "round", "checkpoint", "finishing", "evaluation")
TERM_AT = (3, 4, 5, 6)  # the place in the plan where a chain gets SIGTERM, chain by chain
ON_DISK = "--config.engine.host_gigabytes=1e-6"
LIMIT = 900  # seconds for one process


class Trainer:
    """A process of `tap-jax train` on a folder, and what can be seen of it from outside."""

    def __init__(self, workdir: pathlib.Path, cache: pathlib.Path, *arguments: str):
        self.workdir, self.started, self.lines = workdir, time.time(), []
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        command = [sys.executable, "-m", "tap_jax", "train", f"--config={CONFIG}", f"--workdir={workdir}", *arguments]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def until(self, seen: Callable[[], Any]) -> bool:
        """Waits; False where the process ends before it is seen."""
        while not seen():
            if self.process.poll() is not None:
                return bool(seen())
            if time.time() - self.started > LIMIT:
                raise TimeoutError(f"{self.workdir}: {LIMIT} s\n{''.join(self.lines)}")
            time.sleep(0.001)
        return True

    def end(self) -> int:
        """Waits for the end -> the exit status."""
        self.until(lambda: self.process.poll() is not None)
        self._reader.join()
        return self.process.returncode

    def said(self, beginning: str) -> bool:
        return any(line.startswith(beginning) for line in list(self.lines))

    def played(self) -> int:
        """Rounds that this process has said it played, counted from the beginning of the run; 0 before its first."""
        said = [line for line in list(self.lines) if line.startswith("round ")]
        return int(said[-1].split()[1].partition("/")[0]) if said else 0

    def recorded(self) -> int:
        """Whole lines in metrics.jsonl, of this process or of one before it."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saved(self) -> int:
        """The newest whole checkpoint; 0 where there is none."""
        return max((int(path.name) for path in self._checkpoints() if path.name.isdecimal()), default=0)

    def writing(self) -> int:
        """The checkpoint that this process is writing, or was when it ended; 0 where there is none."""
        for path in self._checkpoints():
            step, unfinished, _ = path.name.partition(".orbax-checkpoint-tmp")
            with contextlib.suppress(FileNotFoundError):
                if unfinished and path.stat().st_mtime >= self.started:
                    return int(step)
        return 0

    def _checkpoints(self) -> list[pathlib.Path]:
        folder = self.workdir / "checkpoints"
        return list(folder.iterdir()) if folder.exists() else []

    def models(self) -> int:
        """Models that this process has written."""
        files = (self.workdir / "models").glob("*/*.safetensors")
        return sum(path.stat().st_mtime >= self.started for path in files)  # each is put there whole, and stays


@dataclasses.dataclass(frozen=True)
class Fault:
    """One disturbance: where it was meant to be, where it was, and what it cost."""

    chain: int
    signal: signal.Signals
    phase: str  # "missed" where the process had ended before
    seconds: float  # since its start
    played: int
    saved: int  # newest whole checkpoint
    status: int
    resumed: int = -1  # where the process after it went on

    @property
    def lost(self) -> int:
        return self.played - self.resumed

    def fine(self) -> bool:
        """Nothing is lost but rounds after the newest checkpoint, and with SIGTERM not even those."""
        expected = {KILL: -signal.SIGKILL, TERM: 128 + signal.SIGTERM}[self.signal]
        most = 2 * EVERY - 1 if self.signal == KILL else 0  # rounds go on while a checkpoint is written
        return self.status == expected and self.resumed == self.saved and 0 <= self.lost <= most

    def row(self) -> str:
        fate = "ok" if self.fine() else f"FAILED, status {self.status}"
        where = f"{min(self.played + 1, ROUNDS)}" if self.played < ROUNDS else "-"
        return (
            f"{self.chain:5}  {self.signal.name:7}  {self.seconds:7.2f}  {self.phase:10}  {where:>8}  {self.saved:10}"
            f"  {self.resumed:7}  {self.lost:4}  {fate}"
        )


HEAD = "chain  signal   at (s)   phase       in round  checkpoint  resumed  lost"


def undisturbed(workdir: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
    """A run that is left alone -> how long each phase lasts, in seconds."""
    trainer, seen = Trainer(workdir, cache), {}

    def note(name: str, condition: Callable[[], Any]) -> None:
        trainer.until(condition)
        seen[name] = time.time()

    note("built", lambda: trainer.said("parameters a client"))
    note("played", lambda: trainer.played())
    note("writing", lambda: trainer.writing())
    note("written", lambda: trainer.saved())
    note("after", lambda: trainer.said("after the last round"))
    note("model", lambda: trainer.models() >= 1)
    note("models", lambda: trainer.models() >= MODELS)
    if trainer.end() != 0:
        raise RuntimeError(f"a run that was left alone failed:\n{''.join(trainer.lines)}")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "compile": seen["played"] - seen["built"],
        "round": statistics.median(line["seconds"] for line in lines[1:]),
        "checkpoint": max(seen["written"] - seen["writing"], 0.02) / 2,  # others are written faster than the first
        "finishing": seen["model"] - seen["after"],
        "evaluation": (workdir / "results.json").stat().st_mtime - seen["models"],
    }


def disturb(trainer: Trainer, chain: int, phase: str, number: signal.Signals, lasts: float, low: int) -> Fault:
    """Waits for the phase, of round `low` or later, sleeps for `lasts` seconds and sends the signal."""
    reached = {
        "compile": lambda: trainer.said("parameters a client"),
        "round": lambda: trainer.played() >= low,
        "checkpoint": lambda: trainer.writing() >= low,
        "finishing": lambda: trainer.said("after the last round"),
        "evaluation": lambda: trainer.models() >= MODELS,
    }[phase]
    if trainer.until(reached):
        time.sleep(lasts)
    models, writing, seconds = trainer.models(), trainer.writing(), time.time() - trainer.started
    trainer.process.send_signal(number)
    status = trainer.end()
    if status == 0:
        phase = "missed"
    elif phase in IN_LOOP:
        phase = "checkpoint" if (trainer.writing() if number == KILL else writing) else "round"
    elif phase == "finishing" and models:
        phase = "evaluation"  # of some clients; the others may be in training
    return Fault(chain, number, phase, seconds, trainer.recorded(), trainer.saved(), status)


def chain_of_faults(
    chain: int, folder: pathlib.Path, lasts: dict[str, float], draw: random.Random, *arguments: str
) -> Iterator[Fault]:
    """Runs to the end in spite of the plan's disturbances; yields each once it is known what came of it."""
    workdir, low, before = folder / f"chain{chain}", 1, None
    for place, phase in enumerate(PLAN):
        trainer = Trainer(workdir, folder / (f"cache{chain}" if phase == "compile" else "cache"), *arguments)
        number = TERM if place == TERM_AT[chain % len(TERM_AT)] else KILL
        fault = disturb(trainer, chain, phase, number, draw.uniform(0, lasts[phase]), low + draw.randrange(EVERY))
        low += EVERY * (phase in IN_LOOP)
        if before is not None:
            yield dataclasses.replace(before, resumed=resumed_after(trainer.lines))
        before = fault if fault.phase != "missed" else None
    trainer = Trainer(workdir, folder / "cache", *arguments)
    if trainer.end() != 0:
        raise RuntimeError(f"chain {chain} does not end\n{''.join(trainer.lines)}")
    if before is not None:
        yield dataclasses.replace(before, resumed=resumed_after(trainer.lines))


def resumed_after(lines: list[str]) -> int:
    """R of "resuming after round R of T"; 0 where the run began afresh."""
    said = [line.split()[3] for line in lines if line.startswith("resuming after round ")]
    return int(said[0]) if said else 0


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """All that a run leaves, by file, without times and without the folder's name."""
    left = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_file() and not name.startswith(("checkpoints/", "store/")):
            left[name] = path.read_bytes()
    left["config.json"] = json.loads(left["config.json"])
    left["results.json"] = {k: v for k, v in json.loads(left["results.json"]).items() if k != "timing"}
    for config in (left["config.json"], left["results.json"]["config"]):
        del config["engine"]["host_gigabytes"]  # has no effect on results
    lines = [json.loads(line) for line in left["metrics.jsonl"].splitlines()]
    left["metrics.jsonl"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    left["report.md"] = _without(left["report.md"], b"# ", b"Timing: ")
    left["report.html"] = _without(left["report.html"], b"<title>", b"<h1 ", b'<div class="wide" ', b"<p>Timing: ")
    stored = json.loads((workdir / "checkpoints" / str(ROUNDS) / "_CHECKPOINT_METADATA").read_text())
    if not (workdir / "store").exists():  # else it says in which rows of files personal blocks are
        left["the last checkpoint"] = stored["custom_metadata"]["manifest"]  # with a checksum for every array
    return left


def _without(text: bytes, *beginnings: bytes) -> list[bytes]:
    return [line for line in text.splitlines() if not line.startswith(beginnings)]


def differences(workdir: pathlib.Path, expected: dict[str, Any]) -> list[str]:
    found = outcome(workdir)
    if "the last checkpoint" not in found:
        expected = {name: content for name, content in expected.items() if name != "the last checkpoint"}
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills the trainer at random moments and compares what comes out.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", type=int, default=4, help="runs that are killed six times and stopped once each")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps everything there; default: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="tap_jax_faults_"))
    draw, began = random.Random(arguments.seed), time.time()

    cold = undisturbed(folder / "first", folder / "cache")
    expected = outcome(folder / "first")
    lasts = undisturbed(folder / "second", folder / "cache") | {"compile": cold["compile"]}
    failed = [f"second: {name}" for name in differences(folder / "second", expected)]
    print("two runs left alone " + ("DIFFER" if failed else f"are the same: {len(expected)} files"))
    print("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in lasts.items()), flush=True)

    faults = []
    print(HEAD, flush=True)
    for chain in range(arguments.chains):
        further = [ON_DISK] if chain == arguments.chains - 1 else []
        for fault in chain_of_faults(chain, folder, lasts, draw, *further):
            faults.append(fault)
            print(fault.row(), flush=True)
        changed = differences(folder / f"chain{chain}", expected)
        if further and not (folder / f"chain{chain}" / "store").exists():
            changed.append("store")
        failed += [f"chain {chain}: {name}" for name in changed]
        print(f"chain {chain}: " + (f"DIFFERS in {', '.join(changed)}" if changed else "the same bits"), flush=True)

    counts = collections.Counter((fault.signal.name, fault.phase) for fault in faults)
    print(", ".join(f"{count} x {name} in {phase}" for (name, phase), count in sorted(counts.items())))
    failed += [f"chain {fault.chain}: {fault.signal.name} in {fault.phase}" for fault in faults if not fault.fine()]
    kills, stops = ([fault for fault in faults if fault.signal == number] for number in (KILL, TERM))
    if len(kills) < 5 * arguments.chains or len(stops) < arguments.chains * 3 // 4:
        failed.append(f"only {len(kills)} kills and {len(stops)} SIGTERMs reached a process at work")
    failed += [f"no kill in {phase}" for phase in {*PLAN} - {fault.phase for fault in kills}]
    lost = max((fault.lost for fault in faults), default=0)
    print(f"{len(kills)} kills, {len(stops)} SIGTERMs, at most {lost} rounds lost, {time.time() - began:.0f} s")
    print("FAILED: " + "; ".join(failed) if failed else "every run ended with the bits of the one left alone")
    if not arguments.folder and not failed:
        shutil.rmtree(folder)
    elif failed:
        print(f"the runs are in {folder}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
