"""TAP end to end in minutes: the embedded suite, 30 clients, a tiny model with FLAVA's architecture.

Reproduces no table: the eight data sets are drawn by the program. The frozen weights are `demo_flava`'s, which
comes with the package (made by `launch/pretrain.py`); random stand-ins: `--config.model.weights=`. It shows the method
at work: Local, FedAvg, FedAvg + Post-train and TAP from one run.

    tap-jax train --config=demo --workdir=runs/demo

Needs no network, no accelerator, and under 4 GB; about three minutes on two cores, a third of it compiling.
"""

from ml_collections import ConfigDict

from tap_jax.config import default_config, override


def get_config(argument: str = "") -> ConfigDict:
    """The demo; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = default_config()
    config.variants = ("tap", "local", "fedavg", "fedavg+post")
    config.rounds = 28
    config.cohort_size = 6
    config.local_steps = 10
    config.batch_size = 16
    config.post_steps = 30
    config.checkpoint_every = 10
    optimizer = config.optimizer
    optimizer.learning_rate_initial = 1e-3
    optimizer.learning_rate = 4e-3
    optimizer.warmup_rounds = 2
    optimizer.post_learning_rate = 4e-3

    config.feddat.bottleneck = 4

    config.data.tokenizer = "demo_flava"
    model = config.model
    model.weights = "demo_flava"
    model.width = 32
    model.heads = 4
    model.mlp = 32
    model.image_layers = model.text_layers = 1
    model.image_size = 32
    model.patch = 8
    model.upsample = 0.5
    model.vocab = 799
    model.max_text = model.text_positions = 64
    model.max_answer = 24
    model.encoder_rank = model.attention_rank = model.expert_rank = 4
    model.lora_dropout = model.head_dropout = model.text_dropout = 0.0
    model.head_hidden = (64,)
    model.image_channels = (32, 16, 8)
    model.text_heads = model.text_cond_heads = 4
    model.text_inner = 64

    config.data.train_size = 900
    config.data.test_size = 100
    config.data.image_classes = 10
    config.engine.microbatch = 8
    return override(config, argument)
