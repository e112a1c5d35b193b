"""`tap-jax export`: a model of a finished run as files for others.

from tap_jax.runs.exporting import export_client
export_client("runs/demo", "exports/client3", client=3)
"""

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from tap_jax import blocks
from tap_jax import config as configuration
from tap_jax.assembly import federation_of
from tap_jax.blocks import Blocks
from tap_jax.config import ConfigDict
from tap_jax.engine import rounds
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.errors import UserError
from tap_jax.experiment import Experiment, build
from tap_jax.export.staging import check_free
from tap_jax.federation import Federation
from tap_jax.models.server_model import ServerModel
from tap_jax.registry import METHODS, server_variants
from tap_jax.runs import run_folder
from tap_jax.runs.runner import stored_model

FORMATS = ("torch", "peft", "huggingface")
MODELS = ("personal", "federated", "server")


def export_client(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    client: int | str | None = None,
    format: str = "torch",
    model: str = "personal",
    variant: str = "",
    tasks: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Exports one model and compares what was written with the JAX model, in float32.

    Args:
      workdir: of a finished run. The run's data must be at hand as for `evaluate`.
      out: a new or empty folder.
      client: whose, by number from 0 or by name; may be left out for model="server", which is then of all tasks.
      format: "torch": a folder for `export.torch_model`, the whole model. "peft": the encoders' LoRA as PEFT adapters
        for FlavaModel or ViltModel, the rest beside them. "huggingface": a FlavaModel or ViltModel with the encoders'
        LoRA merged, and nothing else of what was trained (but ViLT's CLS and positions).
      model: "personal": X[i] as `variant` leaves it. "federated": W̃[i], what client i got after the last round.
        "server": W̃.
      variant: of a personal model; "" for the run's first.
      tasks: names, only these; () for all that the client has (all of the federation where no client is named).
      say: is given a line for each checkpoint that is passed over, and why.

    Returns:
      The largest difference between the outputs of the export and of the JAX model, relative to the largest output.

    Raises:
      UserError: no finished run, an unknown client, task, variant, format or model, one that the run or the format does
        not have, a folder in use, trained values that are no numbers, or an export that does not reproduce the model.
        Nothing is written then.

    Example:
      Of the run that is `run`'s example.

      >>> import pathlib
      >>> import tap_jax as tap
      >>> tap.export_client("runs/small", "exports/client1", client=1) < 1e-4
      True
      >>> sorted(path.name for path in pathlib.Path("exports/client1").glob("*.json"))
      ['config.json', 'tap_export.json']
    """
    workdir = pathlib.Path(workdir)
    tasks = (tasks,) if isinstance(tasks, str) else tasks
    _one_of("format", format, FORMATS)
    _one_of("model", model, MODELS)
    config = _finished(workdir)
    entry = METHODS[config.method]
    if model != "personal" and not (entry.sends or entry.pooled):
        raise UserError(f"model: a run of method={entry.name} trains no {model} model; use model=personal")
    federation = federation_of(config)
    run_folder.check_clients(workdir, federation)
    label, client = client, None if client is None else federation.number_of(client)
    names = _tasks(federation, client, label, model, tasks)
    variant = _variant(configuration.variants_of(config), model, variant)
    check_free(out)
    experiment = build(config, federation=federation)
    trained, step = _blocks(experiment, workdir, model, client, variant, say)
    # A finished model can have other parts than the one that was trained (FedDAT's teacher).
    sizes = experiment.engine.finished.model.config if is_finished(model, variant) else experiment.model.config
    restricted = ServerModel(sizes, [task for task in experiment.model.tasks if task.name in names])
    origin = {
        "model": model,
        "client": None if client is None else federation.clients[client].name,
        "variant": variant or None,
        "round": step,
        "tasks": names,
        "seed": experiment.engine.settings.seed,
    }
    # The checkpoint that the frozen weights come from, for what our model does not store of it.
    source = None if experiment.sections.start_from else experiment.sections.weights or None
    frozen = jax.device_get(experiment.engine.frozen)
    for name in restricted.block_names:
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained[name])):
            raise UserError(
                f"model: block '{name}' holds values that are no numbers, its training diverged; export another"
                " variant, or train with a lower optimizer.learning_rate"
            )
    if format == "torch":
        from tap_jax.export.folder import write_torch

        return write_torch(restricted, frozen, trained, out, tokenizer=experiment.data.tokenizer, origin=origin)
    if format == "peft":
        from tap_jax.export.peft import write_peft

        return write_peft(restricted, frozen, trained, out, source=source, origin=origin)
    from tap_jax.export.huggingface import write_huggingface

    return write_huggingface(restricted, frozen, trained, out, source=source, origin=origin)


def _finished(workdir: pathlib.Path) -> ConfigDict:
    """The configuration of a finished run, in float32: exports are not rounded to the run's compute type."""
    config = configuration.of_run(workdir, {"compute_dtype": "float32"})
    if not (workdir / "results.json").is_file():
        raise UserError(f"workdir: the run in {workdir} has not finished (results.json is missing); call train again")
    return config


def _tasks(
    federation: Federation, client: int | None, label: int | str | None, model: str, wanted: Sequence[str]
) -> list[str]:
    """The names of the tasks to export, in the federation's order; `label` is what the client was called."""
    clients = len(federation.clients)
    if client is None:
        if model != "server":
            raise UserError(f"client: missing; a {model} model is some client's, name one of 0 to {clients - 1}")
        owner, mine = "the federation", federation.tasks
    else:
        owner, mine = f"client {label}", federation.tasks_of(client)
    names = [task.name for task in mine]
    for task in wanted:
        if task not in names:
            raise UserError(f"tasks: {owner} does not have '{task}'; it has {', '.join(names)}")
    return [name for name in names if name in wanted or not wanted]


def _variant(variants: Sequence[str], model: str, variant: str) -> str:
    """The variant of a personal model, of the run's; "" for models that come before the last phase."""
    if model == "personal":
        if variant:
            _one_of("variant", variant, variants)
        return variant or variants[0]
    if variant:
        raise UserError(f"variant: a {model} model is of no variant; drop it or use model=personal")
    return ""


def _blocks(
    experiment: Experiment,
    workdir: pathlib.Path,
    model: str,
    client: int | None,
    variant: str,
    say: Callable[[str], None],
) -> tuple[Blocks, int]:
    """The trained blocks, and after how many rounds."""
    if client is not None and is_finished(model, variant):
        return stored_model(experiment, workdir, variant, client), experiment.config.rounds
    state = rounds.resume(Checkpoints(workdir / "checkpoints", report=say), experiment.init(workdir))
    if state is None:
        raise UserError(f"workdir: no checkpoint in {workdir}; train again")
    server = experiment.engine.server_blocks(state.server)
    owned = server if client is None else experiment.partition.blocks_of(client)
    return blocks.select(server, [name for name in owned if not name.startswith(blocks.PRIVATE)]), state.round


def is_finished(model: str, variant: str) -> bool:
    """Whether a model is a client's own, as the last phase left it; the others are the server's blocks.

    Args:
      model: one of `MODELS`. variant: of a personal model.
    """
    return model == "personal" and variant not in server_variants()


def _one_of(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{field}: unknown '{value}'; use one of {', '.join(known)}")
