"""TAP on FLAVA: the paper's main setting (Tables 1-3, rows FLAVA; hyperparameters of Tables 21 and 22).

30 clients (ten patterns, three groups), 2 a round, 200 rounds, eight data sets from the hub. One run yields TAP, TAP
without distillation, FedAvg, FedAvg + Post-train and FedAvg + 2P, which share their training. The tables average over
the seeds 41 to 44:

    for seed in 41 42 43 44; do
      tap-jax train --config=configs/flava.py:seed=$seed --workdir=runs/flava-$seed
    done
    tap-jax report runs/flava-* --out=runs/flava-report

Expected (Tables 1 to 3 and 11 to 13, mean over clients and seeds): see README.md, which also says where and why the
numbers may differ. Baselines: `configs/flava.py:method=local`, `per_fedavg`, `disentafl`, `feddat`; the standard
backbone of Appendix C.4: `model.backbone=standard`.

Hardware: one GPU with 80 GB in bfloat16, or several through `mesh.clients`; the memory plan for the machine at hand:

    tap-jax describe --config=configs/flava.py

Needs the network (or a filled cache) for data and weights.
"""

from ml_collections import ConfigDict

from tap_jax.config import default_config, override


def get_config(argument: str = "") -> ConfigDict:
    """The paper's FLAVA setting; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = default_config()  # holds FLAVA's numbers
    config.variants = ("tap", "tap-no-kd", "fedavg", "fedavg+post", "fedavg+2p")
    config.model.weights = "hub"
    config.data.root = "hub"
    config.data.tokenizer = "bert-base-uncased"
    return override(config, argument)
