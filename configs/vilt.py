"""TAP on ViLT: the paper's second setting (rows ViLT of Tables 1-3; hyperparameters of Tables 21 and 22).

30 clients (ten patterns, three groups), 2 a round, 200 rounds, six data sets from the hub (no image classification).
One run yields TAP, TAP without distillation, FedAvg, FedAvg + Post-train and FedAvg + 2P, which share their training.
The tables average over the seeds 41 to 44:

    for seed in 41 42 43 44; do
      tap-jax train --config=vilt:seed=$seed --workdir=runs/vilt-$seed
    done

The frozen weights are dandelin/vilt-b32-mlm's, from the hub or from a folder (`--config.model.weights=DIR`); random
stand-ins of the same shapes: `--config.model.weights= --config.data.tokenizer=train`. The parameter accounting
(Table 7) needs neither data nor weights nor network:

    tap-jax describe --config=vilt

Baselines are other methods of this file, `vilt:method=feddat,variants=()`; `launch/tables` has them all.
Data from a folder of files instead of the hub: `--config.data.root=DIR`. No data at hand:
`--config.data.root=synthetic`.

Hardware: one GPU with 40 GB or more in bfloat16, a slice of TPUs, or several of them through `mesh.clients`; the sizes
of rows follow the device's memory. `tap-jax describe --target=a100-40` says what its compiler makes of it. Needs the
network (or a filled cache) for the data, the weights and their tokenizer (BERT's).
"""

from ml_collections import ConfigDict

from tap_jax.config import default_config, override


def get_config(argument: str = "") -> ConfigDict:
    """The paper's ViLT setting; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = default_config()
    config.variants = ("tap", "tap-no-kd", "fedavg", "fedavg+post", "fedavg+2p")

    config.local_steps = 30
    config.feddat.bottleneck = 16
    config.optimizer.learning_rate = 4e-4
    config.margins.image_generation = 0.01  # Table 22 has no image classification for ViLT
    config.margins.text_classification = 0.01
    config.margins.text_generation = 0.02

    model = config.model
    model.name = "vilt"
    model.patch = 32
    model.max_text = 40
    model.max_answer = 40
    model.backbone_layers = (4, 4)
    model.encoder_rank = 4
    model.attention_rank = 8
    model.expert_rank = 8
    model.head_hidden = (3072, 768)
    model.head_activation = "gelu"
    model.head_dropout = 0.1
    model.head_layer_norm = True

    config.federation.table = "vilt"
    config.data.root = "hub"
    config.data.tokenizer = "dandelin/vilt-b32-mlm"
    config.model.weights = "dandelin/vilt-b32-mlm"
    return override(config, argument)
