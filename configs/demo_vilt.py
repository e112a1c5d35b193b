"""The demo on ViLT's architecture: no encoder towers, a deeper backbone, six tasks, 30 clients.

Reproduces no table: the data sets are drawn by the program. The frozen weights are `demo_vilt`'s, which comes with the
package (made by `launch/pretrain.py`); random stand-ins: `--config.model.weights=`. With `configs/demo.py` it is what
`launch/tables/all_demo.sh` runs.

    tap-jax train --config=demo_vilt --workdir=runs/demo-vilt

Needs no network, no accelerator, and under 4 GB; a few minutes on two cores.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tap_jax.config import override


def get_config(argument: str = "") -> ConfigDict:
    """The ViLT demo; `argument` changes fields, e.g. "seed=42,rounds=5"."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))["get_config"]()
    config.federation.table = "vilt"
    config.margins.image_generation = 0.01  # Table 22
    config.margins.text_classification = 0.01
    config.margins.text_generation = 0.02
    model = config.model
    model.name = "vilt"
    model.weights = config.data.tokenizer = "demo_vilt"
    model.position_grid = 4
    model.backbone_layers = (2, 2)
    model.head_hidden = (64, 32)
    model.head_activation = "gelu"
    model.head_layer_norm = True
    return override(config, argument)
