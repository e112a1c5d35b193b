"""Runs on disk: `tap-jax train` and `tap-jax evaluate`, and how the models of a finished run are had back.

A run's folder holds config.json, metrics.jsonl, checkpoints/, models/, tokenizer/, samples/, results.json, report.md,
report.html and figures/, where there are many personal blocks (`engine.store`) store/, and what `config.writers` adds.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from tap_jax import config as configuration
from tap_jax.assembly import federation_of, with_found
from tap_jax.blocks import Blocks
from tap_jax.config import ConfigDict
from tap_jax.engine import rounds
from tap_jax.engine.agreement import any_says, in_step
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.cohort import Cohort, client_batches
from tap_jax.engine.memory import give_back_memory, peak_memory
from tap_jax.engine.model_files import read_model, write_model
from tap_jax.engine.privacy import spent
from tap_jax.engine.screening import totals
from tap_jax.errors import Preempted, UserError
from tap_jax.evaluation.results import write_results
from tap_jax.evaluation.run_figures import illustrate
from tap_jax.evaluation.samples import write_samples
from tap_jax.evaluation.scores import Row, summarise
from tap_jax.experiment import Experiment, build
from tap_jax.methods.base import State
from tap_jax.registry import METHODS, server_variants
from tap_jax.runs import run_folder, writers
from tap_jax.runs.writers import Guarded, Writer

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Where a run speaks: functions that it calls, all of which do nothing unless they are given.

    Attributes:
      say: gets whole lines.
      progress: gets a line of metrics after every round.
      built: gets the experiment once, before anything is trained or written.
      begin: gets the number of rounds that are done already, before the first that is played.
      last: gets variant -> how many times it will be scored after the last round: once for each batch of clients,
        or once where it is the server's blocks.
      scored: gets the variant, each time.
      writers: of one's own, beside those of `config.writers`; closed at the end.
      doing: gets a few words on what begins, where that may take long: before the rounds and after them.
      reading: gets what is being read and converted ("task/split"), how many of its rows are, and of how many.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Callable[[dict], None] = lambda line: None
    built: Callable[[Experiment], None] = lambda experiment: None
    begin: Callable[[int], None] = lambda done: None
    last: Callable[[Mapping[str, int]], None] = lambda times: None
    scored: Callable[[str], None] = lambda variant: None
    writers: Sequence[Writer] = ()
    doing: Callable[[str], None] = lambda text: None
    reading: Callable[[str, int, int], None] = lambda what, done, total: None


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    reporter: Reporter = Reporter(),  # noqa: B008, it is frozen
    stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """A whole run, as `tap-jax train` makes it: from the configuration to results.json, or on from a checkpoint.

    What follows the last round is done as a whole: a run that ends in the midst of it does it again, to the same bits.

    Args:
      workdir: the run's folder, made if need be; the module text says what it holds then.
      reporter: is told what is going on; None: nothing is said.
      stop: asked before every round and after every model; once it says yes, the run stops with its state saved.

    Returns:
      Result rows, as of `Experiment.evaluate`.

    Raises:
      UserError: bad input, or a workdir that holds another configuration's run.
      Preempted: `stop` said so.

    Example:
      `experiment` is that of `build`'s example. A second call would score the models again.

      >>> import pathlib
      >>> import tap_jax as tap
      >>> rows = tap.run(experiment.config, "runs/small")
      >>> len(rows), pathlib.Path("runs/small/report.html").exists()
      (2, True)
    """
    started = time.monotonic()
    workdir = pathlib.Path(workdir)
    config = with_found(config)
    identity = configuration.config_hash(config)
    run_folder.check(workdir, config)
    with in_step():
        if jax.process_index() == 0:  # which writes
            writers.check(config.writers)
    federation = federation_of(config)
    run_folder.check_clients(workdir, federation)
    experiment = build(config, federation=federation, tell=reporter.reading)
    reporter.built(experiment)
    for note in (*experiment.notes, *(experiment.scorer.notes if experiment.scorer else ())):
        reporter.say(note)
    with run_folder.alone(workdir):
        state = experiment.init(workdir)
        checkpoints = Checkpoints(workdir / "checkpoints", report=reporter.say)
        resumed = rounds.resume(checkpoints, state, identity, experiment.engine.numerics)
        writes = jax.process_index() == 0  # of several processes on the same folder
        if writes:
            run_folder.begin(workdir, experiment)
        if resumed is not None:
            state = resumed
            reporter.say(f"resuming after round {state.round} of {config.rounds}")
        with in_step():
            curves = _curves(experiment, workdir, reporter, resumed=resumed is not None) if writes else []
        # From here on only the loop holds the blocks that it begins with: any other reference would keep a second copy
        # of all clients' blocks in memory.
        experiment, begun = dataclasses.replace(experiment, initial_blocks={}), [state]
        del state, resumed
        try:
            return _play(
                experiment,
                begun,
                workdir=workdir,
                identity=identity,
                checkpoints=checkpoints,
                reporter=reporter,
                curves=curves,
                stop=stop,
                started=started,
            )
        finally:
            for curve in curves:
                curve.close()


def _play(
    experiment: Experiment,
    begun: list[State],
    *,
    workdir: pathlib.Path,
    identity: str,
    checkpoints: Checkpoints,
    reporter: Reporter,
    curves: Sequence[Writer],
    stop: Callable[[], bool],
    started: float,
) -> list[Row]:
    """`run` from the first round on; takes the state out of `begun`."""
    config, writes = experiment.config, jax.process_index() == 0
    sampler = experiment.evaluator.keep_samples(experiment.variants[0])
    experiment.evaluator.tell = reporter.doing
    experiment.prepare()
    built = time.monotonic()
    margins = tuple(experiment.method.personal_variants.values())

    def progress(line: dict) -> None:
        scalars = writers.of_round(line, margins) if curves else {}
        for curve in curves:
            curve.write(line["round"] + 1, scalars)
        reporter.progress(line)
        if not played:  # the first round of this process has compiled, and a checkpoint may come now
            give_back_memory()
        played.append(line["round"])

    played: list[int] = []
    reporter.begin(int(begun[0].round))
    state = rounds.run_rounds(
        experiment.engine,
        experiment.method,
        begun.pop(),
        rounds=config.rounds,
        workdir=workdir,
        every=config.checkpoint_every,
        config_hash=identity,
        checkpoints=checkpoints,
        progress=progress,
        stop=stop,
    )
    trained = time.monotonic()
    give_back_memory()  # the last checkpoint's copies
    _announce(experiment, reporter)
    rows: list[Row] = []
    entry, stage2, since = METHODS[config.method], 0.0, trained
    for cohort, variant, mine in experiment.finish_in_batches(state, reporter.doing):
        if entry.personal and variant == entry.default:  # the first of a batch, after its teacher's training (Table 7)
            stage2 += time.monotonic() - since
        for client, found in mine.items() if writes else ():
            write_model(workdir / "models", variant, client, found, config.rounds, name_of(experiment, client))
        rows += experiment.evaluate_cohort(variant, cohort, mine)
        reporter.scored(variant)
        _stop_here(stop)
        del mine  # or it would stay while the next models are trained
        since = time.monotonic()
    for variant in experiment.variants:
        if variant in server_variants():
            rows += experiment.evaluate_server(variant, state)
            reporter.scored(variant)
            _stop_here(stop)
    rows = experiment.in_order(rows)
    reporter.doing("writing results and report")
    if not writes:
        return rows
    means = {"/".join(("score", s["variant"], s["task"], s["metric"])): s["mean"] for s in summarise(rows)}
    for curve in curves:
        curve.write(config.rounds + 1, {name: mean for name, mean in means.items() if mean is not None})
    write_samples(workdir / "samples", sampler.samples)
    lines = rounds.read_lines(workdir / "metrics.jsonl")
    timing = {
        "build_seconds": built - started,
        "rounds_seconds": math.fsum(line["seconds"] for line in lines),  # whichever process played them
        "post_and_evaluation_seconds": time.monotonic() - trained,
        "total_seconds": time.monotonic() - started,
        "device": f"{experiment.engine.devices.size} x {jax.devices()[0].device_kind}",
        **({"stage2_seconds_per_client": stage2 / len(experiment.federation.clients)} if stage2 else {}),
        **peak_memory(experiment.engine.devices.local),
    }
    replacements = [entry for line in lines for entry in line.get("replacements", [])]
    settings, clients = experiment.engine.settings, len(experiment.federation.clients)
    privacy = None
    if settings.privacy:
        drawn = {"clients": clients, "cohort": settings.cohort_size, "rounds": int(state.round)}
        privacy = spent(settings.privacy, **drawn)
        reporter.say(f"privacy: epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:g} for {privacy['covers']}")
    write_results(
        workdir,
        config.to_dict(),
        rows,
        replacements,
        timing,
        screening=totals(lines),
        privacy=privacy,
        notes=_notes(experiment, lines),
        config_hash=identity,
        versions=versions(),
    )
    illustrate(workdir)
    return rows


def _notes(experiment: Experiment, lines: Sequence[Mapping]) -> tuple[str, ...]:
    """What a reader of the results should know; `lines` are those of metrics.jsonl."""
    notes = experiment.scorer.notes if experiment.scorer else ()
    lost = experiment.config.rounds - len({line["round"] for line in lines})
    if lost:
        notes += (
            f"metrics.jsonl lacks {lost} of {experiment.config.rounds} rounds: replacements, dropped updates and the"
            " rounds' time are those of the others",
        )
    return notes


PACKAGES = ("tap-jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "tokenizers", "bert-score", "nltk")


def versions() -> dict[str, str]:
    """Package -> version, of Python and of what the numbers of a run depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def stored_model(experiment: Experiment, workdir: pathlib.Path, variant: str, client: int) -> Blocks:
    """One client's finished blocks, as `run` left them.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    like = experiment.engine.finished.like
    like = {name: like[name] for name in experiment.partition.blocks_of(client) if name in like}
    name = name_of(experiment, client)
    return read_model(workdir / "models", variant, client, like, experiment.config.rounds, name)


def name_of(experiment: Experiment, client: int) -> str:
    """What files call a client beside its number; "" where it has a number only."""
    federation = experiment.federation
    return federation.clients[client].name if federation.named else ""


def evaluate(
    workdir: str | os.PathLike,
    reporter: Reporter = Reporter(),  # noqa: B008, it is frozen
    client: int | str | None = None,
) -> list[Row]:
    """`tap-jax evaluate`: scores the models of a finished run again and rewrites its results -> result rows.

    Args:
      client: name or number; only this one's models are scored, and nothing is written. None: all.

    Raises:
      UserError: no run there, one that has not finished, or one whose results.json is damaged; no such client.
    """
    workdir = pathlib.Path(workdir)
    config, results = configuration.of_run(workdir), run_folder.earlier_results(workdir / "results.json")
    federation = federation_of(config)
    number = None if client is None else federation.number_of(client)
    run_folder.check_clients(workdir, federation)
    experiment = build(config, federation=federation, tell=reporter.reading)
    reporter.built(experiment)
    with run_folder.alone(workdir):
        return _evaluate(experiment, workdir, results, reporter, number)


def _evaluate(
    experiment: Experiment, workdir: pathlib.Path, results: dict, reporter: Reporter, client: int | None
) -> list[Row]:
    """`evaluate`, once no other process is in the folder; `results` are those that are there."""
    config = experiment.config
    initial = experiment.init(workdir)
    state = rounds.resume(Checkpoints(workdir / "checkpoints", report=reporter.say), initial)
    if state is None:
        raise UserError(f"workdir: no checkpoint in {workdir}; train again")
    _announce(experiment, reporter)
    experiment.evaluator.tell = reporter.doing
    rows = []
    cohorts = [Cohort.of(experiment.engine, [client], state.round)] if client is not None else None
    for variant in experiment.variants:
        if variant in server_variants():
            rows += experiment.evaluate_server(variant, state)
            reporter.scored(variant)
            continue
        for cohort in cohorts or client_batches(experiment.engine, state.round):
            models = {int(k): stored_model(experiment, workdir, variant, int(k)) for k in cohort.clients if k >= 0}
            rows += experiment.evaluate_cohort(variant, cohort, models)
            reporter.scored(variant)
    rows = experiment.in_order(rows)
    if client is not None:
        label = experiment.federation.labels[client]
        rows = [row for row in rows if row["client"] == label]
        if not rows:
            raise UserError(f"client: {label} has no test rows of its own, so there is no score; see data.test_split")
        return rows
    if jax.process_index():  # the first one writes
        return rows
    write_results(
        workdir,
        config.to_dict(),
        rows,
        results["replacements"],
        results["timing"],
        screening=results.get("screening"),
        privacy=results.get("privacy"),
        notes=_notes(experiment, rounds.read_lines(workdir / "metrics.jsonl")),
        config_hash=configuration.config_hash(config),
        versions=versions(),
    )
    illustrate(workdir)
    return rows


def _announce(experiment: Experiment, reporter: Reporter) -> None:
    """Says what will be scored, and how often each variant."""
    clients, at_once = len(experiment.federation.clients), experiment.engine.settings.clients_at_once
    reporter.say(
        f"after the last round: {', '.join(experiment.variants)} for {clients} clients"
        + (f", {at_once} at a time" if at_once < clients else "")
    )
    servers = server_variants()
    batches = -(-clients // at_once)
    reporter.last({variant: 1 if variant in servers else batches for variant in experiment.variants})


def _curves(experiment: Experiment, workdir: pathlib.Path, reporter: Reporter, *, resumed: bool) -> list[Writer]:
    """Those of the configuration, which a resumed run does without if they do not start, and of the reporter."""
    opened: list[Writer] = []
    for name in experiment.config.writers:
        try:
            opened.append(writers.open_writer(name, workdir, experiment.config.to_dict(), reporter.say))
        except UserError as error:
            if not resumed:
                raise
            _LOG.warning("%s; the run goes on without", error)
    return [Guarded(writer) for writer in (*opened, *reporter.writers)]


def _stop_here(stop: Callable[[], bool]) -> None:
    if any_says(stop()):
        raise Preempted("stopped after the last round, which is saved; the same command does what follows it again")
