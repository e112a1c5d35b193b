"""Which configurations are the same: those that compute the same numbers."""

import hashlib
import json
import reprlib
from typing import Any

from ml_collections import ConfigDict

from tap_jax.config.defaults import NEUTRAL_FIELDS, default_config
from tap_jax.config.derived import margins_of, variants_of
from tap_jax.config.fields import cast, flat


def config_hash(config: ConfigDict) -> str:
    """Identifies what a config computes: equal for configs that differ in `NEUTRAL_FIELDS` only.

    Returns:
      SHA-256 of canonical JSON, 64 hex digits; the same on every machine and Python.
    """
    return hashlib.sha256(json.dumps(_identity(config), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(before: ConfigDict, now: ConfigDict, limit: int = 3) -> str:
    """What tells two configs of different hashes apart, in words: "rounds: 28, now 30; seed: 41, now 42".

    Args:
      limit: at most so many fields are listed, and the others counted.
    """
    old, new = _identity(before), _identity(now)
    differing = [field for field in sorted(old | new) if old.get(field) != new.get(field)]
    listed = [f"{field}: {_short(old.get(field))}, now {_short(new.get(field))}" for field in differing[:limit]]
    more = len(differing) - limit
    return "; ".join(listed) + (f"; and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    """A value as text, cut where it is long; "none" for a field that one of two lacks, as of a further margin."""
    shortener = reprlib.Repr()
    shortener.maxstring = 60
    return "none" if value is None else shortener.repr(value)


def _identity(config: ConfigDict) -> dict[str, Any]:
    """Field -> value of all that numbers follow from, in one way of writing it."""
    fields = {field: value for field, value in flat(config).items() if field not in NEUTRAL_FIELDS}
    standard = flat(default_config())
    tasks = {field: value for field, value in fields.items() if field.startswith("tasks.")}
    fields = {field: cast(field, value, standard[field]) for field, value in fields.items() if field in standard}
    fields |= tasks
    fields.pop("margins", None)
    for suffix, margins in margins_of(config).items():
        fields |= {f"margins{suffix}.{kind}": margin for kind, margin in margins.items()}
    fields["variants"] = tuple(sorted(variants_of(config)))
    return fields
