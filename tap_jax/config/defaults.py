"""Every field and its default, with unit and source; the words that some of them take.

"⚙" marks a choice that the paper leaves open, or where it and its release differ; the default is this project's
reading.
"""

from ml_collections import ConfigDict

from tap_jax.errors import UserError
from tap_jax.federation import PAPER_ROWS
from tap_jax.registry import METHODS

# Packages that curves can go to, and extras of their names.
WRITERS = ("tensorboard", "wandb")
NATURAL_SPLITS = ("column", "folder")  # where the data say who the clients are
IMAGE_SIDE = 64  # pixels a side of every stored image
FLAVA_POSITIONS = 512  # of the text encoder, in every published FLAVA


def default_config() -> ConfigDict:
    """FLAVA's settings of Tables 21 and 22; every field with its unit and source.

    Returns:
      An unlocked config: add nothing to it (`validate` would object), set what you need.
    """
    config = ConfigDict()

    # --- The algorithm: Table 21 unless said otherwise -------------------------------------------------------------
    config.method = "tap"  # one of `registry.METHODS`
    config.variants = ()  # which results to make, of the method's in `registry.METHODS`; empty: its first
    config.rounds = 200  # T, communication rounds
    config.cohort_size = 2  # clients per round, drawn uniformly
    config.local_steps = 20  # τ, iterations per round and model; fewer where a client's data give out
    config.batch_size = 128  # samples per iteration, from the union of a client's tasks
    config.post_steps = 50  # P, iterations of Stage 2 and of post-training
    config.seed = 41  # the paper's seeds: 41-44
    # m_{i,o} per task kind, in units of the loss (Table 22); one float stands for all kinds. A list of such entries
    # trains the federated models once and personal ones for each: the first is "tap", any other "tap@LABEL". Inside a
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

    for name, entry in METHODS.items():  # what a method alone reads, see the registry
        if entry.section and name in config:
            raise UserError(f"method {name}: the configuration has a field of that name; choose another")
        if entry.section:
            config[name] = ConfigDict(dict(entry.section))

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
    model.backbone = "routed"  # | "standard": one stack of the same layers for all clients (App. C.4)
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
    # How samples are dealt out: by the table's shares | "iid": equal parts for a task's clients | "dirichlet" |
    # "pathological": a few classes for each (McMahan et al. 2017). Or clients are as the data name them, and no table
    # is read: "column": by the values of data.client_column | "folder": each folder in data.root is a client's.
    federation.split = "share"
    federation.alpha = 0.5  # Dirichlet concentration per label; small is skewed; only with "dirichlet"
    federation.classes_per_client = 2  # of each task, or domains where it has no classes; only with "pathological"
    federation.tasks = ()  # names of the tasks to take; (): all that data.root has; only with "column" or "folder"

    # Tasks of one's own beside the paper's: name -> fields of `tasks.DECLARATION`, such as
    # {"xray": {"kind": "image_classification", "image": "scan", "label": "finding"}}.
    config.tasks = ConfigDict()

    config.data = data = ConfigDict()
    # | "sites", with a column "site" | "hub", where each task has a data set | id of one | folder with one sub-folder
    # of files per task, or with federation.split "folder" with one sub-folder per client that has one per task
    data.root = "synthetic"
    data.client_column = ""  # says whose a row is, in training and test sets; only with federation.split "column"
    data.train_size = 0  # samples per task, before the cut into groups; 0: all (900 of the embedded suite)
    data.test_size = 0  # samples per task; 0: all (150 of the embedded suite)
    data.on_bad_row = "stop"  # at a row that cannot be used | "skip": leave it out, and say how many there were
    # ⚙ where an input is longer than model.max_text: shorten its "middle", the question of a template, so that the
    # options that Table 23 puts behind it stay | cut off its "end"
    data.too_long = "middle"
    data.held_out = 0.0  # part of each client's training samples left out of training, for what looks at held-out loss
    # ⚙ each task's whole test set for each client | "personal": cut like the training set. A client that the data name
    # and that has no test row of its task gets no score there.
    data.test_split = "common"
    data.image_classes = 0  # keep only labels below this in image classification; 0: all
    data.tokenizer = "train"  # word pieces trained on the run's own texts | hub id | folder
    data.cache_dir = ""  # of downloads and prepared arrays; "": tap_jax/data in the user's cache folder

    config.metrics = metrics = ConfigDict()
    # "auto": bert-base-uncased if the hub's cache has it (nothing is downloaded), else the offline package, else none
    # and token_f1 in its place | hub id | folder
    metrics.bertscore_model = "auto"
    metrics.bertscore_layer = 9  # ⚙ clipped to the model's depth
    # Where BERTScore's BERT runs: "auto" is the GPU where PyTorch sees one, else the CPU | "cpu" | "cuda" | "cuda:1" |
    # another device of PyTorch's. It takes about 3 GB of what XLA_PYTHON_CLIENT_MEM_FRACTION leaves to it.
    metrics.device = "auto"

    # --- How it runs: no effect on results beyond rounding, but where "⚠" says so -----------------------------------
    config.compute_dtype = "auto"  # ⚙⚠ bfloat16 on GPU and TPU, else float32 | "float32" | "bfloat16"
    config.checkpoint_every = 10  # rounds; 0: only at the end
    config.writers = ()  # where curves go beside metrics.jsonl: "tensorboard", "wandb", each with its extra installed
    # Folder of XLA's persistent cache; "": $JAX_COMPILATION_CACHE_DIR, else the user's cache folder; "off".
    config.compilation_cache = ""
    config.mesh = mesh = ConfigDict()
    mesh.clients = 0  # devices that share out the cohort; 0: all there are, but not more than it has clients
    mesh.data = 0  # devices that share out each client's minibatches; 0: those that mesh.clients = 0 leaves over
    mesh.parallel = "auto"  # "vmap" (one device) | "pmap" (mesh.clients only) | "shard_map"; "auto": first or last
    config.engine = engine = ConfigDict()
    engine.microbatch = 0  # ⚠ samples per row, or 128 tokens of texts alone for each; 0: the platform's default
    # ⚙⚠ several texts share a sequence, and rows come in two sizes | "off": every text has a sequence as long as its
    # task's longest | "auto": on accelerators
    engine.packing = "auto"
    # ⚙⚠ where dropout masks come from: "threefry", the same on every machine | "rbg", XLA's generator, whose masks are
    # those of a kind of device | "auto": rbg on TPUs
    engine.dropout_bits = "auto"
    # Clients at once in phases over all clients. 0: cohort_size; all of them where accelerators form several shards, or
    # their memory is not known.
    engine.clients_at_once = 0
    # Memory on the host that all clients' personal blocks may take; where they would take more, they go to a store on
    # disk (workdir/store), and so does a persistent optimizer state. 0: half of the machine's, and none beyond 300
    # clients, whose checkpoints then hold tables in the place of a million arrays.
    engine.host_gigabytes = 0.0
    engine.attention = "auto"  # ⚙ by platform, on GPUs by a trial | "einsum" | "xla" | "cudnn" (NVIDIA, bfloat16)
    # ⚙ rounds of a window, whose X wait for its end, where the clients of all of them train together: up to so many
    # times cohort_size at once, with as many times the memory. Checkpoints are of the ends of windows. 0 or 1: no round
    # waits. Only with method "tap".
    engine.window = 0
    # ⚙ what the backward pass computes again: "none" (elementwise functions and attention's scores, in bfloat16) |
    # "layer" (every transformer layer: a third more work, and activations of one layer at a time) | "auto": by the
    # device's memory, none on a CPU
    engine.remat = "auto"
    return config


# Fields that change neither results nor, but for rounding, any number: a run may resume with other values of them.
NEUTRAL_FIELDS = (
    "checkpoint_every",
    "compilation_cache",
    "data.cache_dir",
    "engine.attention",
    "engine.clients_at_once",
    "engine.host_gigabytes",
    "engine.remat",
    "engine.window",
    "mesh.clients",
    "mesh.data",
    "mesh.parallel",
    "metrics.device",
    "screening.on_broken",
    "writers",
)

_CHOICES: dict[str, tuple[str, ...]] = {
    "aggregation": ("samples", "uniform"),
    "optimizer.state": ("fresh", "persist"),
    "screening.on_broken": ("drop", "stop"),
    "replacement.history": ("plain", "weighted"),
    "replacement.scope": ("task", "exclusive"),
    "replacement.first": ("replace", "keep"),
    "replacement.criterion": ("loss", "held_out", "gradient", "representation"),
    "replacement.margin": ("absolute", "relative"),
    "model.backbone": ("routed", "standard"),
    "distillation.image_loss": ("kl", "mse"),
    "model.name": ("flava", "vilt"),
    "model.head_activation": ("relu", "gelu"),
    "model.condition": ("pooled", "paths"),
    "model.position": ("interpolate", "slice"),
    "federation.table": (*PAPER_ROWS, "custom"),
    "federation.split": ("share", "iid", "dirichlet", "pathological", *NATURAL_SPLITS),
    "data.test_split": ("common", "personal"),
    "data.on_bad_row": ("stop", "skip"),
    "data.too_long": ("middle", "end"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "engine.packing": ("auto", "on", "off"),
    "engine.dropout_bits": ("auto", "threefry", "rbg"),
    "engine.attention": ("auto", "einsum", "xla", "cudnn"),
    "engine.remat": ("auto", "none", "layer"),
    "mesh.parallel": ("auto", "vmap", "pmap", "shard_map"),
}


def choices() -> dict[str, tuple[str, ...]]:
    """Field -> the words that it takes; those of registered methods among them."""
    of_methods = {f"{e.name}.{field}": words for e in METHODS.values() for field, words in e.choices.items()}
    return _CHOICES | {"method": tuple(METHODS)} | of_methods
