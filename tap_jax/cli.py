"""The command line: parse, call, print (`tap-jax`, or `python -m tap_jax`).

Exit status: 0; 2 for whatever the user can mend, with one line on stderr and nothing half-written; 75 if another
process of the run has gone (134, SIGABRT, where JAX notices first), which the same command mends; 130 if interrupted;
143 if `train` was sent SIGTERM: the state is saved after the round in progress, and the same command goes on there.
"""

import ast
import dataclasses
import difflib
import errno
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tap_jax import config as configuration
from tap_jax import distributed, preemption, startup, terminal
from tap_jax.errors import Preempted, UserError
from tap_jax.writers import WRITERS


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command; a whole number where `default` is one, and required where it is None."""

    name: str
    value: str
    about: str
    default: str | int | None = None


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: `run` gets the flags' values by name, "config" as a validated, locked config.

    Where `folders` says what they are, it takes one or more of them without a flag, as `folders`.
    """

    run: Callable[..., None]
    flags: tuple[Flag, ...]
    about: str
    details: str
    folders: str = ""


def train(config: ConfigDict, workdir: str, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """`tap-jax train`."""
    several = distributed.processes(coordinator, processes, process)
    _writable(pathlib.Path(workdir))
    startup.start_jax(config, several)
    from tap_jax import runs
    from tap_jax.describe import headline

    with terminal.Terminal(config.rounds) as screen, preemption.Preemption() as asked_to:
        screen.say("reading data, building the model")
        rows = runs.run(config, workdir, _reporter(screen, headline), stop=lambda: asked_to.stop)
        _finish(screen, rows, pathlib.Path(workdir))


def evaluate(workdir: str, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """`tap-jax evaluate`."""
    several = distributed.processes(coordinator, processes, process)
    folder = pathlib.Path(workdir)
    if not (folder / "config.json").is_file():
        raise UserError(f"workdir: {folder} holds no run (config.json is missing); train one there first")
    config = configuration.load_config(folder / "config.json")
    startup.start_jax(config, several)
    from tap_jax import runs
    from tap_jax.describe import evaluation_headline

    with terminal.Terminal(config.rounds) as screen:
        screen.say("reading data, building the model")
        rows = runs.evaluate(folder, _reporter(screen, evaluation_headline))
        _finish(screen, rows, folder)


def report(folders: Sequence[str], out: str) -> None:
    """`tap-jax report`."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # for shapes alone: accelerators are left to those who train
    from tap_jax.describe import parameters
    from tap_jax.evaluation.report import write_report

    files = write_report(folders, out, parameters=parameters)
    kinds = [f"{sum(name.startswith(f'{kind}/') for name in files)} {kind}" for kind in ("tables", "figures")]
    print(f"in {out}: report.md, report.html, {', '.join(kinds)}", flush=True)


def export(workdir: str, client: str, format: str, out: str, model: str, variant: str, tasks: str) -> None:
    """`tap-jax export`."""
    if client and not client.isdecimal():
        raise UserError(f"client: '{client}' is no number of a client; the first is 0")
    path = pathlib.Path(workdir) / "config.json"
    if path.is_file():  # else what follows says so
        startup.start_jax(configuration.load_config(path))
    from tap_jax import exporting

    difference = exporting.export_client(
        workdir,
        out,
        client=int(client) if client else None,
        format=format,
        model=model,
        variant=variant,
        tasks=tuple(filter(None, map(str.strip, tasks.split(",")))),
        say=lambda line: print(line, flush=True),
    )
    files = sorted(path.name for path in pathlib.Path(out).iterdir())
    print(f"read again: outputs differ from the JAX model's by at most {difference:.2g} of the largest")
    print(f"in {out}: {', '.join(files)}", flush=True)


def describe(config: ConfigDict) -> None:
    """`tap-jax describe`."""
    startup.start_jax(config)
    from tap_jax.describe import describe

    print(describe(config), end="", flush=True)


def bench(
    config: ConfigDict,
    steps: int,
    clients: int,
    rounds: int,
    against: str,
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
) -> None:
    """`tap-jax bench`: the JSON line goes to stdout, everything else to stderr."""
    several = distributed.processes(coordinator, processes, process)
    if clients:
        configuration.validate(configuration.override(config, {"cohort_size": clients}))
    if against:  # or JAX would take the GPU's memory for itself
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not config.compilation_cache:
        with config.ignore_type():
            config.compilation_cache = "off"  # or compile_s would be the time to read a file
    startup.start_jax(config, several)
    from tap_jax import benchmark

    def say(line: str) -> None:
        if not distributed.index():
            print(line, file=sys.stderr, flush=True)

    found = benchmark.bench(config, steps=steps, rounds=rounds, against=against, say=say)
    print(json.dumps(found), flush=True)


_CONFIG = Flag("config", "FILE[:KEY=VALUE,...]", "the experiment, a Python file or the config.json of a run")
_PROCESSES = (
    Flag("coordinator", "HOST:PORT", "where process 0 of several listens; auto: ask SLURM, Open MPI, TPU or GKE", ""),
    Flag("processes", "N", "how many processes make the run, all started with the same command", 0),
    Flag("process", "I", "which of them this is, from 0; only process 0 prints", -1),
)
COMMANDS = {
    "train": Command(
        train,
        (
            _CONFIG,
            Flag("workdir", "DIR", "where the run's files go; a run of the same configuration is resumed"),
            *_PROCESSES,
        ),
        "trains, personalises and evaluates; resumes by itself",
        "Writes config.json, metrics.jsonl (a line per round), checkpoints/, models/, samples/, tokenizer/,\n"
        "results.json, report.md and report.html; curves also for --config.writers=tensorboard,wandb. On SIGTERM it\n"
        "saves after the round in progress and exits with 143 (a second one stops at once); with 75 if another\n"
        "process has gone. After either, a kill or a full disk, the same command goes on.\n"
        "Example: tap-jax train --config=configs/demo.py --config.rounds=5 --workdir=runs/demo",
    ),
    "evaluate": Command(
        evaluate,
        (Flag("workdir", "DIR", "of a finished run"), *_PROCESSES),
        "scores the models of a finished run again",
        "Rewrites results.json, report.md and report.html.\nExample: tap-jax evaluate --workdir=runs/demo",
    ),
    "report": Command(
        report,
        (Flag("out", "DIR", "where the report goes: a new or empty folder, or an earlier report, which is replaced"),),
        "makes the paper's tables and figures from finished runs",
        "Writes report.md, report.html, tables/ (CSV) and figures/ (PNG). Runs of several seeds and methods go\n"
        "together; what is missing is shown as not run.\nExample: tap-jax report runs --out=reports/all",
        folders="of finished runs, or folders that contain such",
    ),
    "export": Command(
        export,
        (
            Flag("workdir", "DIR", "of a finished run"),
            Flag("client", "N", "whose model, from 0; --model=server may do without", ""),
            Flag("format", "FORMAT", "torch (the default: all of it), or of the encoders peft, huggingface", "torch"),
            Flag("out", "DIR", "where the files go, a new or empty folder"),
            Flag(
                "model",
                "MODEL",
                "personal (the default), federated (what the client last received), server",
                "personal",
            ),
            Flag("variant", "NAME", "of the personal model; default: the run's first", ""),
            Flag("tasks", "NAME,...", "only these; default: all that the client has", ""),
        ),
        "writes a trained model for PyTorch, PEFT or Hugging Face",
        "What was written is loaded again and compared with the JAX model before the command says done;\n"
        "tap_export.json keeps the largest difference. README.md in the folder says how to use it.\n"
        "Example: tap-jax export --workdir=runs/demo --client=3 --format=torch --out=exports/client3",
    ),
    "describe": Command(
        describe,
        (_CONFIG,),
        "parameters (Table 7), who owns which block, memory plan; reads no data, allocates nothing",
        "Prints, and writes nothing. Devices are those of this machine, or what config.mesh asks for.\n"
        "Example: tap-jax describe --config=configs/flava.py",
    ),
    "bench": Command(
        bench,
        (
            _CONFIG,
            Flag("steps", "N", "local steps per run; 0: the configuration's local_steps", 0),
            Flag("clients", "N", "clients of the cohort; 0: the configuration's cohort_size", 0),
            Flag("rounds", "N", "whole rounds to time, and Stage 2 after them; 0: neither", 0),
            Flag("against", "NAME", "train the same clients one by one in PyTorch as well: torch or torch-fused", ""),
            *_PROCESSES,
        ),
        "times the local training of a cohort; one JSON line",
        "Prints the line on stdout, words on stderr, and writes nothing. Without --rounds there is no round_s,\n"
        "schedule_s or stage2_s_per_client. Compiled programs are cached only in config.compilation_cache."
        "\nExample: tap-jax bench --config=configs/demo.py --steps=10",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command -> the exit status.

    One of several processes does not return from here if it fails: the others could not end in order without it.

    Args:
      argv: without the program's name; default: the process's own.
    """
    try:
        status = _status(argv)
    except Exception as error:
        if not distributed.joined():
            raise
        if cause := distributed.lost_contact(error):
            again = "start all again with the same command, and it goes on from the last checkpoint"
            status = _fail(f"another process of the run has gone; {again} ({cause})", os.EX_TEMPFAIL)
        else:
            traceback.print_exc()
            status = 1
    if status and distributed.joined():
        distributed.leave(status, together=status == preemption.STATUS)
    return status


def _status(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if argv is None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show W̃ or ± still gets the rest
    try:
        with warnings.catch_warnings(), terminal.plain_logging():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            startup.quiet(bars=terminal.interactive())
            if argv is None:
                startup.drop_late_callbacks()
            return _main(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        return _fail(str(error), 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `tap-jax describe | head`
            return 128 + 13
        if error.errno not in _MENDABLE:
            raise
        return _fail(f"{error.filename or 'files'}: {error.strerror}; free some space or choose another folder", 2)
    except KeyboardInterrupt:
        status = _fail("interrupted; the same command goes on from the last checkpoint, if the run has one", 130)
    except Preempted as error:
        status = _fail(str(error), preemption.STATUS)
    if argv is None and not distributed.joined():
        sys.stdout.flush()
        os._exit(status)  # programs still compiling in the background cannot be interrupted
    return status


_MENDABLE = (
    errno.EACCES, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip


def _fail(message: str, status: int) -> int:
    who = f"process {distributed.index()}: " if distributed.joined() and distributed.index() is not None else ""
    print(f"tap-jax: {who}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _main(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help", "help") or (not argv):
        about = rest[0] if rest and not rest[0].startswith("-") else None
        if about:
            _check_command(about)
        print(usage(about), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if name == "--version":
        try:
            print(importlib.metadata.version("tap-jax"))
        except importlib.metadata.PackageNotFoundError:
            print("not installed")  # run from a checkout
        return 0
    _check_command(name)
    if any(argument in ("-h", "--help", "-help") for argument in rest):
        print(usage(name), end="")
        return 0
    COMMANDS[name].run(**parse(name, rest))
    return 0


def _check_command(name: str) -> None:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise UserError(f"unknown command '{name}'; {hint}there are {', '.join(COMMANDS)}, and each has --help")


_STATUS = "Exit status: 0; 2, with one line on stderr, for what you can mend; 130 if interrupted.\n"


def usage(name: str | None = None) -> str:
    """The help text of a command, or of the whole."""
    if name is None:
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items())
        return (
            "usage: tap-jax COMMAND [--FLAG=VALUE ...]\n\n"
            "TAP: two-stage adaptive personalization of multi-task, multi-modal models in federated learning.\n\n"
            f"{listed}\n\ntap-jax COMMAND --help tells more; tap-jax --version.\n{_STATUS}"
            "Example: tap-jax train --config=configs/demo.py --workdir=runs/demo\n"
        )
    command = COMMANDS[name]
    line, rows = [f"usage: tap-jax {name}"], []
    if command.folders:
        line.append("DIR [DIR ...]")
        rows.append(("DIR", command.folders))
    for flag in command.flags:
        shown = f"--{flag.name}={flag.value}"
        line.append(shown if flag.default is None else f"[{shown}]")
        rows.append((shown, flag.about))
        if flag.name == "config":
            line.append("[--config.KEY=VALUE ...]")
            rows.append(("--config.KEY=VALUE", "changes one field; tap_jax/config.py lists and explains all of them"))
    width = max(len(shown) for shown, _ in rows)
    listed = "\n".join(f"  {shown:{width}}  {about}" for shown, about in rows)
    return (
        "\n".join(
            [
                textwrap.fill(" ".join(line), 100, subsequent_indent="  ", break_on_hyphens=False),
                "",
                textwrap.fill(command.about[0].upper() + command.about[1:] + ".", 100),
                "",
                listed,
                "",
            ]
        )
        + f"\n{_STATUS}{command.details}\n"
    )


# --- arguments -----------------------------------------------------------------------------------------------------


def parse(name: str, argv: Sequence[str]) -> dict:
    """The flags of a command by name, and its folders if it takes any.

    Raises:
      UserError: a flag or folder that is unknown, missing or has a wrong value; likewise a field of the config.
    """
    command, values = COMMANDS[name], flags.FlagValues()
    values.set_gnu_getopt(True)
    for flag in command.flags:
        define = flags.DEFINE_integer if isinstance(flag.default, int) else flags.DEFINE_string
        define(flag.name, flag.default, flag.about, flag_values=values)
    try:
        rest = values([name, *argv], known_only=True)[1:]
    except flags.Error as error:
        wrong = re.match(r"flag --(\w+)=(.*?): invalid literal", str(error), re.DOTALL)
        raise UserError(f"{wrong[1]}: '{wrong[2]}' is no whole number" if wrong else str(error)) from None
    found = {flag.name: values[flag.name].value for flag in command.flags}
    known = [f"--{flag.name}" for flag in command.flags]
    for flag in command.flags:
        if not found[flag.name] and flag.default is None:
            raise UserError(f"--{flag.name}={flag.value} is missing; see tap-jax {name} --help")
    if command.folders:
        found["folders"] = [argument for argument in rest if not argument.startswith("-")]
        rest = [argument for argument in rest if argument.startswith("-")]
        if not found["folders"]:
            raise UserError(f"folders: name at least one DIR; see tap-jax {name} --help")
    if "config" in found:
        known.append("--config.KEY")
        found["config"], rest = _override(configuration.load_config(found["config"]), rest)
    for argument in rest:
        flag = argument.split("=")[0]
        close = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown argument '{flag}'; {hint}{name} takes {', '.join(known)}")
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
            raise UserError(f"{field}: is a section, not a value; set {field}.{next(iter(current), 'KEY')}")
        else:
            if isinstance(current, tuple) and value is not None:
                value = _listed(value)
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


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _listed(text: str) -> str:
    """`tap,local` as the literal ('tap', 'local'); what is a literal already stays."""
    return text if not isinstance(_literal(text), str) else repr(tuple(filter(None, map(str.strip, text.split(",")))))


def _readable(config: ConfigDict, message: str) -> str:
    """absl's "flag --config.rounds=x: invalid literal for int() ..." in the words of `config.validate`."""
    match = re.match(r"flag --(?:no)?config\.([^=]+)=(.*?): ", message, re.DOTALL)
    if match is None:
        return message
    field, value = match.groups()
    kind = type(configuration.value_of(config, field)).__name__
    return f"{field}: '{value}' is no {kind}; write --config.{field}=VALUE with one"


# --- what commands share -------------------------------------------------------------------------------------------


def _reporter(screen: terminal.Terminal, lines: Callable[[Any], list[str]]):
    """`lines`: of an experiment, what to say once it is built."""
    from tap_jax.runs import Reporter

    def built(run) -> None:
        for line in lines(run):
            screen.say(line)

    return Reporter(screen.say, screen.progress, built, screen.begin, screen.last, screen.scored)


def _finish(screen: terminal.Terminal, rows, workdir: pathlib.Path) -> None:
    from tap_jax.evaluation.tables import text_table

    screen.say("")
    screen.say(text_table(rows, terminal.columns()))
    files = ("results.json", "report.md", "report.html", "metrics.jsonl", "config.json")
    folders = ("checkpoints", "models", "samples", "tokenizer", *WRITERS)
    screen.say(f"in {workdir}: {', '.join(name for name in (*files, *folders) if (workdir / name).exists())}")
    screen.say(f"took {terminal.duration(screen.seconds)} in all")


def _writable(workdir: pathlib.Path) -> None:
    """Finds out before a long run, and without writing, that its folder cannot be made."""
    place = workdir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"workdir: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"workdir: no permission to write in {place}; name another folder")
