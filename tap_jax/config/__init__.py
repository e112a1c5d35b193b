"""What can be set, read from files and the command line, checked, and told apart.

A config is a `ConfigDict` with the fields of `default_config`, no more and no less. A file under `configs/`, known by
its name there, has a function `get_config(argument="")` that starts from it; the command line (`--config.KEY=VALUE`),
the file's argument (`flava:rounds=5,seed=42`) and `load_config`'s `overrides` change single fields.
"""

from ml_collections import ConfigDict

from tap_jax.config.defaults import NEUTRAL_FIELDS, default_config
from tap_jax.config.derived import (
    client_rows,
    data_cache,
    is_natural,
    margin_label,
    margins_of,
    method_settings,
    table_federation,
    variants_of,
)
from tap_jax.config.fields import override, value_of
from tap_jax.config.files import from_json, load_config, of_run, to_json
from tap_jax.config.identity import config_hash, differences
from tap_jax.config.rules import validate

__all__ = [
    "NEUTRAL_FIELDS",
    "ConfigDict",
    "client_rows",
    "config_hash",
    "data_cache",
    "default_config",
    "differences",
    "table_federation",
    "is_natural",
    "from_json",
    "load_config",
    "margin_label",
    "margins_of",
    "method_settings",
    "of_run",
    "override",
    "to_json",
    "validate",
    "value_of",
    "variants_of",
]
