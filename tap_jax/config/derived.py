"""What follows from a configuration: its clients, the variants it yields, their margins, where data are kept."""

import math
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tap_jax.config.defaults import NATURAL_SPLITS
from tap_jax.config.fields import is_number
from tap_jax.errors import UserError
from tap_jax.federation import PAPER_ROWS, Federation, client_table
from tap_jax.registry import METHODS, MethodEntry, Settings
from tap_jax.tasks import KINDS

LOW_MARGIN_KINDS = ("image_generation", "text_classification")  # Tables 11-13 and 22


def table_federation(config: ConfigDict) -> Federation:
    """The clients and tasks that `config.federation` describes; of a pooled method one client with all of it.

    Raises:
      UserError: unknown table or task, or shares that do not add up.
      ValueError: the data say who the clients are; `assembly.federation_of` reads them.
    """
    if is_natural(config):
        raise ValueError(f"federation.split={config.federation.split}: the clients are in the data")
    rows = client_rows(config.federation)
    federation = client_table(rows, groups=config.federation.groups)
    if not METHODS[config.method].pooled:
        return federation
    total = {task.name: min(1.0, sum(row.get(task.name, 0.0) for row in rows)) for task in federation.tasks}
    return client_table((total,), groups=1)


def is_natural(config: ConfigDict) -> bool:
    """Whether the data say who the clients are, and not a table."""
    return config.federation.split in NATURAL_SPLITS


def variants_of(config: ConfigDict) -> tuple[str, ...]:
    """The results a run is to make: `config.variants` or the method's default, and one for each further margin."""
    entry = METHODS[config.method]
    chosen = tuple(config.variants) or (entry.default,)
    further = list(margins_of(config))[1:] if entry.reads_field("margins") else ()
    return chosen + tuple(entry.default + suffix for suffix in further)


def method_settings(config: ConfigDict) -> tuple[MethodEntry, Settings]:
    """The method's entry, and the settings that it alone reads, as plain values; margins as of `margins_of`."""
    entry = METHODS[config.method]
    settings: dict[str, Any] = {}
    for name in entry.reads:
        if name == "margins":
            settings[name] = margins_of(config)
            continue
        *path, last = name.split(".")
        section, inner = config, settings
        for part in path:
            section, inner = section[part], inner.setdefault(part, {})
        value = section[last]
        inner[last] = value.to_dict() if isinstance(value, ConfigDict) else value
    return entry, settings


def data_cache(config: ConfigDict) -> str:
    """The folder that keeps converted data sets, trained tokenizers and downloaded weights."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return config.data.cache_dir or os.path.join(home, "tap_jax", "data")


def margins_of(config: ConfigDict) -> dict[str, dict[str, float]]:
    """Suffix of a variant's name -> task kind -> m: "" first, and "@LABEL" for each further entry of a list.

    LABEL is `margin_label` of the entry.

    Raises:
      UserError: an entry that is neither a number, a pair of numbers nor one number per task kind.
    """
    given = config.margins
    entries = given if isinstance(given, (list, tuple)) and given else (given,)
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        by_kind = _by_kind(entry)
        suffix = f"@{margin_label(by_kind)}" if found else ""
        if suffix in found:
            raise UserError(f"margins: {entry} is there twice; drop one")
        found[suffix] = by_kind
    return found


def margin_label(by_kind: Mapping[str, float]) -> str:
    """How variants are named by their margins, no two alike: "0.03", "0.01-0.04" for a pair (low, high), else all four.

    Args:
      by_kind: task kind -> m. Four numbers are in the order of `KINDS`.
    """
    low, high = by_kind["image_generation"], by_kind["image_classification"]
    if by_kind == _pair(low, high):
        numbers = [low] if low == high else [low, high]
    else:
        numbers = [by_kind[kind] for kind in KINDS]
    return "-".join(repr(number).removesuffix(".0") for number in numbers)


def client_rows(section: ConfigDict) -> tuple[Mapping[str, float], ...]:
    """The client table of a federation section: one pattern (task -> share of its group's part) per row.

    Raises:
      UserError: a row that is none.
    """
    rows = section.rows if section.table == "custom" else PAPER_ROWS[section.table]
    for row in rows:
        if not isinstance(row, Mapping) or not all(is_number(share) for share in row.values()):
            raise UserError(f"federation.rows: {row!r}; use a dict task -> share such as {{'ag_news': 0.5}}")
    return rows


def _pair(low: float, high: float) -> dict[str, float]:
    return {kind: low if kind in LOW_MARGIN_KINDS else high for kind in KINDS}


def _by_kind(entry: Any) -> dict[str, float]:
    """One entry of `margins` -> task kind -> m."""
    if is_number(entry):
        by_kind = _pair(entry, entry)
    elif isinstance(entry, (list, tuple)) and len(entry) == 2 and all(map(is_number, entry)):
        by_kind = _pair(*entry)
    elif isinstance(entry, (Mapping, ConfigDict)) and set(entry) == set(KINDS) and all(map(is_number, entry.values())):
        by_kind = {kind: entry[kind] for kind in KINDS}
    else:
        raise UserError(
            f"margins: {entry!r}; use numbers, pairs (low, high), or one number for each of {', '.join(KINDS)}"
        )
    if not all(math.isfinite(m) and m >= 0 for m in by_kind.values()):
        raise UserError(f"margins: {entry!r}; use finite numbers of at least 0")
    return {kind: float(m) for kind, m in by_kind.items()}
