"""Configurations by name, or in files: a Python file with `get_config`, or the config.json of a run."""

import inspect
import json
import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tap_jax.config.defaults import default_config
from tap_jax.config.fields import flat, override
from tap_jax.config.rules import validate
from tap_jax.errors import UserError
from tap_jax.tasks import complete, declare

# Files of the configurations that have a name. In a clone this is a link to its top-level folder.
NAMED = pathlib.Path(__file__).parents[1] / "configs"

RENAMED = {"engine.clients_per_pass": "engine.clients_at_once"}  # fields of older runs -> today's names
GONE = ("data.folders", "engine.pipeline_rounds", "engine.rows_per_chunk")  # fields and sections of older runs


def load_config(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Reads a config, changes some fields, validates and locks it.

    Args:
      path: the name of a configuration that comes with the package (`demo`, `checks/margins`) or a Python file with
        `get_config()`, either optionally with an argument for it after a colon (`flava:rounds=5`,
        `mine.py:rounds=5`); or the `config.json` of a run.
      overrides: field -> value, by dotted name (`{"model.width": 32}`) or nested.

    Raises:
      UserError: no such name or file, one that is no config, an unknown field, or what `validate` objects to.

    Example:
      >>> import tap_jax as tap
      >>> config = tap.load_config("demo", {"rounds": 5, "optimizer.weight_decay": 0.1})
      >>> config.rounds, config.optimizer.weight_decay, config.model.width
      (5, 0.1, 32)
    """
    file, argument = _located(os.fspath(path))
    if file.endswith(".json"):
        _check_file("config", file)
        with open(file, encoding="utf-8", errors="replace") as stream:  # what is no text is then no JSON
            config = from_json(stream.read())
    else:
        get_config = run_python("config", file).get("get_config")
        if get_config is None:
            raise UserError(f"config: '{file}' has no function get_config(); copy one from {NAMED}")
        if argument and not inspect.signature(get_config).parameters:
            raise UserError(f"config: get_config() of '{file}' takes no argument; drop ':{argument}'")
        config = get_config(argument) if argument else get_config()
        if not isinstance(config, ConfigDict):
            raise UserError(f"config: get_config() of '{file}' returns no ConfigDict; copy one from {NAMED}")
    config.unlock()
    if isinstance(config.get("tasks"), ConfigDict):
        for name, fields in config.tasks.items():
            if isinstance(fields, ConfigDict):
                config.tasks[name] = ConfigDict(complete(name, fields))  # so that each field can be changed
    override(config, overrides or {})
    validate(config)
    return config.lock()


def names() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = NAMED.resolve()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.py"))


def _located(path: str) -> tuple[str, str]:
    """What `load_config` takes -> the file, and the argument for its `get_config`."""
    file, colon, argument = path.partition(".py:")
    if colon:
        return file + ".py", argument
    name, _, argument = path.partition(":")
    return (str(NAMED / f"{name}.py"), argument) if name in names() else (path, "")


def of_run(workdir: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config that a run's folder holds, with some fields changed; validated and locked.

    Raises:
      UserError: there is none, or it is damaged; or what `load_config` objects to.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"workdir: {workdir} holds no run (config.json is missing); train one there first")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        reason = "" if isinstance(values, dict) else "no JSON object"
    except ValueError as error:  # no text, or no JSON
        reason = str(error)
    if reason:
        raise UserError(
            f"workdir: {path} is damaged ({reason}); remove it and call train again as before, or name another folder"
        )
    return load_config(path, overrides)


def run_python(field: str, file: str) -> dict[str, Any]:
    """Runs a Python file of the user's, which may register tasks -> the names that it defines.

    Args:
      field: that names the file.

    Raises:
      UserError: no such file, or one that is no Python.
    """
    _check_file(field, file)
    try:
        return runpy.run_path(file)
    except SyntaxError as error:
        place = f"{error.filename or file}" + (f", line {error.lineno}," if error.lineno else "")
        raise UserError(f"{field}: {place} is not Python ({error.msg}); {_instead(field)}") from None


def _check_file(field: str, file: str) -> None:
    if not os.path.isfile(file):
        raise UserError(f"{field}: no file '{file}'; {_instead(field)}")


def _instead(field: str) -> str:
    """What the field takes."""
    return "name a Python file" + (f", or a configuration: {', '.join(names())}" if field == "config" else "")


def to_json(config: ConfigDict) -> str:
    """The config as readable JSON; `from_json` is its inverse."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads what `to_json` wrote; fields that it lacks keep their defaults.

    Raises:
      UserError: not JSON, or a field that this version does not know.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"config: not valid JSON ({error}); use the config.json of a run") from None
    if not isinstance(values, dict):
        raise UserError("config: not a JSON object; use the config.json of a run")
    found = {
        RENAMED.get(field, field): value
        for field, value in flat(values).items()
        if not any(f"{field}.".startswith(f"{gone}.") for gone in GONE)
    }
    if isinstance(remat := found.get("engine.remat"), bool):
        found["engine.remat"] = "layer" if remat else "none"
    config = override(default_config(), found)
    declare(config.tasks)  # reports look tasks up
    return config
