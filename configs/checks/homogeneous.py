"""A sanity check: clients with the same tasks and like data, where TAP should be within noise of FedAvg + Post-train.

Six clients share an image and a text classification task in equal parts. Compare `configs/checks/heterogeneous.py`,
which deals out the same data by modality.

    tap-jax train --config=checks/homogeneous --workdir=runs/homogeneous

Two minutes on two cores.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tap_jax.config import override

CLIENTS = 6


def get_config(argument: str = "") -> ConfigDict:
    """The demo's model; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "demo.py"))["get_config"]()
    config.variants = ("tap", "tap-stage1", "tap-stage2", "local", "fedavg", "fedavg+post")
    config.federation.table = "custom"
    config.federation.rows = ({"cifar100": 1 / CLIENTS, "ag_news": 1 / CLIENTS},) * CLIENTS
    config.federation.groups = 1
    config.cohort_size = 3
    return override(config, argument)
