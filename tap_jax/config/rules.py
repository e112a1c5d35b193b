"""Which values a configuration may have, field by field and together."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tap_jax.config.defaults import FLAVA_POSITIONS, IMAGE_SIDE, WRITERS, choices, default_config
from tap_jax.config.derived import client_rows, is_natural, margins_of
from tap_jax.config.fields import cast, flat, is_number, refuse_unknown
from tap_jax.errors import UserError
from tap_jax.federation import client_table
from tap_jax.registry import METHODS
from tap_jax.tasks import declare, find_task

# Every other number is > 0; tuples of numbers elementwise.
_MAY_BE_ZERO = (
    "rounds", "post_steps", "seed", "checkpoint_every", "mesh.clients", "mesh.data", "model.text_positions",
    "optimizer.learning_rate_initial", "optimizer.warmup_rounds", "optimizer.weight_decay", "optimizer.clip_norm",
    "federation.parts", "data.train_size", "data.test_size", "data.image_classes", "distillation.patience",
    "engine.microbatch", "engine.clients_at_once", "engine.host_gigabytes", "engine.window",
    "screening.max_norm", "privacy.noise_multiplier",
)  # fmt: skip
_FRACTIONS = ("data.held_out", "model.lora_dropout", "model.head_dropout", "model.text_dropout")  # in [0, 1)
_ANY_NUMBER = ("distillation.temperature_power",)
_MOST_CLIENTS = 1_000_000  # of a federation; a table of many more would not fit into memory
_NON_EMPTY = ("data.root", "data.tokenizer", "metrics.bertscore_model", "metrics.device")


def validate(config: ConfigDict) -> None:
    """Checks every field's name, type and range, and how fields go together; makes the tasks of `tasks` known.

    Raises:
      UserError: one line that names the first wrong field and the remedy.
    """
    default = default_config()
    if "tasks" in config:  # else it is missed below
        _check_tasks(config)
    given = {field: value for field, value in flat(config).items() if not field.startswith("tasks.")}
    expected = flat(default)
    if "margins" in config and not isinstance(config.margins, ConfigDict):
        margins_of(config)
        expected = {f: v for f, v in expected.items() if not f.startswith("margins.")} | {"margins": config.margins}
    for field in given:
        if field not in expected:
            refuse_unknown(default, field)
    words = choices()
    for field, standard in expected.items():
        if field not in given:
            raise UserError(f"{field}: missing; start from tap_jax.config.default_config()")
        _check_field(field, cast(field, given[field], standard), words.get(field))
    for check in (_check_outcome, _check_privacy, _check_method, _check_model, _check_federation):
        check(config)


def _check_tasks(config: ConfigDict) -> None:
    """Declarations of tasks."""
    for name, fields in config.tasks.items():
        if not isinstance(fields, (Mapping, ConfigDict)):
            raise UserError(f"tasks.{name}: {fields!r}; use a dict such as {{'kind': 'image_generation', ...}}")
    declare(config.tasks)
    if config.federation.split == "folder":
        for name, fields in config.tasks.items():
            if fields.get("path"):
                raise UserError(
                    f"tasks.{name}.path: goes not with federation.split='folder', where each client's folder has one of"
                    " the task's name; drop one"
                )


def _check_outcome(config: ConfigDict) -> None:
    """What the run is to yield and to write."""
    known = [variant.name for variant in METHODS[config.method].variants]
    for variant in config.variants:
        if variant not in known:
            raise UserError(
                f"variants: '{variant}' does not come out of method '{config.method}';"
                f" use {', '.join(known)}, or variants=() for the first"
            )
    if len(set(config.variants)) < len(config.variants):
        raise UserError(f"variants: {', '.join(config.variants)}; name each once")
    for name in config.writers:
        if name not in WRITERS:
            raise UserError(f"writers: unknown '{name}'; use {', '.join(WRITERS)}, or writers=() for none")
    if len(set(config.writers)) < len(config.writers):
        raise UserError(f"writers: {', '.join(config.writers)}; name each once")


def _check_privacy(config: ConfigDict) -> None:
    """Of clients' updates."""
    if config.privacy.delta >= 1:
        raise UserError(f"privacy.delta: {config.privacy.delta}; use less than 1, best well below 1 / clients")
    if config.privacy.noise_multiplier:
        if not METHODS[config.method].sends:
            raise UserError(
                f"privacy.noise_multiplier: method '{config.method}' has no clients' updates to make private; use 0"
            )
        if config.aggregation != "uniform":
            raise UserError(
                f"aggregation: '{config.aggregation}' lets a client's size, which is private, raise its say; use"
                " 'uniform' with privacy.noise_multiplier, or set that to 0"
            )


def _check_method(config: ConfigDict) -> None:
    """What goes with the method, its criterion and its backbone."""
    if config.engine.window > 1 and not METHODS[config.method].personal:
        raise UserError(f"engine.window: method '{config.method}' trains nothing that can wait for later rounds; use 0")
    if config.model.backbone == "standard" and METHODS[config.method].routed:
        raise UserError(
            f"model.backbone: '{config.method}' compares what the routed backbone's stacks put out; use 'routed'"
        )
    if config.replacement.criterion == "gradient" and config.replacement.margin == "relative":
        raise UserError(
            "replacement.margin: 'relative' scales losses, and criterion 'gradient' compares cosines; drop one"
        )
    for field, wanted in (
        ("replacement.criterion", config.replacement.criterion in ("held_out", "representation")),
        ("distillation.patience", config.distillation.patience > 0),
    ):
        if METHODS[config.method].reads_field(field) and wanted and not config.data.held_out:
            raise UserError(f"data.held_out: 0, but {field} looks at held-out samples; use a part such as 0.1")


def _check_model(config: ConfigDict) -> None:
    """Sizes that must fit each other."""
    model = config.model
    if len(model.backbone_layers) != 2:
        raise UserError(f"model.backbone_layers: {model.backbone_layers}; give two numbers, of MoTE and MoME layers")
    for field in ("heads", "text_heads", "text_cond_heads"):
        if model.width % model[field]:
            raise UserError(
                f"model.{field}: {model[field]} does not divide model.width {model.width}; use one that does"
            )
    if model.image_size % model.patch:
        raise UserError(
            f"model.patch: {model.patch} does not divide model.image_size {model.image_size}; use one that does"
        )
    grid = model.position_grid
    if model.name == "vilt" and model.position == "slice" and model.image_size // model.patch > grid:
        raise UserError(
            f"model.position: 'slice' has {grid}x{grid} positions, too few for {model.image_size} pixels in"
            f" patches of {model.patch}; use 'interpolate' or larger patches"
        )
    if not (IMAGE_SIDE * model.upsample).is_integer():
        raise UserError(
            f"model.upsample: {model.upsample} makes {IMAGE_SIDE * model.upsample:g} pixels of {IMAGE_SIDE};"
            " use a factor that gives a whole number"
        )
    for field in ("max_text", "max_answer"):
        if model[field] < 3:
            raise UserError(f"model.{field}: {model[field]} leaves no room between [CLS] and [SEP]; use at least 3")
    if model.text_positions and model.max_text > model.text_positions:
        raise UserError(
            f"model.max_text: {model.max_text}, but the text side has model.text_positions = {model.text_positions};"
            f" use at most {model.text_positions}"
        )
    if model.name == "flava" and not model.text_positions and model.max_text > FLAVA_POSITIONS:
        raise UserError(
            f"model.max_text: {model.max_text}, but FLAVA's text encoder has {FLAVA_POSITIONS} positions;"
            f" use at most {FLAVA_POSITIONS}"
        )
    if len(model.image_channels) != 3:
        raise UserError(f"model.image_channels: {model.image_channels}; give three, for 8x8 to 64x64 pixels")


def _check_federation(config: ConfigDict) -> None:
    """Its clients, and how many of them a round has."""
    federation = config.federation
    if (federation.table == "custom") != bool(federation.rows):
        raise UserError("federation.rows: goes with federation.table='custom', and only with it; set both or neither")
    if federation.parts and federation.split != "share":
        raise UserError(f"federation.parts: goes with federation.split='share', not '{federation.split}'; drop one")
    if federation.parts > federation.groups:
        raise UserError(
            f"federation.parts: {federation.parts} for {federation.groups} groups leaves data without a client; use at"
            f" most {federation.groups}, or take less by data.train_size"
        )
    for field, wanted, value in (
        ("data.client_column", "'column'", config.data.client_column),
        ("federation.tasks", "'column' or 'folder'", federation.tasks),
    ):
        if value and f"'{federation.split}'" not in wanted:
            raise UserError(f"{field}: goes with federation.split={wanted}, not '{federation.split}'; drop one")
    if is_natural(config):
        _check_natural(config)
        return
    rows = client_rows(federation)
    clients = len(rows) * federation.groups
    if clients > _MOST_CLIENTS:  # before a table of so many is made
        raise UserError(
            f"federation.groups: {federation.groups} of {len(rows)} clients each are {clients:,}; use at most"
            f" {_MOST_CLIENTS:,} clients in all"
        )
    client_table(rows, groups=federation.groups)
    if config.cohort_size > clients:
        raise UserError(f"cohort_size: {config.cohort_size} of {clients} clients; use at most {clients}")


def _check_natural(config: ConfigDict) -> None:
    """Clients that the data name; how many there are is known once they are found."""
    federation, data = config.federation, config.data
    if federation.split == "column" and not data.client_column:
        raise UserError("data.client_column: empty; name the column that says whose a row is, such as 'site'")
    placed = [name for name, fields in config.tasks.items() if fields.get("path")]
    elsewhere = all(name in placed for name in federation.tasks or placed[:1] or ("",))  # than in data.root
    if (data.root == "synthetic" and not elsewhere) or (federation.split == "folder" and data.root in ("hub", "sites")):
        raise UserError(
            f"data.root: '{data.root}' has no clients for federation.split='{federation.split}'; name a folder"
            + (", 'hub' or 'sites'" if federation.split == "column" else " with one sub-folder per client")
        )
    for name in federation.tasks:
        find_task(name)
    if data.root == "hub" and not federation.tasks:
        raise UserError("federation.tasks: empty; name the tasks to take from the hub")


def _check_field(field: str, value: Any, words: tuple[str, ...] | None) -> None:
    """The rule of one field, its type being right; `words`: the only ones that it takes."""
    if words and value not in words:
        raise UserError(f"{field}: unknown '{value}'; use one of {', '.join(words)}")
    if field in _NON_EMPTY and not value:
        raise UserError(f"{field}: empty; see its comment in tap_jax/config/defaults.py for the choices")
    for number in value if isinstance(value, tuple) else (value,):
        if field.startswith("model.") and isinstance(value, tuple) and type(number) is not int:
            raise UserError(f"{field}: {value!r}; use whole numbers")
        if not is_number(number) or field in _ANY_NUMBER and math.isfinite(number):
            continue
        if not math.isfinite(number):
            raise UserError(f"{field}: {number}; use a finite number")
        if field in _FRACTIONS:
            if not 0 <= number < 1:
                raise UserError(f"{field}: {number}; use at least 0 and less than 1")
        elif field in _MAY_BE_ZERO or field.startswith(("margins", "distillation.weights.")):
            if number < 0:
                raise UserError(f"{field}: {number}; use at least 0")
        elif number <= 0:
            raise UserError(f"{field}: {number}; use more than 0")
