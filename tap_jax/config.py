"""The one place of defaults and of their validation.

A config is a `ConfigDict` with the fields of `default_config`, no more and no less. A file under `configs/` has a
function `get_config(argument="")` that starts from it; the command line (`--config.KEY=VALUE`), the file's argument
(`configs/flava.py:rounds=5,seed=42`) and `load_config`'s `overrides` change single fields.

"⚙" marks a choice that the paper leaves open, or where it and its release differ; the default is this project's
reading.
"""

import ast
import difflib
import hashlib
import inspect
import json
import math
import os
import runpy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tap_jax.errors import UserError
from tap_jax.federation import KINDS, PAPER_ROWS, TASKS, Federation, client_table
from tap_jax.writers import WRITERS

# method -> what one run of it can yield; the first is the default. Those of one line share a trunk (Sec. 3, App. C).
VARIANTS: dict[str, tuple[str, ...]] = {
    # tap-no-kd: Stage 2 without distillation; tap-stage1: no Stage 2 at all; tap-stage2: no replacement in Stage 1.
    "tap": ("tap", "tap-no-kd", "tap-stage1", "tap-stage2", "local", "fedavg", "fedavg+post", "fedavg+2p"),
    "fedavg": ("fedavg", "fedavg+post", "fedavg+2p"),
    "local": ("local",),
    "per_fedavg": ("per-fedavg", "per-fedavg+post"),
    "disentafl": ("disentafl", "disentafl+post", "disentafl+2p"),
    "feddat": ("feddat", "feddat+post"),
    "centralised": ("centralised",),
}
# The server's blocks as they are: no client has a model of its own.
SERVER_VARIANTS = ("fedavg", "per-fedavg", "disentafl", "centralised")


IMAGE_SIDE = 64  # pixels a side of every stored image
FLAVA_POSITIONS = 512  # of the text encoder, in every published FLAVA


def default_config() -> ConfigDict:
    """FLAVA's settings of Tables 21 and 22; every field with its unit and source.

    Returns:
      An unlocked config: add nothing to it (`validate` would object), set what you need.
    """
    config = ConfigDict()

    # --- The algorithm: Table 21 unless said otherwise -------------------------------------------------------------
    config.method = "tap"  # one of VARIANTS
    config.variants = ()  # which results to make, see VARIANTS; empty: the method's first
    config.rounds = 200  # T, communication rounds
    config.cohort_size = 2  # clients per round, drawn uniformly
    config.local_steps = 20  # τ, iterations per round and model; fewer where a client's data give out
    config.batch_size = 128  # samples per iteration, from the union of a client's tasks
    config.post_steps = 50  # P, iterations of Stage 2 and of post-training
    config.seed = 41  # the paper's seeds: 41-44
    # m_{i,o} per task kind, in units of the loss (Table 22); one float stands for all kinds. A list of such entries
    # trains the federated chain once and a personal chain for each: the first is "tap", any other "tap@LABEL". Inside a
    # list a pair (low, high) is one of Tables 11-13: low for image generation and text classification.
    config.margins = ConfigDict(
        dict(image_classification=0.01, image_generation=0.005, text_classification=0.005, text_generation=0.01)
    )

    config.optimizer = optimizer = ConfigDict()  # AdamW
    optimizer.learning_rate_initial = 1e-4  # η_0, in round 0
    optimizer.learning_rate = 3e-4  # after the warm-up
    optimizer.warmup_rounds = 20  # rounds of linear rise between the two; 0: none
    optimizer.post_learning_rate = 1e-4  # constant, in Stage 2 and post-training
    optimizer.weight_decay = 0.01  # decoupled
    optimizer.state = "fresh"  # ⚙ AdamW's, at every local training | "persist": a client goes on with its own
    optimizer.clip_norm = 1.0  # ⚙ largest global gradient norm of a client; 0: no clipping

    config.aggregation = "samples"  # ⚙ weigh clients by sample count | "uniform"

    config.screening = screening = ConfigDict()  # of hostile or broken client updates, before aggregation
    # Largest L2 norm of an update, W̃[i] after minus before local training over all blocks; 0: any finite one. With any
    # other value metrics.jsonl has the norms, so a run with a huge one shows what is usual.
    screening.max_norm = 0.0
    screening.on_broken = "drop"  # the client's update of the round, and go on | "stop": the run ends in an error

    # Differential privacy of clients (DP-FedAvg, McMahan et al. 2018): what it covers is said in engine/privacy.py.
    config.privacy = privacy = ConfigDict()
    privacy.noise_multiplier = 0.0  # z, standard deviation of the noise in units of clip_norm; 0: no privacy, no noise
    privacy.clip_norm = 1.0  # C, L2 norm to which a client's update over all its blocks is clipped
    privacy.delta = 1e-5  # δ at which ε is reported; well below 1 / clients

    config.replacement = replacement = ConfigDict()  # Stage 1
    replacement.history = "plain"  # ⚙ mean of a task's loss | "weighted" by its share λ_o of each minibatch
    replacement.scope = "task"  # ⚙ all of B_o | "exclusive": only blocks that no other task of the client uses
    replacement.first = "replace"  # ⚙ always, at a client's first participation | "keep"
    # What decides, see methods/criteria.py: the rounds' losses | "held_out" losses | "gradient" or "representation"
    # similarity. The last three look at held-out samples or at one more minibatch.
    replacement.criterion = "loss"
    replacement.margin = "absolute"  # | "relative": margins are parts of the loss's running scale

    config.distillation = distillation = ConfigDict()  # Stage 2, equation 5
    distillation.temperature = 1.0  # τ̃
    distillation.temperature_power = -2.0  # ⚙ p in τ̃^p: equation 5 says -2, Hinton et al. +2; equal at τ̃ = 1
    distillation.image_loss = "kl"  # ⚙ over pixels along the width | "mse"; FedDAT's, too
    distillation.weights = ConfigDict(  # β_o per task kind
        dict(image_classification=2e-3, image_generation=2e-3, text_classification=2e-3, text_generation=1.0)
    )

    distillation.patience = 0  # looks at the held-out loss without a new best after which a client stops; 0: never
    distillation.look_every = 10  # steps between two looks

    config.per_fedavg = ConfigDict()
    config.per_fedavg.inner_scale = 1.0  # inner rate / outer rate; Table 21 has one schedule for both
    config.per_fedavg.hessian = "none"  # ⚙ first-order | "exact", by forward differentiation of the gradient
    config.disentafl = ConfigDict(dict(weight=0.5))  # of the disentanglement loss
    config.feddat = ConfigDict()
    config.feddat.bottleneck = 32  # inner width of the adapters; 16 for ViLT
    config.feddat.weight = 2e-3  # of the KL terms

    # --- The server model: Sec. 3.1, Tables 18-21 ------------------------------------------------------------------
    config.model = model = ConfigDict()
    model.name = "flava"  # | "vilt"
    # Frozen weights (and ViLT's first CLS and positions): hub id or folder of a checkpoint that Hugging Face's FLAVA or
    # ViLT classes write | "": random stand-ins of the right shapes. The sizes below must be the checkpoint's.
    model.weights = ""
    # An export of --format=torch: its frozen weights and blocks take the place of the initial ones of the same names.
    model.start_from = ""
    model.width = 768  # D
    model.heads = 12  # attention heads of encoders and backbone
    model.mlp = 3072  # inner width of every feed-forward
    model.image_layers = 12  # image encoder; no use in ViLT
    model.text_layers = 12  # text encoder; no use in ViLT
    model.image_size = 224  # pixels a side that the encoder sees; the data stay at 64
    model.patch = 16  # pixels a side
    model.upsample = 2.0  # factor of the input adaptor's first resize
    model.vocab = 30522  # V, word pieces; at most so many with data.tokenizer "train"
    model.max_text = 256  # input tokens
    model.text_positions = 0  # rows of the text position table; 0: FLAVA's 512 for max_text > 128, else max_text
    model.max_answer = 256  # ⚙ target tokens; shorter where a task's data allow
    model.backbone = "routed"  # | "standard": one stack of the same layers for everybody (App. C.4)
    model.backbone_layers = (1, 1)  # L of MoTE and MoME
    model.qv_delta = True  # ⚙ dense trainable delta on W_q and W_v of the backbone, as Table 7 counts
    model.encoder_rank = 8  # R of LoRA in the encoders
    model.attention_rank = 16  # R in the backbone's attention
    model.expert_rank = 4  # R in the experts
    model.lora_dropout = 0.3
    model.lora_alpha_ratio = 2.0  # alpha = ratio · R
    model.head_hidden = (384,)  # classification heads (Table 18)
    model.head_activation = "relu"  # | "gelu" (exact)
    model.head_dropout = 0.3
    model.head_layer_norm = False  # after the first linear
    model.image_channels = (64, 32, 16)  # image generation head, from 8x8 pixels (Table 19)
    model.text_heads = 4  # GPT-2 layer of the text generation head (Table 20)
    model.text_cond_heads = 8  # its conditioning attention
    model.text_inner = 1536  # its feed-forward
    model.text_dropout = 0.1
    model.condition = "pooled"  # ⚙ condition answers on the pooled vector | "paths": on all path vectors
    model.position = "interpolate"  # ⚙ ViLT's position table to the grid in use | "slice" its corner
    model.position_grid = 12  # positions a side of that table; 12 in dandelin/vilt-*: 384 pixels in patches of 32
    model.layer_norm_eps = 1e-12  # of the pre-trained LayerNorms

    # --- Clients and data: App. C, Table 23 -------------------------------------------------------------------------
    config.federation = federation = ConfigDict()
    federation.table = "flava"  # the paper's ten patterns for "flava" | "vilt" | "custom": `rows`
    federation.rows = ()  # one dict task -> share of its group's part per pattern; only with "custom"
    federation.groups = 3  # how often the patterns are repeated, each time on its own part of the data
    # Parts that a training set is cut into: 0 is one for each group; with fewer, groups share them in turn, so that a
    # large federation can be played on little data. Only with split "share".
    federation.parts = 0
    federation.split = "share"  # by the table's shares | "iid": equal parts for a task's clients | "dirichlet"
    federation.alpha = 0.5  # Dirichlet concentration per label; small is skewed; only with "dirichlet"

    config.data = data = ConfigDict()
    data.root = "synthetic"  # | "hub" (ids in data/sources.py) | folder with one sub-folder of parquet files per task
    data.folders = ConfigDict(dict.fromkeys(TASKS, ""))  # task -> sub-folder of root; "": the task's name
    data.train_size = 0  # samples per task, before the cut into groups; 0: all (900 of the embedded suite)
    data.test_size = 0  # samples per task; 0: all (150 of the embedded suite)
    data.held_out = 0.0  # part of each client's training samples that nobody trains on, for what looks at held-out loss
    data.test_split = "common"  # ⚙ each task's whole test set for each client | "personal": cut like the training set
    data.image_classes = 0  # keep only labels below this in image classification; 0: all
    data.tokenizer = "train"  # word pieces trained on the run's own texts | hub id | folder
    data.cache_dir = ""  # of downloads and prepared arrays; "": tap_jax/data in the user's cache folder

    config.metrics = metrics = ConfigDict()
    # "auto": bert-base-uncased if the hub's cache has it (nothing is downloaded), else the offline package, else none
    # and token_f1 in its place | hub id | folder
    metrics.bertscore_model = "auto"
    metrics.bertscore_layer = 9  # ⚙ clipped to the model's depth

    # --- How it runs: no effect on results beyond rounding, but for compute_dtype and microbatch -------------------
    config.compute_dtype = "auto"  # ⚙ bfloat16 on GPU and TPU, else float32 | "float32" | "bfloat16"
    config.checkpoint_every = 10  # rounds; 0: only at the end
    config.writers = ()  # where curves go beside metrics.jsonl: "tensorboard", "wandb", each with its extra installed
    # Folder of XLA's persistent cache; "": $JAX_COMPILATION_CACHE_DIR, else the user's cache folder; "off".
    config.compilation_cache = ""
    config.mesh = mesh = ConfigDict()
    mesh.clients = 0  # devices that share out the cohort; 0: all there are, but not more than it has clients
    mesh.data = 0  # devices that share out each client's minibatches; 0: those that mesh.clients = 0 leaves over
    mesh.parallel = "auto"  # "vmap" (one device) | "pmap" (mesh.clients only) | "shard_map"; "auto": first or last
    config.engine = engine = ConfigDict()
    engine.microbatch = 0  # s, samples per row; 0: the platform's default
    engine.rows_per_chunk = 0  # v, rows per vmap; 0: the platform's default
    engine.clients_per_pass = 0  # clients at once in phases over all clients; 0: as many as fit
    # Memory on the host that all clients' personal blocks may take; where they would take more, they go to a store on
    # disk (workdir/store), and so does a persistent optimizer state. 0: half of the machine's, and none beyond 300
    # clients, whose checkpoints then hold tables in the place of a million arrays.
    engine.host_gigabytes = 0.0
    engine.attention = "auto"  # ⚙ by platform, on GPUs by a trial | "einsum" | "xla" | "cudnn" (NVIDIA, bfloat16)
    # ⚙ train the next round's W̃ beside this round's X, which do not depend on each other, in one program: twice the
    # clients at once, and twice the memory. Meant for rounds of fewer clients than there are devices, to which
    # mesh.clients = 0 then gives both rounds' clients. Only with method "tap" and optimizer.state "fresh".
    engine.pipeline_rounds = False
    engine.remat = False  # ⚙ recompute activations: less memory, about a third more time
    return config


# Fields that change neither results nor, but for rounding, any number: a run may resume with other values of them.
NEUTRAL_FIELDS = (
    "checkpoint_every",
    "compilation_cache",
    "data.cache_dir",
    "engine.attention",
    "engine.clients_per_pass",
    "engine.host_gigabytes",
    "engine.pipeline_rounds",
    "engine.remat",
    "engine.rows_per_chunk",
    "mesh.clients",
    "mesh.data",
    "mesh.parallel",
    "screening.on_broken",
    "writers",
)

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(VARIANTS),
    "aggregation": ("samples", "uniform"),
    "optimizer.state": ("fresh", "persist"),
    "screening.on_broken": ("drop", "stop"),
    "replacement.history": ("plain", "weighted"),
    "replacement.scope": ("task", "exclusive"),
    "replacement.first": ("replace", "keep"),
    "replacement.criterion": ("loss", "held_out", "gradient", "representation"),
    "replacement.margin": ("absolute", "relative"),
    "per_fedavg.hessian": ("none", "exact"),
    "model.backbone": ("routed", "standard"),
    "distillation.image_loss": ("kl", "mse"),
    "model.name": ("flava", "vilt"),
    "model.head_activation": ("relu", "gelu"),
    "model.condition": ("pooled", "paths"),
    "model.position": ("interpolate", "slice"),
    "federation.table": (*PAPER_ROWS, "custom"),
    "federation.split": ("share", "iid", "dirichlet"),
    "data.test_split": ("common", "personal"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "engine.attention": ("auto", "einsum", "xla", "cudnn"),
    "mesh.parallel": ("auto", "vmap", "pmap", "shard_map"),
}
# Every other number is > 0; tuples of numbers elementwise.
_MAY_BE_ZERO = (
    "rounds", "post_steps", "seed", "checkpoint_every", "mesh.clients", "mesh.data", "model.text_positions",
    "optimizer.learning_rate_initial", "optimizer.warmup_rounds", "optimizer.weight_decay", "optimizer.clip_norm",
    "federation.parts", "data.train_size", "data.test_size", "data.image_classes", "distillation.patience",
    "engine.microbatch", "engine.rows_per_chunk", "engine.clients_per_pass",
    "engine.host_gigabytes",
    "screening.max_norm", "privacy.noise_multiplier",
)  # fmt: skip
_FRACTIONS = ("data.held_out", "model.lora_dropout", "model.head_dropout", "model.text_dropout")  # in [0, 1)
_ANY_NUMBER = ("distillation.temperature_power",)
_NON_EMPTY = ("data.root", "data.tokenizer", "metrics.bertscore_model")


def load_config(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Reads a config, changes some fields, validates and locks it.

    Args:
      path: a Python file with `get_config()`, optionally with an argument for it after a colon
        (`configs/flava.py:rounds=5`), or the `config.json` of a run.
      overrides: field -> value, by dotted name (`{"model.width": 32}`) or nested.

    Raises:
      UserError: no such file, one that is no config, an unknown field, or what `validate` objects to.

    Example:
      >>> import tap_jax as tap
      >>> config = tap.load_config("configs/demo.py", {"rounds": 5, "optimizer.weight_decay": 0.1})
      >>> config.rounds, config.optimizer.weight_decay, config.model.width
      (5, 0.1, 32)
    """
    name = os.fspath(path)
    file, colon, argument = name.partition(".py:")
    file = file + ".py" if colon else name
    if not os.path.isfile(file):
        raise UserError(f"config: no file '{file}'; name a config file such as configs/flava.py")
    if file.endswith(".json"):
        with open(file, encoding="utf-8", errors="replace") as stream:  # what is no text is then no JSON
            config = from_json(stream.read())
    else:
        try:
            get_config = runpy.run_path(file).get("get_config")
        except SyntaxError as error:
            place = f"{error.filename or file}" + (f", line {error.lineno}," if error.lineno else "")
            raise UserError(
                f"config: {place} is not Python ({error.msg}); name a config file such as configs/flava.py"
            ) from None
        if get_config is None:
            raise UserError(f"config: '{file}' has no function get_config(); copy one from configs/")
        if argument and not inspect.signature(get_config).parameters:
            raise UserError(f"config: get_config() of '{file}' takes no argument; drop ':{argument}'")
        config = get_config(argument) if argument else get_config()
        if not isinstance(config, ConfigDict):
            raise UserError(f"config: get_config() of '{file}' returns no ConfigDict; copy one from configs/")
    config.unlock()
    override(config, overrides or {})
    validate(config)
    return config.lock()


def override(config: ConfigDict, values: Mapping[str, Any] | str) -> ConfigDict:
    """Sets fields in place, each to a value of its own type.

    Args:
      config: changed and returned.
      values: field -> value, by dotted name or nested; or one line `rounds=5,margins=0.02` of such pairs.

    Raises:
      UserError: an unknown field, or a value of another type.

    Example:
      >>> override(default_config(), "method=fedavg,model.backbone_layers=(2,2)").model.backbone_layers
      (2, 2)
    """
    for field, value in _flat(_parse(values) if isinstance(values, str) else values).items():
        section, leaf = _place(config, field)
        if field == "margins" and not isinstance(value, ConfigDict):
            with config.ignore_type():
                config.margins = tuple(value) if isinstance(value, list) else value
        else:
            section[leaf] = _cast(field, value, section[leaf])
    return config


def value_of(config: ConfigDict, field: str) -> Any:
    """The value of a field, or the section, of that dotted name.

    Raises:
      UserError: an unknown field; the message suggests known ones.
    """
    section, leaf = _place(config, field)
    return section[leaf]


def validate(config: ConfigDict) -> None:
    """Checks every field's name, type and range, and how fields go together.

    Raises:
      UserError: one line that names the first wrong field and the remedy.
    """
    default, given = default_config(), _flat(config)
    expected = _flat(default)
    if "margins" in config and not isinstance(config.margins, ConfigDict):
        margins_of(config)
        expected = {f: v for f, v in expected.items() if not f.startswith("margins.")} | {"margins": config.margins}
    for field in given:
        if field not in expected:
            _unknown(default, field)
    for field, standard in expected.items():
        if field not in given:
            raise UserError(f"{field}: missing; start from tap_jax.config.default_config()")
        _check(field, _cast(field, given[field], standard))

    model, federation = config.model, config.federation
    for variant in config.variants:
        if variant not in VARIANTS[config.method]:
            raise UserError(
                f"variants: '{variant}' does not come out of method '{config.method}';"
                f" use {', '.join(VARIANTS[config.method])}, or variants=() for the first"
            )
    for name in config.writers:
        if name not in WRITERS:
            raise UserError(f"writers: unknown '{name}'; use {', '.join(WRITERS)}, or writers=() for none")
    if len(set(config.writers)) < len(config.writers):
        raise UserError(f"writers: {', '.join(config.writers)}; name each once")
    if config.privacy.delta >= 1:
        raise UserError(f"privacy.delta: {config.privacy.delta}; use less than 1, best well below 1 / clients")
    if config.privacy.noise_multiplier:
        if config.method in ("local", "centralised"):
            raise UserError(
                f"privacy.noise_multiplier: method '{config.method}' has no clients' updates to make private; use 0"
            )
        if config.aggregation != "uniform":
            raise UserError(
                f"aggregation: '{config.aggregation}' lets a client's size, which is private, raise its say; use"
                " 'uniform' with privacy.noise_multiplier, or set that to 0"
            )
    if config.engine.pipeline_rounds and config.method != "tap":
        raise UserError(
            f"engine.pipeline_rounds: method '{config.method}' trains nothing beside the server's blocks; use False"
        )
    if config.engine.pipeline_rounds and config.optimizer.state == "persist":
        raise UserError(
            "engine.pipeline_rounds: the next round's W̃ cannot start before this round's optimizer states are there;"
            " use False, or optimizer.state='fresh'"
        )
    if model.backbone == "standard" and config.method == "disentafl":
        raise UserError("model.backbone: 'disentafl' compares what the routed backbone's stacks put out; use 'routed'")
    if config.replacement.criterion == "gradient" and config.replacement.margin == "relative":
        raise UserError(
            "replacement.margin: 'relative' scales losses, and criterion 'gradient' compares cosines; drop one"
        )
    for field, wanted in (
        ("replacement.criterion", config.replacement.criterion in ("held_out", "representation")),
        ("distillation.patience", config.distillation.patience > 0),
    ):
        if config.method == "tap" and wanted and not config.data.held_out:
            raise UserError(f"data.held_out: 0, but {field} looks at held-out samples; use a part such as 0.1")
    if len(model.backbone_layers) != 2:
        raise UserError(f"model.backbone_layers: {model.backbone_layers}; give two numbers, of MoTE and MoME layers")
    for field in ("heads", "text_heads", "text_cond_heads"):
        if model.width % model[field]:
            raise UserError(f"model.{field}: {model[field]} does not divide model.width {model.width}")
    if model.image_size % model.patch:
        raise UserError(f"model.patch: {model.patch} does not divide model.image_size {model.image_size}")
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
    if (federation.table == "custom") != bool(federation.rows):
        raise UserError("federation.rows: goes with federation.table='custom', and only with it; set both or neither")
    if federation.parts and federation.split != "share":
        raise UserError(f"federation.parts: goes with federation.split='share', not '{federation.split}'; drop one")
    clients = len(client_table(_rows(federation), groups=federation.groups).clients)
    if config.cohort_size > clients:
        raise UserError(f"cohort_size: {config.cohort_size} of {clients} clients; use at most {clients}")


def federation_of(config: ConfigDict) -> Federation:
    """The clients and tasks that `config.federation` describes; for method "centralised" one client with all of it.

    Raises:
      UserError: unknown table or task, or shares that do not add up.
    """
    rows = _rows(config.federation)
    federation = client_table(rows, groups=config.federation.groups)
    if config.method != "centralised":
        return federation
    total = {task.name: min(1.0, sum(row.get(task.name, 0.0) for row in rows)) for task in federation.tasks}
    return client_table((total,), groups=1)


def _rows(section: ConfigDict) -> tuple[Mapping[str, float], ...]:
    rows = section.rows if section.table == "custom" else PAPER_ROWS[section.table]
    for row in rows:
        if not isinstance(row, Mapping) or not all(_is_number(share) for share in row.values()):
            raise UserError(f"federation.rows: {row!r}; use a dict task -> share such as {{'ag_news': 0.5}}")
    return rows


def variants_of(config: ConfigDict) -> tuple[str, ...]:
    """The results a run is to make: `config.variants` or the method itself, and one for each further margin."""
    chosen = tuple(config.variants) or VARIANTS[config.method][:1]
    return chosen + tuple(margins_of(config))[1:] if config.method == "tap" else chosen


def data_cache(config: ConfigDict) -> str:
    """The folder that keeps converted data sets, trained tokenizers and downloaded weights."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return config.data.cache_dir or os.path.join(home, "tap_jax", "data")


def margins_of(config: ConfigDict) -> dict[str, dict[str, float]]:
    """Variant -> task kind -> m: "tap" first, and "tap@LABEL" for each further entry of a list.

    A label is the number, or the pair or the distinct numbers joined by a dash: "0.01-0.04".

    Raises:
      UserError: an entry that is neither a number, a pair of numbers nor one number per task kind.
    """
    given = config.margins
    entries = given if isinstance(given, (list, tuple)) and given else (given,)
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        by_kind, numbers = _by_kind(entry)
        name = "tap@" + "-".join(f"{number:g}" for number in numbers) if found else "tap"
        if name in found:
            raise UserError(f"margins: {entry} is there twice; drop one")
        found[name] = by_kind
    return found


LOW_MARGIN_KINDS = ("image_generation", "text_classification")  # Tables 11-13 and 22


def _by_kind(entry: Any) -> tuple[dict[str, float], list[float]]:
    """One entry of `margins` -> (task kind -> m, its numbers without repetition)."""
    if _is_number(entry):
        by_kind = dict.fromkeys(KINDS, entry)
    elif isinstance(entry, (list, tuple)) and len(entry) == 2 and all(map(_is_number, entry)):
        by_kind = {kind: entry[0 if kind in LOW_MARGIN_KINDS else 1] for kind in KINDS}
    elif isinstance(entry, (Mapping, ConfigDict)) and set(entry) == set(KINDS) and all(map(_is_number, entry.values())):
        by_kind = {kind: entry[kind] for kind in KINDS}
    else:
        raise UserError(
            f"margins: {entry!r}; use numbers, pairs (low, high), or one number for each of {', '.join(KINDS)}"
        )
    if not all(math.isfinite(m) and m >= 0 for m in by_kind.values()):
        raise UserError(f"margins: {entry!r}; use finite numbers of at least 0")
    return {kind: float(m) for kind, m in by_kind.items()}, sorted({float(m) for m in by_kind.values()})


def config_hash(config: ConfigDict) -> str:
    """Identifies what a config computes: equal for configs that differ in `NEUTRAL_FIELDS` only.

    Returns:
      SHA-256 of canonical JSON, 64 hex digits; the same on every machine and Python.
    """
    fields = {field: value for field, value in _flat(config).items() if field not in NEUTRAL_FIELDS}
    standard = _flat(default_config())
    fields = {field: _cast(field, value, standard[field]) for field, value in fields.items() if field in standard}
    fields.pop("margins", None)
    for variant, margins in margins_of(config).items():
        extra = variant.removeprefix("tap")
        fields |= {f"margins{extra}.{kind}": margin for kind, margin in margins.items()}
    fields["variants"] = sorted(variants_of(config))
    # A task registered later adds an empty folder, which changes nothing.
    fields = {field: value for field, value in fields.items() if not (field.startswith("data.folders.") and not value)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def to_json(config: ConfigDict) -> str:
    """The config as readable JSON; `from_json` is its inverse."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads what `to_json` wrote; fields that it lacks keep their defaults.

    Raises:
      UserError: not JSON, or a field that this version does not know.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"config: not valid JSON ({error}); use the config.json of a run") from None
    if not isinstance(values, dict):
        raise UserError("config: not a JSON object; use the config.json of a run")
    return override(default_config(), values)


def _parse(line: str) -> dict[str, Any]:
    """Pairs `key=value`, split at the commas outside brackets and quotes; a value that is no literal is a string."""
    values, pieces, depth = {}, [""], 0
    for character in line:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    for piece in filter(str.strip, pieces):
        key, equals, value = piece.partition("=")
        if not equals:
            raise UserError(f"config: '{piece.strip()}' is no key=value; write for example rounds=5,seed=42")
        try:
            values[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            values[key.strip()] = value.strip()
    return values


def _flat(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict by dotted name; an empty mapping vanishes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _place(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
    """The section that holds a field, and its name there."""
    *sections, leaf = field.split(".")
    section = config
    for depth, key in enumerate(sections):
        _known(config, section, ".".join(sections[:depth]), key)
        section = section[key]
        if not isinstance(section, ConfigDict):
            raise UserError(f"{'.'.join(sections[: depth + 1])}: has no field '{leaf}'")
    _known(config, section, ".".join(sections), leaf)
    return section, leaf


def _known(config: ConfigDict, section: ConfigDict, path: str, key: str) -> None:
    if key not in section:
        _unknown(config, f"{path}.{key}" if path else key)


def _unknown(config: ConfigDict, field: str) -> None:
    """Raises: no such field, the closest one, and those of its section."""
    section, path, parts = config, [], field.split(".")
    for part in parts[:-1]:
        if not isinstance(section.get(part), ConfigDict):
            break
        section, path = section[part], [*path, part]
    prefix = "".join(f"{part}." for part in path)
    # Closest name: in the same section first, then among the last parts of all names.
    near = difflib.get_close_matches(parts[-1], list(section), n=1, cutoff=0.7)
    leaves = {name.split(".")[-1]: name for name in _flat(config)}
    far = [leaves[leaf] for leaf in difflib.get_close_matches(parts[-1], list(leaves), n=1, cutoff=0.7)]
    close = [prefix + name for name in near] or far
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    raise UserError(f"{field}: unknown field{hint} {'.'.join(path) or 'config'} has: {', '.join(section)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cast(field: str, value: Any, standard: Any) -> Any:
    """`value` in the type of `standard`; only int -> float, list -> tuple and one value -> tuple are silent."""
    if isinstance(standard, ConfigDict):
        raise UserError(f"{field}: is a section, not a value; set {field}.{next(iter(standard), 'KEY')}")
    if isinstance(standard, tuple) and isinstance(value, (list, tuple, str, int)) and not isinstance(value, bool):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if isinstance(standard, float) and _is_number(value):
        return float(value)
    if type(value) is type(standard):
        return value
    raise UserError(f"{field}: {value!r} is of type {type(value).__name__}; use a {type(standard).__name__}")


def _check(field: str, value: Any) -> None:
    """The rule of one field, its type being right."""
    if field in _CHOICES and value not in _CHOICES[field]:
        raise UserError(f"{field}: unknown '{value}'; use one of {', '.join(_CHOICES[field])}")
    if field in _NON_EMPTY and not value:
        raise UserError(f"{field}: empty; see its comment in tap_jax/config.py for the choices")
    for number in value if isinstance(value, tuple) else (value,):
        if field.startswith("model.") and isinstance(value, tuple) and type(number) is not int:
            raise UserError(f"{field}: {value!r}; use whole numbers")
        if not _is_number(number) or field in _ANY_NUMBER and math.isfinite(number):
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
