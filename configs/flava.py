"""TAP on FLAVA: the paper's main setting (rows FLAVA of Tables 1-3; hyperparameters of Tables 21 and 22).

30 clients (ten patterns, three groups), 2 a round, 200 rounds, eight data sets from the hub. One run yields TAP, TAP
without distillation, FedAvg, FedAvg + Post-train and FedAvg + 2P, which share their training. The tables average over
the seeds 41 to 44:

    for seed in 41 42 43 44; do
      tap-jax train --config=flava:seed=$seed --workdir=runs/flava-$seed
    done

The frozen weights are facebook/flava-full's, from the hub or from a folder (`--config.model.weights=DIR`); random
stand-ins of the same shapes: `--config.model.weights= --config.data.tokenizer=train`. The parameter accounting
(Table 7) needs neither data nor weights nor network:

    tap-jax describe --config=flava

Baselines are other methods of this file, `flava:method=feddat,variants=()`; `launch/tables` has them all.
Data from a folder of files instead of the hub: `--config.data.root=DIR`. No data at hand:
`--config.data.root=synthetic`.

Hardware: one GPU with 40 GB or more in bfloat16, a slice of TPUs, or several of them through `mesh.clients`; the sizes
of rows follow the device's memory. `tap-jax describe --target=a100-40` says what its compiler makes of it. Needs the
network (or a filled cache) for the data, the weights and their tokenizer (BERT's).
"""

from ml_collections import ConfigDict

from tap_jax.config import default_config, override


def get_config(argument: str = "") -> ConfigDict:
    """The paper's FLAVA setting; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = default_config()  # holds FLAVA's numbers
    config.variants = ("tap", "tap-no-kd", "fedavg", "fedavg+post", "fedavg+2p")
    config.data.root = "hub"
    config.data.tokenizer = "facebook/flava-full"
    config.model.weights = "facebook/flava-full"
    return override(config, argument)
