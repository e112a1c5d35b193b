"""A sanity check: margins from .005 to .05. The number of replacements should fall as the margin grows.

One run: the federated models are trained once, personal ones for each margin beside them.

    tap-jax train --config=checks/margins --workdir=runs/margins
    tap-jax report runs/margins --out=reports/margins

A few minutes on two cores.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tap_jax.config import override


def get_config(argument: str = "") -> ConfigDict:
    """The demo's federation and model; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "demo.py"))["get_config"]()
    config.variants = ("tap",)
    override(config, {"margins": (0.005, 0.01, 0.02, 0.03, 0.04, 0.05)})
    return override(config, argument)
