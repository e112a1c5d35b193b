"""Fields by dotted name: finding them, setting them, and saying which one was meant."""

import ast
import difflib
from collections.abc import Mapping
from typing import Any, NoReturn

from ml_collections import ConfigDict

from tap_jax.config.defaults import choices
from tap_jax.errors import UserError
from tap_jax.tasks import complete


def override(config: ConfigDict, values: Mapping[str, Any] | str) -> ConfigDict:
    """Sets fields in place, each to a value of its own type.

    Args:
      config: changed and returned.
      values: field -> value, by dotted name or nested; or one line `rounds=5,margins=0.02` of such pairs.

    Raises:
      UserError: an unknown field, or a value of another type.

    Example:
      >>> from tap_jax.config import default_config
      >>> override(default_config(), "method=fedavg,model.backbone_layers=(2,2)").model.backbone_layers
      (2, 2)
    """
    for field, value in flat(_parse(values) if isinstance(values, str) else values).items():
        if field.startswith("tasks."):
            _set_of_task(config, field, value)
            continue
        section, leaf = _place(config, field)
        if field == "margins" and not isinstance(value, ConfigDict):
            with config.ignore_type():
                config.margins = tuple(value) if isinstance(value, list) else value
        else:
            section[leaf] = cast(field, value, section[leaf])
    return config


def value_of(config: ConfigDict, field: str) -> Any:
    """The value of a field, or the section, of that dotted name.

    Raises:
      UserError: an unknown field; the message suggests known ones.
    """
    section, leaf = _place(config, field)
    return section[leaf]


def flat(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict by dotted name; an empty mapping vanishes."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, (Mapping, ConfigDict)):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def refuse_unknown(config: ConfigDict, field: str) -> NoReturn:
    """There is no such field.

    Raises:
      UserError: always; it names the closest field, and those of the section.
    """
    section, parts = config, field.split(".")
    path: list[str] = []
    for part in parts[:-1]:
        if not isinstance(section.get(part), ConfigDict):
            break
        section, path = section[part], [*path, part]
    prefix = "".join(f"{part}." for part in path)
    # Closest name: in the same section first, then among the last parts of all names.
    near = difflib.get_close_matches(parts[-1], list(section), n=1, cutoff=0.7)
    leaves = {name.split(".")[-1]: name for name in flat(config)}
    far = [leaves[leaf] for leaf in difflib.get_close_matches(parts[-1], list(leaves), n=1, cutoff=0.7)]
    close = [prefix + name for name in near] or far
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    if prefix == "tasks.":
        raise UserError(f"{field}: no task '{parts[-1]}' is declared; declared: {', '.join(section) or 'none'}")
    raise UserError(f"{field}: unknown field{hint} {'.'.join(path) or 'config'} has: {', '.join(section)}")


def refuse_section(field: str, value: Any, section: ConfigDict) -> NoReturn:
    """The field is a section, which takes no value.

    Raises:
      UserError: always; it names the fields that take this value, or else what the section has.
    """
    meant = [name for name, words in choices().items() if name.startswith(f"{field}.") and value in words]
    likely = " or ".join(f"{name}={value}" for name in meant)
    hint = f"did you mean {likely}?" if meant else f"{field} has: {', '.join(section)}"
    raise UserError(f"{field}: is a section, not a value; {hint}")


def is_number(value: Any) -> bool:
    """Whether it is an int or float, and no switch."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cast(field: str, value: Any, standard: Any) -> Any:
    """`value` in the type of `standard`; only int -> float, list -> tuple and one value -> tuple are silent.

    Raises:
      UserError: it is of another type, or the field is a section.
    """
    if isinstance(standard, ConfigDict):
        refuse_section(field, value, standard)
    if isinstance(standard, tuple) and isinstance(value, (list, tuple, str, int)) and not isinstance(value, bool):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if isinstance(standard, float) and is_number(value):
        return float(value)
    if type(value) is type(standard):
        return value
    raise UserError(f"{field}: {value!r} is of type {type(value).__name__}; use a {type(standard).__name__}")


def _set_of_task(config: ConfigDict, field: str, value: Any) -> None:
    """One field of a task's declaration, which may be its first."""
    _, name, *rest = field.split(".")
    if len(rest) != 1:
        raise UserError(f"{field}: a task's fields are set one by one; write tasks.{name}.kind=... and so on")
    declaration = complete(name, {**config.tasks.get(name, {}), rest[0]: value})
    with config.tasks.unlocked():  # a locked configuration takes new values, and a new task is one
        config.tasks[name] = ConfigDict(declaration)


def _place(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
    """The section that holds a field, and its name there."""
    *sections, leaf = field.split(".")
    section = config
    for depth, key in enumerate(sections):
        _known(config, section, ".".join(sections[:depth]), key)
        section = section[key]
        if not isinstance(section, ConfigDict):
            raise UserError(f"{'.'.join(sections[: depth + 1])}: has no field '{leaf}'")
    _known(config, section, ".".join(sections), leaf)
    return section, leaf


def _known(config: ConfigDict, section: ConfigDict, path: str, key: str) -> None:
    if key not in section:
        refuse_unknown(config, f"{path}.{key}" if path else key)


def _parse(line: str) -> dict[str, Any]:
    """Pairs `key=value`, split at the commas outside brackets and quotes; a value that is no literal is a string."""
    values, pieces, depth = {}, [""], 0
    for character in line:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    for piece in filter(str.strip, pieces):
        key, equals, value = piece.partition("=")
        if not equals:
            raise UserError(f"config: '{piece.strip()}' is no key=value; write for example rounds=5,seed=42")
        try:
            values[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            values[key.strip()] = value.strip()
    return values
