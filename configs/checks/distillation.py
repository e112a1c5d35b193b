"""A sanity check: what each stage is worth on text generation.

Clients with mmlu, common_gen, or both. From one run: TAP, Stage 1 alone (no Stage 2), Stage 2 alone (no replacement),
and TAP without distillation.

    tap-jax train --config=checks/distillation --workdir=runs/distillation

Two minutes on two cores.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tap_jax.config import override


def get_config(argument: str = "") -> ConfigDict:
    """The demo's model; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "demo.py"))["get_config"]()
    config.variants = ("tap", "tap-no-kd", "tap-stage1", "tap-stage2", "local", "fedavg", "fedavg+post")
    config.federation.table = "custom"
    config.federation.rows = ({"mmlu": 0.5}, {"common_gen": 0.5}, {"mmlu": 0.5, "common_gen": 0.5})
    config.federation.groups = 2
    config.cohort_size = 3
    return override(config, argument)
