"""The commands of `tap-jax`: what each takes, does and prints.

Each starts JAX as its configuration asks before it imports what needs it.
"""

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tap_jax import config as configuration
from tap_jax.cli import distributed, preemption, startup, terminal
from tap_jax.cli.arguments import Command, Flag
from tap_jax.config import ConfigDict
from tap_jax.config.defaults import WRITERS
from tap_jax.errors import UserError

if TYPE_CHECKING:
    from tap_jax.evaluation.scores import Row
    from tap_jax.experiment import Experiment
    from tap_jax.runs.runner import Reporter


def train(config: ConfigDict, workdir: str, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """`tap-jax train`."""
    several = distributed.processes(coordinator, processes, process)
    _writable("workdir", workdir)
    startup.start_jax(config, several)
    from tap_jax.engine.programs import compiling
    from tap_jax.planning.headline import headline
    from tap_jax.runs import runner as runs

    with terminal.Terminal(config.rounds, compiling=compiling) as screen, preemption.Preemption() as asked_to:
        screen.say("reading data, building the model")
        screen.doing("reading data, building the model")
        reporter = _reporter(screen, headline, begin=asked_to.arm)
        rows = runs.run(config, workdir, reporter, stop=lambda: asked_to.stop)
        _finish(screen, rows, pathlib.Path(workdir))


def evaluate(workdir: str, client: str = "", coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """`tap-jax evaluate`."""
    several = distributed.processes(coordinator, processes, process)
    folder = pathlib.Path(workdir)
    config = configuration.of_run(folder)
    startup.start_jax(config, several)
    from tap_jax.engine.programs import compiling
    from tap_jax.planning.headline import evaluation_headline
    from tap_jax.runs import runner as runs

    with terminal.Terminal(config.rounds, compiling=compiling) as screen:
        screen.say("reading data, building the model")
        screen.doing("reading data, building the model")
        rows = runs.evaluate(folder, _reporter(screen, evaluation_headline), client=client or None)
        _finish(screen, rows, None if client else folder)


def report(folders: Sequence[str], out: str, across: str) -> None:
    """`tap-jax report`."""
    _writable("out", out)
    import jax

    jax.config.update("jax_platforms", "cpu")  # for shapes alone: accelerators are left to those who train
    from tap_jax.evaluation.report import write_report
    from tap_jax.planning.outline import outline

    free = tuple(filter(None, map(str.strip, across.split(","))))
    files = write_report(folders, out, parameters=lambda run: outline(run.config).table7(), across=free)
    kinds = [f"{sum(name.startswith(f'{kind}/') for name in files)} {kind}" for kind in ("tables", "figures")]
    print(f"in {out}: report.md, report.html, {', '.join(kinds)}", flush=True)


def export(workdir: str, client: str, format: str, out: str, model: str, variant: str, tasks: str) -> None:
    """`tap-jax export`.

    Raises:
      UserError: a folder that cannot be written to, or what `export_client` raises.
    """
    _writable("out", out)
    startup.start_jax(configuration.of_run(workdir))
    from tap_jax.runs import exporting

    difference = exporting.export_client(
        workdir,
        out,
        client=client or None,
        format=format,
        model=model,
        variant=variant,
        tasks=tuple(filter(None, map(str.strip, tasks.split(",")))),
        say=lambda line: print(line, flush=True),
    )
    files = sorted(path.name for path in pathlib.Path(out).iterdir())
    print(f"read again: outputs differ from the JAX model's by at most {difference:.2g} of the largest")
    print(f"in {out}: {', '.join(files)}", flush=True)


def describe(config: ConfigDict, plans: int, target: str, fit: bool, minutes: int) -> None:
    """`tap-jax describe`.

    Raises:
      UserError: a negative number of plans, or data that cannot be read for them; a target that is unknown or cannot be
        compiled for here; `fit` without one.
    """
    if plans < 0:
        raise UserError(f"plans: {plans}; use a number of rounds such as 200, or 0 for none")
    if fit and not target:
        raise UserError("fit: for which target? name one, --target=h100 or --target=v5e:2x4")
    if target and not plans:
        _describe_target(config, target, fit, minutes)
        return
    if target:
        from tap_jax.planning.targets import topology

        goal = topology.parse(target)
    startup.start_jax(config)
    from tap_jax.planning.describe import describe, useful
    from tap_jax.planning.outline import outline

    if target:
        print(useful(outline(config, topology.platform(goal)), plans, topology.count(goal)), flush=True)
    else:
        print(describe(outline(config), plans=plans), end="", flush=True)


def _describe_target(config: ConfigDict, name: str, fit: bool, minutes: int) -> None:
    """Nothing of JAX starts in this process; it compiles in others."""
    from tap_jax.planning.targets import fit as fitting
    from tap_jax.planning.targets import report, session, topology

    if minutes < 1:
        raise UserError(f"minutes: {minutes}; use at least 1")
    target = topology.parse(name)
    topology.require(target)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if fit:
        choice, built, found = fitting.fit(config, target, minutes=minutes, say=say)
    else:
        built, found = session.compile_all(config, target, minutes=minutes, say=say)
    print(report.report(built, found), end="")
    if fit:
        print(f"fits by the compiler's word, the fastest by the estimate: {choice.flags}")
    sys.stdout.flush()


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
        if not configuration.is_natural(config):  # whose clients are known once the data are looked at
            most = len(configuration.table_federation(config).clients)
            if not 0 < clients <= most:
                raise UserError(f"clients: {clients} of {most}; use 1 to {most}")
        configuration.validate(configuration.override(config, {"cohort_size": clients}))
    if against:  # or JAX would take the GPU's memory for itself
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not config.compilation_cache:
        with config.ignore_type():
            config.compilation_cache = "off"  # or compile_s would be the time to read a file
    startup.start_jax(config, several)
    from tap_jax.planning import benchmark

    def say(line: str) -> None:
        if not distributed.index():
            print(line, file=sys.stderr, flush=True)

    found = benchmark.bench(config, steps=steps, rounds=rounds, against=against, say=say)
    print(json.dumps(found), flush=True)


def _reporter(
    screen: terminal.Terminal, lines: Callable[[Any], list[str]], begin: Callable[[], None] = lambda: None
) -> "Reporter":
    """`lines`: of an experiment, what to say once it is built; `begin` is called before the first round."""
    from tap_jax.runs.runner import Reporter

    def built(run: "Experiment") -> None:
        for line in lines(run):
            screen.say(line)

    def begins(done: int) -> None:
        begin()
        screen.begin(done)

    return Reporter(
        screen.say,
        screen.progress,
        built,
        begins,
        screen.last,
        screen.scored,
        doing=screen.doing,
        reading=screen.reading,
    )


def _finish(screen: terminal.Terminal, rows: "Sequence[Row]", workdir: pathlib.Path | None) -> None:
    """The table of scores, and what was written where."""
    from tap_jax.evaluation.tables import text_table

    screen.doing("")
    screen.say("")
    screen.say(text_table(rows, terminal.columns()))
    if workdir is None:
        return
    files = ("results.json", "report.md", "report.html", "metrics.jsonl", "config.json")
    folders = ("figures", "checkpoints", "store", "models", "samples", "tokenizer", *WRITERS)
    screen.say(f"in {workdir}: {', '.join(name for name in (*files, *folders) if (workdir / name).exists())}")
    screen.say(f"took {terminal.duration(screen.seconds)} in all")


def _writable(field: str, folder: str) -> None:
    """Finds out before long work that its folder cannot be made or written to; leaves nothing there."""
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:  # Python took bytes for characters that the locale does not have; tensorstore will not
        shown = ascii(os.fsdecode(os.fsencode(folder)))
        raise UserError(f"{field}: the locale has no letters for {shown}; set LC_ALL=C.UTF-8 or name another") from None
    place = pathlib.Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{field}: {place} is a file; name a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".tap_jax_", dir=place))  # /proc takes none, whatever its permissions say
    except OSError as error:
        raise UserError(f"{field}: cannot write in {place} ({error.strerror}); name another folder") from None


# --- what they take ---------------------------------------------------------------------------------------------------

_CONFIG = Flag(
    "config",
    "NAME[:KEY=VALUE,...]",
    "demo, flava, vilt, ..., a Python file, or the config.json of a run",
)
_REGISTER = Flag("register", "FILE", "Python that registers tasks or methods, such as the run's config file", "")
PROCESSES = (
    Flag("coordinator", "HOST:PORT", "where process 0 of several listens; auto: ask SLURM, Open MPI, TPU or GKE", ""),
    Flag("processes", "N", "how many processes make the run, all started with the same command", 0),
    Flag("process", "I", "which of them this is, from 0; only process 0 prints", -1),
)
_ALL = (
    Command(
        "train",
        train,
        (
            _CONFIG,
            Flag("workdir", "DIR", "where the run's files go; a run of the same configuration is resumed"),
            _REGISTER,
            *PROCESSES,
        ),
        "trains, personalises and evaluates; resumes by itself",
        "Writes config.json, metrics.jsonl (a line per round), checkpoints/, models/, samples/, tokenizer/,\n"
        "results.json, report.md, report.html and figures/; curves also for --config.writers=tensorboard,wandb.\n"
        "On SIGTERM it saves after the round in progress and exits with 143 (at once before the first round, and if\n"
        "it comes again); with 75 if another process has gone. After either, a kill or a full disk, the same command\n"
        "goes on.\n"
        "Example: tap-jax train --config=demo --config.rounds=5 --workdir=runs/demo",
    ),
    Command(
        "evaluate",
        evaluate,
        (
            Flag("workdir", "DIR", "of a finished run"),
            Flag("client", "NAME", "score this one alone, by name or number, and write nothing; default: all", ""),
            _REGISTER,
            *PROCESSES,
        ),
        "scores the models of a finished run again",
        "Rewrites results.json, report.md, report.html and figures/.\nExample: tap-jax evaluate --workdir=runs/demo",
    ),
    Command(
        "report",
        report,
        (
            Flag("out", "DIR", "where the report goes: a new or empty folder, or an earlier report, which is replaced"),
            Flag("across", "FIELD,...", "runs of one table may differ in these, too: optimizer.learning_rate", ""),
            _REGISTER,
        ),
        "makes the paper's tables and figures from finished runs",
        "Writes report.md, report.html, tables/ (CSV) and figures/ (PNG). Runs of several seeds and methods go\n"
        "together; what is missing is shown as not run.\nExample: tap-jax report runs --out=reports/all",
        folders="of finished runs, or folders that contain such",
    ),
    Command(
        "export",
        export,
        (
            Flag("workdir", "DIR", "of a finished run"),
            Flag("client", "NAME", "whose model: a number from 0, or its name; --model=server may do without", ""),
            Flag("format", "FORMAT", "torch (the default: all of it), or of the encoders peft, huggingface", "torch"),
            Flag("out", "DIR", "where the files go, a new or empty folder"),
            Flag(
                "model",
                "MODEL",
                "personal (the default), federated (what the client last received), server",
                "personal",
            ),
            Flag("variant", "NAME", "one of the run's variants, the folders in its models/; default: the first", ""),
            Flag("tasks", "NAME,...", "only these; default: all that the client has", ""),
            _REGISTER,
        ),
        "writes a trained model for PyTorch, PEFT or Hugging Face",
        "What was written is loaded again and compared with the JAX model before the command says done;\n"
        "tap_export.json keeps the largest difference. README.md in the folder says how to use it.\n"
        "Example: tap-jax export --workdir=runs/demo --client=3 --format=torch --out=exports/client3",
    ),
    Command(
        "describe",
        describe,
        (
            _CONFIG,
            Flag("plans", "N", "draw the plans of N rounds, and say how much of the work is useful", 0),
            Flag(
                "target",
                "NAME",
                "compile all programs for devices that are not here: h100, a100-40x8, v5e:2x4",
                "",
            ),
            Flag("fit", "", "with --target: search the fastest rows, remat and clients at once that fit", False),
            Flag("minutes", "N", "with --target: how long one program may take to compile", 30),
            _REGISTER,
        ),
        "parameters (Table 7), who owns which block, memory plan, FLOPs; reads data for --plans, --target and clients",
        "Prints, and writes nothing. Devices are those of this machine, or what config.mesh asks for.\n"
        "With --target nothing is allocated and no weights are read; it takes tap-jax[target-tpu] or [target-gpu].\n"
        "With --plans beside it nothing is compiled; plans are drawn with the target's defaults.\n"
        "Example: tap-jax describe --config=flava",
    ),
    Command(
        "bench",
        bench,
        (
            _CONFIG,
            Flag("steps", "N", "local steps per run; 0: the configuration's local_steps", 0),
            Flag("clients", "N", "clients of the cohort; 0: the configuration's cohort_size", 0),
            Flag("rounds", "N", "whole rounds to time, and Stage 2 after them; 0: neither", 0),
            Flag("against", "NAME", "train the same clients one by one in PyTorch as well: torch or torch-fused", ""),
            _REGISTER,
            *PROCESSES,
        ),
        "times the local training of a cohort; one JSON line",
        "Prints the line on stdout and words on stderr; what --rounds and --against add is null without them.\n"
        "Example: tap-jax bench --config=demo --steps=10",
    ),
)
COMMANDS = {command.name: command for command in _ALL}
