"""Eight named sites with data of their own kinds: factories, a hospital, a law office, a newsroom and phones.

They differ in tasks, modalities, amounts and classes (`tap_jax/data/sites.py`). A column of the data says whose a
sample is, and each site is scored on its own test samples. All is drawn by the program, and model and frozen weights
are the demo's: it shows how a federation of named clients is run.

    tap-jax train --config=sites --workdir=runs/sites

About three minutes of processor time, most of it compiling.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tap_jax.config import override


def get_config(argument: str = "") -> ConfigDict:
    """The sites; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))["get_config"]()
    config.variants = ("tap", "local", "fedavg+post")
    config.rounds = 16
    config.cohort_size = 3
    config.local_steps = 6
    config.post_steps = 20
    config.checkpoint_every = 8
    config.federation.split = "column"
    config.data.root = "sites"
    config.data.client_column = "site"
    config.data.test_split = "personal"
    config.data.train_size = config.data.test_size = 0  # what the sites have
    return override(config, argument)
