"""A sanity check: image-only and text-only clients, with the data of `configs/checks/homogeneous.py`.

Three clients share the image task and three the text task. Nothing but what every path shares (`shared_proj`, the
shared stacks) is averaged between the two kinds; it is where personalisation should pay.

    tap-jax train --config=checks/heterogeneous --workdir=runs/heterogeneous

Two minutes on two cores.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tap_jax.config import override

CLIENTS = 6


def get_config(argument: str = "") -> ConfigDict:
    """The demo's model; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("homogeneous.py")))["get_config"]()
    half = CLIENTS // 2
    config.federation.rows = ({"cifar100": 1 / half},) * half + ({"ag_news": 1 / half},) * half
    return override(config, argument)
