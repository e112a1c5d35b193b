"""A run's folder: whose it is, who is at work in it, what it holds before the first round, and earlier results."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator

import jax

from tap_jax import config as configuration
from tap_jax.config import ConfigDict
from tap_jax.engine.agreement import in_step
from tap_jax.engine.file_lock import hold
from tap_jax.errors import UserError
from tap_jax.experiment import Experiment
from tap_jax.federation import Federation
from tap_jax.whole_files import write_file

CLIENTS = "clients.json"  # names, and task -> training samples; only where the data name them


def check(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Whether the folder is new, or of a run of this configuration.

    Raises:
      UserError: it is neither; the message names the fields that differ.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir: {workdir} is a file; name a folder")
    if not (workdir / "config.json").exists():
        return
    before = configuration.of_run(workdir)
    if configuration.config_hash(before) != configuration.config_hash(config):
        raise UserError(
            f"workdir: {workdir} holds a run of another configuration ({configuration.differences(before, config)});"
            " name another folder or remove it"
        )


def check_clients(workdir: pathlib.Path, federation: Federation) -> None:
    """Whether the clients that the data name are those that the run began with.

    Raises:
      UserError: they are not; the message names some.
    """
    path = workdir / CLIENTS
    if not federation.named or not path.exists():
        return
    try:
        before = {entry["name"]: set(entry["tasks"]) for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"workdir: {path} is damaged; remove it, and the data's clients are taken as they are"
        ) from None
    now = {client.name: set(client.shares) for client in federation.clients}
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if differing:
        listed = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise UserError(
            f"workdir: {workdir} holds a run of other clients or tasks of theirs ({listed}); bring the data back, or"
            " name another folder"
        )


def _check_samples(workdir: pathlib.Path, now: list[dict]) -> None:
    """Whether clients have as many training samples as when the run began: it would go on with other data."""
    before = {entry["name"]: entry["tasks"] for entry in json.loads((workdir / CLIENTS).read_text(encoding="utf-8"))}
    for entry in now:
        for task, count in entry["tasks"].items():
            if (had := before[entry["name"]].get(task)) != count:
                raise UserError(
                    f"workdir: {workdir} holds a run in which {entry['name']} has {had} samples of {task}, and now"
                    f" {count}; bring the data back, or name another folder"
                )


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other processes out of it for as long as the body lasts.

    However the process ends, the folder is free then.

    Raises:
      UserError: another process is in it.
    """
    descriptor = None
    with in_step():
        if jax.process_index() == 0:  # for all processes of the run
            workdir.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = hold(workdir / ".lock")
            except BlockingIOError:
                raise UserError(
                    f"workdir: another process is at work in {workdir}; wait for it, or name another folder"
                ) from None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def begin(workdir: pathlib.Path, experiment: Experiment) -> None:
    """Writes what a run leaves before its first round: the configuration, the tokenizer, clients that have names."""
    found = []
    if experiment.federation.named:
        counts = zip(experiment.federation.labels, experiment.data.samples(), strict=True)
        found = [{"name": name, "tasks": tasks} for name, tasks in counts]
        if (workdir / CLIENTS).exists():
            _check_samples(workdir, found)
    write_file(workdir / "config.json", configuration.to_json(experiment.config))
    if found:
        write_file(workdir / CLIENTS, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if experiment.data.tokenizer is not None:
        experiment.data.tokenizer.save(workdir / "tokenizer")


def earlier_results(path: pathlib.Path) -> dict:
    """What is in results.json, for what an evaluation does not make anew: replacements, timing and the rest.

    Raises:
      UserError: the run has not finished, or the file is damaged.
    """
    if not path.exists():
        raise UserError(f"workdir: the run has not finished; call train again ({path} is missing)")
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("timing"), dict):
            events = found.get("replacements")
            if isinstance(events, list) and all(isinstance(event, dict) and "task" in event for event in events):
                return found
    raise UserError(f"workdir: results.json is damaged; call train again, which makes it anew ({path})")
