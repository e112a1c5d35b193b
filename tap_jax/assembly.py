"""From a configuration to the parts of an experiment: sizes, losses, the method and how it runs."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tap_jax import config as configuration
from tap_jax import platforms
from tap_jax.config import ConfigDict
from tap_jax.data import classes, clients
from tap_jax.data.settings import DataSettings
from tap_jax.engine.agreement import first_said
from tap_jax.engine.local_training import TrainingSettings
from tap_jax.engine.memory import machine_memory
from tap_jax.engine.objective import SampleLoss
from tap_jax.engine.privacy import Privacy, epsilon
from tap_jax.engine.screening import Screening
from tap_jax.engine.settings import EngineSettings
from tap_jax.errors import UserError
from tap_jax.federation import Federation, client_table
from tap_jax.methods.base import Method, MethodContext
from tap_jax.methods.criteria import Criterion
from tap_jax.methods.losses import task_loss
from tap_jax.models.attention import why_not_cudnn
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.platforms import Platform
from tap_jax.registry import METHODS
from tap_jax.tasks import Task, complete, find_task, is_open


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
        folders={task: folder for task, folder in data.folders.items() if folder},
        cache_dir=configuration.data_cache(config),
        split=federation.split,
        natural=configuration.is_natural(config),
        alpha=federation.alpha,
        parts=federation.parts,
        classes_per_client=federation.classes_per_client,
        client_column=data.client_column,
        tasks=federation.tasks,
        personal_test=data.test_split == "personal",
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


def tasks_of(config: ConfigDict, federation: Federation) -> tuple[Task, ...]:
    """The federation's tasks with the number of classes in use (`data.image_classes`)."""
    most = config.data.image_classes
    return tuple(
        dataclasses.replace(task, classes=min(task.classes, most))
        if most and task.kind == "image_classification"
        else task
        for task in federation.tasks
    )


def compute_dtype(config: ConfigDict, platform: Platform | None = None) -> str:
    """bfloat16 on accelerators, float32 on CPU, unless the configuration says otherwise."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return "bfloat16" if (platform or platforms.here()).accelerated else "float32"


def attention_of(config: ConfigDict, platform: Platform | None = None) -> tuple[str, str]:
    """`engine.attention`, where that is "auto" on a GPU "cudnn" or "xla"; and why not cuDNN's, if so.

    Args:
      platform: of a target, where nothing can be tried: cuDNN's is taken to work where it can be asked for. Default:
        of this process's devices.
    """
    chosen = config.engine.attention
    kind = (platform or platforms.here()).kind
    if platform and chosen == "auto" and kind != "gpu":  # "auto" would ask this process's devices
        return "einsum" if kind == "cpu" else "xla", ""
    if chosen != "auto" or kind != "gpu":
        return chosen, ""
    reason = _why_not_cudnn(config, platform)
    return ("xla" if reason else "cudnn"), reason


def remat_of(config: ConfigDict) -> str:
    """`engine.remat`, "none" where that is "auto" (`device_sizes.sized` has set it where the device wants it)."""
    return "none" if config.engine.remat == "auto" else config.engine.remat


def _why_not_cudnn(config: ConfigDict, platform: Platform | None = None) -> str:
    """Why cuDNN's attention cannot be had for this run; empty where it can."""
    entry, settings = configuration.method_settings(config)
    if entry.second_order(settings):
        return f"it has no second derivative, which method '{entry.name}' takes as it is set"
    if (platform or platforms.here()).kind != "gpu":
        return "no NVIDIA GPU is at hand"
    if platform:
        dtype = compute_dtype(config, platform)
        return "" if dtype == "bfloat16" else f"it does not compute in {dtype}"
    model = config.model
    lengths = ((model.image_size // model.patch) ** 2 + 1, model.max_text)
    # What one process cannot do, none does: they run one program.
    return first_said(why_not_cudnn(model.heads, model.width, lengths, compute_dtype(config)))


def attention_notes(config: ConfigDict, platform: Platform | None = None) -> tuple[str, ...]:
    """What was chosen where the platform does not say it.

    Raises:
      UserError: cuDNN's was, and cannot be had.
    """
    if config.engine.attention == "cudnn" and (reason := _why_not_cudnn(config, platform)):
        raise UserError(f"engine.attention: 'cudnn' cannot be had ({reason}); use 'auto'")
    chosen, reason = attention_of(config, platform)
    if platform or chosen == config.engine.attention:
        return ()
    return (f"engine.attention: '{chosen}'" + (f", not 'cudnn': {reason}" if reason else ", which was tried here"),)


def model_config(
    config: ConfigDict, *, vocab: int | None = None, attention: str = "", platform: Platform | None = None
) -> ModelConfig:
    """The model section as `ModelConfig`; where it is for its shapes alone, naming an attention saves the trial."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    fields = {name: value for name, value in config.model.items() if name in names}
    fields |= {
        "attention": attention or attention_of(config, platform)[0],
        "remat": remat_of(config) == "layer",
        "dtype": compute_dtype(config, platform),
    }
    entry, settings = configuration.method_settings(config)
    fields |= {"bottleneck": entry.adapters(settings)}
    return ModelConfig(**fields | ({} if vocab is None else {"vocab": vocab}))


def method_of(
    config: ConfigDict, model: ServerModel, variants: tuple[str, ...], criterion: Criterion | None = None
) -> Method:
    """The method that the configuration names.

    Args:
      variants: what the run is to yield.
      criterion: of replacement, in the place of the configuration's.
    """
    entry, settings = configuration.method_settings(config)
    return entry.method(settings, MethodContext(model, variants, config.post_steps, criterion))


def finished_model(model: ServerModel) -> ServerModel:
    """The model that finished blocks are of: FedDAT's has adapters of both kinds side by side, twice as wide."""
    if not model.config.bottleneck:
        return model
    return ServerModel(dataclasses.replace(model.config, bottleneck=2 * model.config.bottleneck), model.tasks)


def sample_loss(model: ServerModel) -> SampleLoss:
    """(frozen, parts, task, batch, key) -> (outputs, latents, ℓ [B]): the task losses of equation 2."""

    def loss(frozen, parts, task, batch, key):
        outputs, latents = model.forward(frozen, parts, task, batch, key=key)
        return outputs, latents, task_loss(task.kind, outputs, batch)

    return loss


# A checkpoint of blocks in memory has an array for every leaf of every client's blocks, a million of them for 3,000
# clients: it takes many times as long as a round (launch/growth.sh), one of blocks on disk a fraction of it.
MANY_CLIENTS = 300


def host_bytes(config: ConfigDict, clients: int) -> int:
    """How much memory personal blocks may take on the host before they go to disk.

    By default half of what there is, and none for very many clients.
    """
    if config.engine.host_gigabytes:
        return int(1e9 * config.engine.host_gigabytes)
    return 0 if clients > MANY_CLIENTS else machine_memory() // 2


def packed_of(config: ConfigDict, platform: Platform | None = None) -> bool:
    """Whether texts share sequences, see `data.packing`."""
    if config.engine.packing != "auto":
        return config.engine.packing == "on"
    return (platform or platforms.here()).accelerated


def generator_of(config: ConfigDict, platform: Platform | None = None) -> str:
    """JAX's name of the generator of dropout masks.

    "auto" is a TPU's own generator on TPUs, where Threefry's arithmetic would be two thirds of what there is to compile
    of a forward pass; elsewhere Threefry, whose masks are the same on every machine.
    """
    tpu = (platform or platforms.here()).kind == "tpu"
    chosen = config.engine.dropout_bits
    return "rbg" if chosen == "rbg" or (chosen == "auto" and tpu) else "threefry2x32"


def engine_settings(config: ConfigDict, clients: int, platform: Platform | None = None) -> EngineSettings:
    """The configuration's numbers, with the platform's defaults where it leaves them open.

    On CPU: rows of one sample (wide rows lose to caches, and padding is work), batches of the cohort's size so
    that one program serves everything. On accelerators: rows of 32 samples or of as many tokens, packed, all clients in
    one pass.
    """
    cpu, optimizer = not (platform or platforms.here()).accelerated, config.optimizer
    # All data in one place: as many iterations a round as the cohort's clients can take together.
    entry, settings = configuration.method_settings(config)
    cohort, pooled = (1, config.cohort_size) if entry.pooled else (config.cohort_size, 1)
    training = TrainingSettings(clip_norm=optimizer.clip_norm, weight_decay=optimizer.weight_decay)

    def rate(round_: int) -> float:
        """Linear from learning_rate_initial over warmup_rounds, then constant (Table 21)."""
        done = min(1.0, round_ / optimizer.warmup_rounds) if optimizer.warmup_rounds else 1.0
        first = optimizer.learning_rate_initial
        return first + done * (optimizer.learning_rate - first)

    twice = any(variant.endswith("+2p") for variant in configuration.variants_of(config))
    return EngineSettings(
        cohort_size=cohort,
        clients_at_once=min(clients, config.engine.clients_at_once or (cohort if cpu else clients)),
        batch=config.batch_size,
        local_steps=config.local_steps * pooled,
        post_steps=config.post_steps,
        microbatch=config.engine.microbatch or (1 if cpu else min(32, config.batch_size)),
        packed=packed_of(config, platform),
        training=training,
        persist=optimizer.state == "persist",
        rate=rate,
        post_rate=optimizer.post_learning_rate,
        longest=max(config.local_steps * pooled, config.post_steps * (1 + twice)),
        aggregation=config.aggregation,
        scope=config.replacement.scope,
        seed=config.seed,
        screening=Screening(config.screening.max_norm, config.screening.on_broken == "stop"),
        privacy=Privacy(**config.privacy) if config.privacy.noise_multiplier else None,
        window=max(1, config.engine.window),
        generator=generator_of(config, platform),
        in_pieces=bool(settings.get("distillation", {}).get("patience")),
    )


def test_notes(federation: Federation, personal: Sequence[Mapping[str, np.ndarray]] | None) -> tuple[str, ...]:
    """Which clients have no test samples of their own, and so no score; a line per task."""
    notes = []
    for task in federation.tasks if personal is not None else ():
        lacking = [
            client.name
            for client, mine in zip(federation.clients, personal, strict=True)
            if task.name in client.shares and task.name not in mine
        ]
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            notes.append(f"data: no test rows of {task.name}, so no score, for {', '.join(lacking[:3])}{more}")
    return tuple(notes)


def privacy_notes(config: ConfigDict, federation: Federation) -> tuple[str, ...]:
    """What somebody who asked for privacy should know before the run.

    Raises:
      UserError: the accountant is not installed.
    """
    if not config.privacy.noise_multiplier:
        return ()
    privacy, clients = Privacy(**config.privacy), len(federation.clients)
    found = epsilon(privacy, clients=clients, cohort=config.cohort_size, rounds=config.rounds)
    notes = [
        f"privacy: epsilon will be {found:.4g} at delta {privacy.delta:g} after {config.rounds} rounds, for one of"
        f" {clients} clients; it covers the server's blocks alone"
    ]
    if config.data.tokenizer == "train" and any("text" in task.modalities for task in federation.tasks):
        notes.append(
            "privacy: the word pieces are made of all clients' texts, which epsilon does not cover; name a public"
            " data.tokenizer where that matters"
        )
    return tuple(notes)
