"""Where a run's curves go beside metrics.jsonl: anything with `write` and `close`; TensorBoard and Weights & Biases.

A step is the number of rounds played: 1 after the first. Scores of finished models come one step after the last round.
"""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from tap_jax.errors import UserError
from tap_jax.whole_files import write_file

_LOG = logging.getLogger(__name__)

FINISH_SECONDS = 60.0  # that a run waits at its end for Weights & Biases to send what is left


class Writer(Protocol):
    """Takes the curves of a run."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Finite values by name; steps grow."""

    def close(self) -> None:
        """After the last `write`, however the run ends."""


def check(names: Iterable[str]) -> None:
    """Whether these of `config.defaults.WRITERS` can be had.

    Raises:
      UserError: a package is missing.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name: Weights & Biases leaves such
            raise UserError(f"writers: '{name}' is not installed; pip install 'tap-jax[{name}]', or leave it out")


def open_writer(name: str, workdir: pathlib.Path, config: Mapping[str, Any], say: Callable[[str], None]) -> Writer:
    """The writer of this name, one of `config.defaults.WRITERS`, for the run in a folder.

    Args:
      config: nested, JSON-ready; kept beside the curves where the writer can.
      say: gets a line where the curves are elsewhere.

    Raises:
      UserError: it does not start.
    """
    return TensorBoard(workdir) if name == "tensorboard" else WandB(workdir, config, say)


class Guarded:
    """A writer that cannot end a run: once it fails there is one warning, it is closed, and gets nothing more."""

    def __init__(self, writer: Writer):
        self._writer: Writer | None = writer

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._do(self._writer, lambda writer: writer.write(step, scalars))

    def close(self) -> None:
        """See `Writer`."""
        writer, self._writer = self._writer, None
        self._do(writer, lambda writer: writer.close())

    def _do(self, writer: Writer | None, act: Callable[[Writer], None]) -> None:
        if writer is None:
            return
        try:
            act(writer)
        except Exception as error:
            if self._writer is not None:  # it was not being closed
                self._writer = None
                with contextlib.suppress(Exception):
                    writer.close()
            why = " ".join(str(error).split()) or type(error).__name__
            _LOG.warning("writers: %s has failed and gets nothing more (%s)", type(writer).__name__, why[:300])


# --- TensorBoard and Weights & Biases ------------------------------------------------------------------------------


class TensorBoard:
    """Event files in workdir/tensorboard, one for each time that the run was started.

    They are written as they come, without a thread: what fails fails here. TensorFlow is not needed, nor loaded.
    """

    def __init__(self, workdir: pathlib.Path):
        self._folder = pathlib.Path(workdir) / "tensorboard"
        self._records: Any = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Writer`. The first step of a resumed run takes the place of what earlier files have from it on."""
        if self._records is None:
            self._open(step)
        self._add(step=step, summary={"value": [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]})
        self._records.flush()

    def close(self) -> None:
        """See `Writer`."""
        if self._records is not None:
            self._records.close()

    def _open(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() // 1000:017}.{os.getpid()}"
        self._records = RecordWriter((self._folder / name).open("xb"))
        self._add(file_version="brain.Event:2")
        self._add(step=step, session_log={"status": SessionLog.START})

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


class WandB:
    """A run of Weights & Biases, resumed under the id that workdir/wandb/run.json keeps.

    Project, entity, mode and the like are what WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE ... say. Rounds that are played
    again after an interruption give the same numbers: what the server has, or an earlier process is known to have
    written, is not written again. A process that was killed while offline is not known of: it keeps much in memory.

    Raises:
      UserError: it does not start.
    """

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], say: Callable[[str], None]):
        self._kept = pathlib.Path(workdir) / "wandb" / "run.json"
        self._id, step = secrets.token_hex(4), 0
        with contextlib.suppress(OSError, ValueError, KeyError):  # there is none, or it is damaged: a run of its own
            kept = json.loads(self._kept.read_text())
            self._id, step = kept["id"], kept["step"]
        try:
            import wandb

            self._kept.parent.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tap-jax"),
                name=os.environ.get("WANDB_NAME", pathlib.Path(workdir).resolve().name),
                id=self._id,
                resume="allow",
                dir=str(workdir),
                config=dict(config),
                # The terminal is the run's own.
                settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS),
            )
        except Exception as error:  # the package, its service, its settings, the disk
            why = " ".join(str(error).split())
            raise UserError(f"writers: 'wandb' does not start ({why}); or set WANDB_MODE=offline") from error
        self._keep(step)
        self._step = max(step, self._run.step - 1)  # the run's own is the next one
        if not self._run.disabled:
            say(f"wandb: offline, in {self._kept.parent}" if self._run.offline else f"wandb: {self._run.url}")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Writer`."""
        if step > self._step:
            self._run.log(dict(scalars), step=step, commit=True)
            self._step = step

    def close(self) -> None:
        """See `Writer`."""
        self._run.finish()
        self._keep(self._step)

    def _keep(self, step: int) -> None:
        if not self._run.disabled:
            write_file(self._kept, json.dumps({"id": self._id, "step": step}))


# --- what is written -----------------------------------------------------------------------------------------------


def of_round(line: Mapping[str, Any], margins: Sequence[str] = ()) -> dict[str, float]:
    """A line of metrics.jsonl as scalars.

    loss/MODEL is the mean over clients and tasks, loss/MODEL/TASK over clients, of the losses that are numbers;
    replacements/VARIANT/TASK counts clients, for all tasks seen; dropped counts updates; epsilon is there where the run
    is private; seconds and learning_rate.

    Args:
      margins: the variants that replace, such as "tap".
    """
    found: dict[str, float] = {}
    for model, clients in line["losses"].items():
        by_task: dict[str, list[float]] = {}
        for tasks in clients.values():
            for task, loss in tasks.items():
                by_task.setdefault(task, []).extend([] if loss is None else [loss])
        by_task = {task: losses for task, losses in by_task.items() if losses}
        if by_task:
            found[f"loss/{model}"] = statistics.fmean(loss for losses in by_task.values() for loss in losses)
        found |= {f"loss/{model}/{task}": statistics.fmean(losses) for task, losses in by_task.items()}
    if "replacements" in line:
        seen = dict.fromkeys(task for tasks in line["losses"].get("federated", {}).values() for task in tasks)
        found |= {f"replacements/{variant}/{task}": 0.0 for variant in margins for task in seen}
        for entry in line["replacements"]:
            name = f"replacements/{entry['variant']}/{entry['task']}"
            found[name] = found.get(name, 0.0) + 1
    if "dropped" in line:
        found["dropped"] = float(len(line["dropped"]))
    return found | {name: float(line[name]) for name in ("epsilon", "learning_rate", "seconds") if name in line}
