"""Cuts a configuration into its sections, typed: what each part of an experiment is given. No part reads it itself."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax import Array

from tap_jax import config as configuration
from tap_jax import platforms
from tap_jax.blocks import Tree
from tap_jax.config import ConfigDict
from tap_jax.data import classes, clients
from tap_jax.data.settings import DataSettings
from tap_jax.engine.agreement import first_said
from tap_jax.engine.local_training import TrainingSettings
from tap_jax.engine.memory import machine_memory
from tap_jax.engine.objective import SampleLoss
from tap_jax.engine.privacy import Privacy, epsilon
from tap_jax.engine.screening import Screening
from tap_jax.engine.settings import EngineSettings, MeshSettings
from tap_jax.errors import UserError
from tap_jax.evaluation.metrics import MetricSettings
from tap_jax.federation import Federation, client_table
from tap_jax.methods.base import Method, MethodContext, Outputs
from tap_jax.methods.criteria import Criterion
from tap_jax.methods.losses import task_loss
from tap_jax.models.attention import why_not_cudnn
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.platforms import Platform
from tap_jax.registry import METHODS, MethodEntry, Settings
from tap_jax.tasks import Task, complete, find_task, is_open


@dataclasses.dataclass(frozen=True)
class Sections:
    """A configuration, cut.

    Attributes:
      platform: of the devices.
      federation: the clients, and their tasks as declared. tasks: these with the classes in use (`data.image_classes`).
      variants: what the run is to yield.
      method: what is known of the method. method_settings: what it alone reads.
      data: of data. model: of the server model. engine: of local training. metrics: of scores.
      weights, start_from: a checkpoint of frozen weights, and an export to start from; "" for none.
      open: those of `engine.microbatch`, `engine.clients_at_once` and `engine.remat` that are left to the device
        (`device_sizes.sized`).
      notes: what was chosen where the platform does not say it.
    """

    platform: Platform
    federation: Federation
    tasks: tuple[Task, ...]
    variants: tuple[str, ...]
    method: MethodEntry
    method_settings: Settings
    data: DataSettings
    model: ModelConfig
    engine: EngineSettings
    metrics: MetricSettings
    weights: str
    start_from: str
    open: frozenset[str]
    notes: tuple[str, ...]

    @property
    def post_periods(self) -> tuple[int, ...]:
        """Lengths of what a client trains after the last round, see `MethodEntry.post_periods`."""
        return self.method.post_periods(self.variants)

    @property
    def gradients(self) -> int | None:
        """Gradients of the task losses that a local step takes; None where it computes more than those."""
        return self.method.gradients(self.method_settings)


def cut(
    config: ConfigDict,
    target: Platform | None = None,
    federation: Federation | None = None,
    *,
    attention: str = "",
) -> Sections:
    """The sections of a configuration, with a platform's defaults where it leaves them open.

    Args:
      target: the platform of devices that are not here; default: of this process's.
      federation: what `federation_of` makes of the configuration, where that is known already.
      attention: in the place of `engine.attention`: where shapes alone are wanted, naming one saves the trial.

    Raises:
      UserError: as of `federation_of`, or cuDNN's attention was asked for and cannot be had.
    """
    federation, most = federation or federation_of(config), config.data.image_classes
    method, method_settings = configuration.method_settings(config)
    model = model_config(config, target)
    chosen, notes = (attention, ()) if attention else attention_of(model, method, method_settings, target)
    left_open = {"microbatch": 0, "clients_at_once": 0, "remat": "auto"}
    return Sections(
        platform=target or platforms.here(),
        federation=federation,
        tasks=tuple(
            dataclasses.replace(task, classes=min(task.classes, most))
            if most and task.kind == "image_classification"
            else task
            for task in federation.tasks
        ),
        variants=configuration.variants_of(config),
        method=method,
        method_settings=method_settings,
        data=data_settings(config),
        model=dataclasses.replace(model, attention=chosen),
        engine=engine_settings(config, len(federation.clients), target),
        metrics=MetricSettings(**config.metrics),
        weights=config.model.weights,
        start_from=config.model.start_from,
        open=frozenset(name for name, word in left_open.items() if config.engine[name] == word),
        notes=notes,
    )


def data_settings(config: ConfigDict) -> DataSettings:
    """All that the data of a configuration are made of."""
    data, model, federation = config.data, config.model, config.federation
    return DataSettings(
        root=data.root,
        seed=config.seed,
        vocab=model.vocab,
        max_text=model.max_text,
        max_answer=model.max_answer,
        tokenizer=data.tokenizer,
        train_size=data.train_size,
        test_size=data.test_size,
        image_classes=data.image_classes,
        cache_dir=configuration.data_cache(config),
        split=federation.split,
        natural=configuration.is_natural(config),
        alpha=federation.alpha,
        parts=federation.parts,
        classes_per_client=federation.classes_per_client,
        client_column=data.client_column,
        tasks=federation.tasks,
        personal_test=data.test_split == "personal",
        held_out=data.held_out,
        on_bad_row=data.on_bad_row,
        too_long=data.too_long,
    )


def federation_of(config: ConfigDict) -> Federation:
    """The clients and tasks of a configuration: of its table, or those that its data name.

    Where the data name them, the column of clients is read, or the number of rows of every client's files, and nothing
    else. A pooled method has one client with all of it.

    Raises:
      UserError: no such data, or as of `config.table_federation`.
    """
    if not configuration.is_natural(config):
        return configuration.table_federation(config)
    found = clients.natural_federation(data_settings(config))
    if METHODS[config.method].pooled:
        return client_table(({task.name: 1.0 for task in found.tasks},))
    if config.cohort_size > len(found.clients):
        raise UserError(
            f"cohort_size: {config.cohort_size}, but the data name {len(found.clients)} clients; use at most so many"
        )
    return found


def with_found(config: ConfigDict) -> ConfigDict:
    """The configuration, with the classes and domains that the declared tasks in use leave to their training rows.

    Raises:
      UserError: no such data, or labels that are no classes.
    """
    natural, section = configuration.is_natural(config), config.federation
    used = section.tasks if natural else {name for row in configuration.client_rows(section) for name in row}
    changes: dict[str, object] = {}
    for name, fields in config.tasks.items():
        classes_open, domains_open = is_open(complete(name, fields))
        if not (classes_open or domains_open) or (used and name not in used):
            continue
        rows = clients.training_rows(find_task(name), data_settings(config))
        found = classes.classes_of(find_task(name), rows) if classes_open else {}
        found |= classes.domains_of(find_task(name), rows) if domains_open else {}
        changes |= {f"tasks.{name}.{field}": value for field, value in found.items()}
    if not changes:
        return config
    complete_config = config.copy_and_resolve_references()
    complete_config.unlock()
    configuration.validate(configuration.override(complete_config, changes))
    return complete_config.lock()


def model_config(config: ConfigDict, target: Platform | None = None) -> ModelConfig:
    """The model section as `ModelConfig`, in bfloat16 on accelerators unless the configuration says otherwise.

    Its attention is as `engine.attention` says; see `attention_of`.
    """
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    entry, settings = configuration.method_settings(config)
    accelerated = (target or platforms.here()).accelerated
    dtype = config.compute_dtype if config.compute_dtype != "auto" else "bfloat16" if accelerated else "float32"
    return ModelConfig(
        **{name: value for name, value in config.model.items() if name in names},
        attention=config.engine.attention,
        remat=config.engine.remat == "layer",
        dtype=dtype,
        bottleneck=entry.adapters(settings),
    )


def attention_of(
    model: ModelConfig, method: MethodEntry, settings: Settings, target: Platform | None = None
) -> tuple[str, tuple[str, ...]]:
    """What `model.attention` stands for, on a GPU "cudnn" or "xla" for "auto", and notes on what was tried for that.

    Args:
      settings: of the method.
      target: where nothing can be tried: cuDNN's is taken to work where it can be asked for. Default: the devices here.

    Raises:
      UserError: cuDNN's is asked for and cannot be had.
    """
    asked, kind = model.attention, (target or platforms.here()).kind
    if asked == "auto" and kind != "gpu":  # "auto" would ask this process's devices
        return (asked if target is None else "einsum" if kind == "cpu" else "xla"), ()
    if asked not in ("auto", "cudnn"):
        return asked, ()
    reason = ""
    if method.second_order(settings):
        reason = f"it has no second derivative, which method '{method.name}' takes as it is set"
    elif kind != "gpu":
        reason = "no NVIDIA GPU is at hand"
    elif target is None:
        lengths = ((model.image_size // model.patch) ** 2 + 1, model.max_text)
        # What one process cannot do, none does: they run one program.
        reason = first_said(why_not_cudnn(model.heads, model.width, lengths, model.dtype))
    elif model.dtype != "bfloat16":
        reason = f"it does not compute in {model.dtype}"
    if asked == "cudnn" and reason:
        raise UserError(f"engine.attention: 'cudnn' cannot be had ({reason}); use 'auto'")
    chosen = "xla" if reason else "cudnn"
    if asked == chosen or target:
        return chosen, ()
    return chosen, (
        f"engine.attention: '{chosen}'" + (f", not 'cudnn': {reason}" if reason else ", which was tried here"),
    )


def method_of(sections: Sections, model: ServerModel, criterion: Criterion | None = None) -> Method:
    """The method that a configuration names.

    Args:
      criterion: of replacement, in the place of the configuration's.
    """
    context = MethodContext(model, sections.variants, sections.engine.post_steps, criterion)
    return sections.method.method(sections.method_settings, context)


def finished_model(model: ServerModel) -> ServerModel:
    """The model that finished blocks are of: FedDAT's has adapters of both kinds side by side, twice as wide."""
    if not model.config.bottleneck:
        return model
    return ServerModel(dataclasses.replace(model.config, bottleneck=2 * model.config.bottleneck), model.tasks)


def sample_loss(model: ServerModel) -> SampleLoss:
    """(frozen, parts, task, batch, key) -> (outputs, latents, ℓ [B]): the task losses of equation 2."""

    def loss(
        frozen: Tree, parts: Tree, task: Task, batch: Mapping[str, Array], key: Array | None
    ) -> tuple[Outputs, Array, Array]:
        outputs, latents = model.forward(frozen, parts, task, batch, key=key)
        return outputs, latents, task_loss(task.kind, outputs, batch)

    return loss


# A checkpoint of blocks in memory has an array for every leaf of every client's blocks, a million of them for 3,000
# clients: it takes many times as long as a round (launch/growth.sh), one of blocks on disk a fraction of it.
MANY_CLIENTS = 300


def engine_settings(config: ConfigDict, clients: int, target: Platform | None = None) -> EngineSettings:
    """The configuration's numbers, with the platform's defaults where it leaves them open.

    Left open, `microbatch` and `clients_at_once` stay 0: `device_sizes.sized` puts numbers there. Rows are packed on
    accelerators. Dropout masks are of a TPU's own generator on TPUs, where Threefry's arithmetic would be two thirds of
    what there is to compile of a forward pass; elsewhere of Threefry, whose masks are the same on every machine.
    Personal blocks may take half of the host's memory before they go to disk, and none where clients are very many.
    """
    platform = target or platforms.here()
    engine, optimizer = config.engine, config.optimizer
    bits, spare = engine.dropout_bits, 0 if clients > MANY_CLIENTS else machine_memory() // 2
    # All data in one place: as many iterations a round as the cohort's clients can take together.
    entry, settings = configuration.method_settings(config)
    cohort, pooled = (1, config.cohort_size) if entry.pooled else (config.cohort_size, 1)
    periods = entry.post_periods(configuration.variants_of(config))
    training = TrainingSettings(clip_norm=optimizer.clip_norm, weight_decay=optimizer.weight_decay)

    def rate(round_: int) -> float:
        """Linear from learning_rate_initial over warmup_rounds, then constant (Table 21)."""
        done = min(1.0, round_ / optimizer.warmup_rounds) if optimizer.warmup_rounds else 1.0
        first = optimizer.learning_rate_initial
        return first + done * (optimizer.learning_rate - first)

    return EngineSettings(
        rounds=config.rounds,
        cohort_size=cohort,
        clients_at_once=min(clients, engine.clients_at_once),
        batch=config.batch_size,
        local_steps=config.local_steps * pooled,
        post_steps=config.post_steps,
        microbatch=engine.microbatch,
        packed=engine.packing == "on" or (engine.packing == "auto" and platform.accelerated),
        training=training,
        persist=optimizer.state == "persist",
        rate=rate,
        post_rate=optimizer.post_learning_rate,
        longest=max(config.local_steps * pooled, config.post_steps * max((1, *periods))),
        aggregation=config.aggregation,
        scope=config.replacement.scope,
        seed=config.seed,
        screening=Screening(config.screening.max_norm, config.screening.on_broken == "stop"),
        privacy=Privacy(**config.privacy) if config.privacy.noise_multiplier else None,
        window=max(1, engine.window),
        generator="rbg" if bits == "rbg" or (bits == "auto" and platform.kind == "tpu") else "threefry2x32",
        in_pieces=bool(settings.get("distillation", {}).get("patience")),
        host_bytes=int(1e9 * engine.host_gigabytes) if engine.host_gigabytes else spare,
        mesh=MeshSettings(**config.mesh),
    )


def test_notes(federation: Federation, personal: Sequence[Mapping[str, np.ndarray]] | None) -> tuple[str, ...]:
    """Which clients have no test samples of their own, and so no score; a line per task."""
    if personal is None:
        return ()
    notes = []
    for task in federation.tasks:
        lacking = [
            client.name
            for client, mine in zip(federation.clients, personal, strict=True)
            if task.name in client.shares and task.name not in mine
        ]
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            notes.append(f"data: no test rows of {task.name}, so no score, for {', '.join(lacking[:3])}{more}")
    return tuple(notes)


def privacy_notes(sections: Sections) -> tuple[str, ...]:
    """What a user who asked for privacy should know before the run.

    Raises:
      UserError: the accountant is not installed.
    """
    settings, clients = sections.engine, len(sections.federation.clients)
    privacy, rounds = settings.privacy, settings.rounds
    if privacy is None:
        return ()
    found = epsilon(privacy, clients=clients, cohort=settings.cohort_size, rounds=rounds)
    notes = [
        f"privacy: epsilon will be {found:.4g} at delta {privacy.delta:g} after {rounds} rounds, for one of"
        f" {clients} clients; it covers the server's blocks alone"
    ]
    if sections.data.tokenizer == "train" and any("text" in task.modalities for task in sections.tasks):
        notes.append(
            "privacy: the word pieces are made of all clients' texts, which epsilon does not cover; name a public"
            " data.tokenizer where that matters"
        )
    return tuple(notes)
