"""Eight named sites with data of their own kinds: factories, a hospital, a law office, a newsroom and phones.

They differ in tasks, modalities, amounts and classes (`tap_jax/data/sites.py`). A column of the data says whose a
sample is, and each site is scored on its own test samples. All is drawn by the program, the model is the demo's, and
frozen weights are random: it shows how a federation of named clients is run.

    tap-jax train --config=configs/sites.py --workdir=runs/sites

About three minutes of processor time, most of it compiling.
"""

from ml_collections import ConfigDict

from tap_jax.config import default_config, override


def get_config(argument: str = "") -> ConfigDict:
    """The sites; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = default_config()
    config.variants = ("tap", "local", "fedavg+post")
    config.rounds = 16
    config.cohort_size = 3
    config.local_steps = 6
    config.batch_size = 16
    config.post_steps = 20
    config.checkpoint_every = 8
    optimizer = config.optimizer
    optimizer.learning_rate_initial = 1e-3
    optimizer.learning_rate = 4e-3
    optimizer.warmup_rounds = 2
    optimizer.post_learning_rate = 4e-3

    config.feddat.bottleneck = 4

    model = config.model
    model.width = 32
    model.heads = 4
    model.mlp = 32
    model.image_layers = model.text_layers = 1
    model.image_size = 32
    model.patch = 8
    model.upsample = 0.5
    model.vocab = 1000
    model.max_text = 64
    model.max_answer = 24
    model.encoder_rank = model.attention_rank = model.expert_rank = 4
    model.lora_dropout = model.head_dropout = model.text_dropout = 0.0
    model.head_hidden = (64,)
    model.image_channels = (32, 16, 8)
    model.text_heads = model.text_cond_heads = 4
    model.text_inner = 64

    config.federation.split = "column"
    config.data.root = "sites"
    config.data.client_column = "site"
    config.data.test_split = "personal"
    config.data.image_classes = 10
    config.engine.microbatch = 8
    return override(config, argument)
