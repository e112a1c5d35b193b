"""What a command takes: its flags, the folders behind them, and single fields of its configuration."""

import ast
import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from tap_jax import config as configuration
from tap_jax.config import ConfigDict
from tap_jax.config.fields import refuse_section
from tap_jax.config.files import run_python
from tap_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command; a whole number or a switch where `default` is one, and required where it is None."""

    name: str
    value: str
    about: str
    default: str | int | bool | None = None


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: `run` gets the flags' values by name, "config" as a validated, locked config.

    Where `folders` says what they are, it takes one or more of them without a flag, as `folders`.
    """

    name: str
    run: Callable[..., None]
    flags: tuple[Flag, ...]
    about: str
    details: str
    folders: str = ""


def parse(command: Command, argv: Sequence[str]) -> dict[str, Any]:
    """The flags of a command by name, and its folders if it takes any.

    Raises:
      UserError: a flag or folder that is unknown, missing or has a wrong value; likewise a field of the config.
    """
    name, values = command.name, flags.FlagValues()
    values.set_gnu_getopt(True)
    for flag in command.flags:
        kinds: dict[type, Callable[..., Any]] = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer}
        define = kinds.get(type(flag.default), flags.DEFINE_string)
        define(flag.name, flag.default, flag.about, flag_values=values)
    try:
        rest = values([name, *argv], known_only=True)[1:]
    except flags.Error as error:
        wrong = re.match(r"flag --(\w+)=(.*?): invalid literal", str(error), re.DOTALL)
        raise UserError(f"{wrong[1]}: '{wrong[2]}' is no whole number" if wrong else str(error)) from None
    found: dict[str, Any] = {flag.name: values[flag.name].value for flag in command.flags}
    known = [f"--{flag.name}" for flag in command.flags]
    for flag in command.flags:
        if not found[flag.name] and flag.default is None:
            raise UserError(f"--{flag.name}={flag.value} is missing; see tap-jax {name} --help")
    if command.folders:
        found["folders"] = [argument for argument in rest if not argument.startswith("-")]
        rest = [argument for argument in rest if argument.startswith("-")]
        if not found["folders"]:
            raise UserError(f"folders: name at least one DIR; see tap-jax {name} --help")
    if register := found.pop("register", ""):
        run_python("register", register)
    if "config" in found:
        known.append("--config.KEY")
        found["config"], rest = _override(configuration.load_config(found["config"]), rest)
    for argument in rest:
        given = argument.split("=")[0]
        close = difflib.get_close_matches(given, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown argument '{given}'; {hint}{name} takes {', '.join(known)}")
    return found


def _override(config: ConfigDict, argv: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """Applies `--config.KEY=VALUE` arguments -> the config and what is left of argv."""
    mine, rest, queue = [], [], list(argv)
    while queue:
        argument = queue.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        negated, field, value = match.groups()
        current = configuration.value_of(config, field)
        if negated and not isinstance(current, bool):
            raise UserError(f"{field}: --noconfig is for switches; write --config.{field}=VALUE")
        if value is None and not isinstance(current, bool):  # --config.rounds 3
            if not queue:
                raise UserError(f"{field}: --config.{field} lacks a value")
            value = queue.pop(0)
        if field == "margins":  # one number for all kinds takes the place of the section
            configuration.override(config, {field: _literal(value)})
        elif isinstance(current, ConfigDict):
            refuse_section(field, value, current)
        else:
            if isinstance(current, tuple) and isinstance(value and _literal(value), str):  # tap,local: no literal
                value = repr(tuple(filter(None, map(str.strip, value.split(",")))))
            mine.append(f"--{negated or ''}config.{field}" + ("" if value is None else f"={value}"))
    program = ["tap-jax", *mine]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=program, lock_config=True)
        values(program)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(_readable(config, str(error))) from None
    configuration.validate(config)
    return config.lock(), rest


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _readable(config: ConfigDict, message: str) -> str:
    """absl's "flag --config.rounds=x: invalid literal for int() ..." in the words of `config.validate`."""
    match = re.match(r"flag --(?:no)?config\.([^=]+)=(.*?): ", message, re.DOTALL)
    if match is None:
        return message
    field, value = match.groups()
    kind = type(configuration.value_of(config, field)).__name__
    return f"{field}: '{value}' is no {kind}; write --config.{field}=VALUE with one"
