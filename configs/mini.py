"""TAP on real data with a small model: slices of the eight data sets from a local folder, 30 clients.

Reproduces no table: the model is small, its frozen weights are random, and the slices are small. It exercises what
a full run does: reading parquet files with the hub's columns, word pieces trained on the run's own texts, both
stages, and every metric. `data.root` must hold one folder per task (`tiny_imagenet/train.parquet`, ...); where a
task's own folder is missing, caltech101 stands in for caltech256, and easy_vqa or vqav2 for vqa.

    tap-jax train --config=mini --config.data.root=DIR --workdir=runs/mini

Needs no network and no accelerator; ten to twenty minutes on two CPU cores, about 5 GB.
"""

from ml_collections import ConfigDict

from tap_jax.config import default_config, override


def get_config(argument: str = "") -> ConfigDict:
    """The small real run; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = default_config()
    config.variants = ("tap", "tap-no-kd", "local", "fedavg", "fedavg+post")
    config.rounds = 40
    config.cohort_size = 6
    config.local_steps = 10
    config.batch_size = 16
    config.post_steps = 20
    config.checkpoint_every = 10
    optimizer = config.optimizer
    optimizer.learning_rate_initial = 5e-4
    optimizer.learning_rate = 2e-3
    optimizer.warmup_rounds = 5
    optimizer.post_learning_rate = 1e-3

    config.feddat.bottleneck = 4

    model = config.model
    model.width = 48
    model.heads = 4
    model.mlp = 48
    model.image_layers = model.text_layers = 2
    model.image_size = 64
    model.patch = 8
    model.upsample = 1.0
    model.vocab = 4000
    model.max_text = 64
    model.max_answer = 32
    model.encoder_rank = model.attention_rank = model.expert_rank = 4
    model.lora_dropout = model.head_dropout = model.text_dropout = 0.0
    model.head_hidden = (96,)
    model.image_channels = (32, 16, 8)
    model.text_heads = model.text_cond_heads = 4
    model.text_inner = 96

    config.data.test_size = 150
    config.data.image_classes = 50
    config.engine.microbatch = 8
    return override(config, argument)
