"""The loop over rounds: draw a cohort, let the method act, log, checkpoint; and how a run resumes."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from tap_jax import blocks
from tap_jax.blocks import Blocks, Partition
from tap_jax.engine import parallel, store
from tap_jax.engine.agreement import any_says
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.cohort import Cohort, cohort_of_round
from tap_jax.engine.engine import Engine
from tap_jax.engine.moments import on_host
from tap_jax.engine.privacy import epsilon
from tap_jax.engine.screening import Verdicts, describe, dropped, norms
from tap_jax.engine.windows import play_parts
from tap_jax.errors import Preempted, UserError
from tap_jax.methods.base import Method, RoundMetrics, SplitRound, State, put_rows
from tap_jax.whole_files import write_file


def initial_state(
    engine: Engine, server: Blocks, method: Method, *, workdir: pathlib.Path | None = None, host_bytes: int = 0
) -> State:
    """The state before round 0: every client's models start as its blocks of the server's (Sec. 3.2).

    Where there are private blocks, they are of those, since the server holds the others.

    Args:
      workdir: where personal blocks go that would take more than `host_bytes` of memory; a run that has begun keeps
        the form in which it began. None: they stay in memory.

    Raises:
      UserError: what is on disk cannot be used.
    """
    partition, models, persist = engine.partition, method.client_models, engine.settings.persist
    table = partition.task_mask
    kept = partition.kept
    trained = ("federated", *(model for model in models if kept == partition.names))
    zeros = {name: np.zeros(like.shape, np.float32) for name, like in engine.moments_like.items()} if persist else {}
    needed = host_bytes_of(partition, engine.like, len(models), len(trained) if persist else 0)
    folder = None if workdir is None else store.folder_of(workdir, needed, host_bytes)
    if folder is not None:
        like, moments_like = {name: engine.like[name] for name in kept}, engine.moments_like
        start = store.open_store(folder / "blocks", partition, server, like).models() if models else ()
        untouched = store.open_store(folder / "moments", partition, zeros, moments_like).models() if persist else ()
    else:
        mine = [partition.blocks_of(k) for k in range(len(table))]
        in_models = set(kept)
        start = tuple(blocks.select(server, [name for name in names if name in in_models]) for names in mine)
        untouched = tuple(blocks.select(zeros, names) for names in mine) if persist else ()
    never = np.full(table.shape, np.inf, np.float32)
    return State(
        round=0,
        server=engine.server_params(server),
        client_models=dict.fromkeys(models, start),
        local_loss=never,
        personal_loss={model: never.copy() for model in method.personal_variants},
        replacements={model: np.zeros(table.shape, np.int32) for model in method.personal_variants},
        seen=np.zeros(table.shape, bool),
        heard=np.zeros(table.shape, bool),
        moments=dict.fromkeys(trained, untouched) if persist else {},
    )


def host_bytes_of(partition: Partition, like: Blocks, models: int, moments: int) -> int:
    """Bytes of so many models' blocks and so many models' optimizer states once every client has its own."""
    sizes = np.array([blocks.size_bytes(like[name]) for name in partition.names])
    one = partition.owned @ (sizes * np.isin(partition.names, partition.kept))
    return int(models * one.sum() + moments * (partition.owned @ (2 * sizes + 4)).sum())


def play_round(
    engine: Engine, method: Method, state: State, clients: Sequence[int] | None = None
) -> tuple[State, dict]:
    """One round: the cohort is drawn from (seed, round), the method does the rest.

    Args:
      clients: who takes part, in the place of those drawn.

    Returns:
      The new state and a JSON-ready line: round, clients, learning rate, losses by model, client and task, and where
      the method or the configuration has them replacements, bytes, updates that were dropped, their norms, epsilon.

    Raises:
      UserError: `clients` are none, too many or not all different, or an update was dropped, and `screening.on_broken`
        is "stop".
      ValueError: `clients` are given in a run with differential privacy.
    """
    settings = engine.settings
    if clients is not None:
        _check_clients(clients, settings.cohort_size, len(engine.data))
    if clients is not None and settings.privacy:
        raise ValueError("privacy is accounted for cohorts that are drawn; leave clients out")
    if clients is None:
        cohort = cohort_of_round(engine, state.round, method.first_phase)
    else:
        cohort = Cohort.of(engine, clients, state.round)
    after, metrics = method.round(cohort, state)
    after, verdicts = _settled(cohort, after)
    line = _line(cohort, metrics, verdicts)
    return _noted(after, cohort, metrics), line


def play_window(
    engine: Engine, method: Method, state: State, rounds: int, stop: Callable[[], bool] = lambda: False
) -> tuple[State, list[dict]] | None:
    """The rounds to the end of a window, or to the end of the run: that of `play_round` is a window by itself.

    Windows end where the rounds done are a multiple of `settings.window`, whatever round they begin with.

    Args:
      rounds: of the run.
      stop: asked between the parts of a window.

    Returns:
      The new state and the lines of `play_round`; None where `stop` said yes, and nothing has come of the window.

    Raises:
      UserError: see `play_round`.
    """
    window, first = engine.settings.window, int(state.round)
    last = max(first + 1, min(rounds, (first // window + 1) * window))
    if last - first == 1 or not isinstance(method.round, SplitRound):
        state, line = play_round(engine, method, state)
        return state, [line]
    found = play_parts(engine, method, state, last, _settled, stop)
    if found is None:
        return None
    state, played = found
    for cohort, metrics, _ in played:
        state = _noted(state, cohort, metrics)
    return state, [_line(*one) for one in played]


def _settled(cohort: Cohort, state: State) -> tuple[State, tuple[Verdicts, ...]]:
    """The state after a part of a cohort's round, without what is of that part alone, and its verdicts.

    Raises:
      UserError: an update was dropped, and `screening.on_broken` is "stop".
    """
    stop, labels = cohort.engine.settings.screening.stop, cohort.engine.labels
    if stop and (broken := dropped(state.verdicts, cohort.clients, labels)):
        found = ", ".join(map(describe, broken))
        raise UserError(
            f"screening.on_broken: 'stop', and round {cohort.round + 1} has a broken update: {found}; look at the"
            " client's data and optimizer.learning_rate, or call train again with 'drop' to go on without it"
        )
    moments = {name: on_host(states) for name, states in state.moments.items()}
    return state.replace(moments=moments, verdicts=()), state.verdicts


def _noted(state: State, cohort: Cohort, metrics: RoundMetrics) -> State:
    """The state with a round's tasks in `seen` and `heard`; of a method without a federated loss all count as heard."""
    seen = np.asarray(metrics.seen)
    heard = seen if metrics.federated_loss is None else seen & np.isfinite(metrics.federated_loss)
    return state.replace(
        seen=put_rows(state.seen, cohort.clients, seen, where=seen),
        heard=put_rows(state.heard, cohort.clients, heard, where=heard),
    )


def _check_clients(clients: Sequence[int], most: int, total: int) -> None:
    if not 0 < len(clients) <= most or len({*clients} & {*range(total)}) < len(clients):
        raise UserError(
            f"clients: {list(clients)}; name at least one and at most {most} (cohort_size) different ones from 0 to"
            f" {total - 1}"
        )


def _line(cohort: Cohort, metrics: RoundMetrics, verdicts: Sequence[Verdicts]) -> dict:
    engine, round_, metrics = cohort.engine, cohort.round, jax.device_get(metrics)
    settings = engine.settings
    names = [task.name for task in engine.tasks]
    real = [position for position, client in enumerate(cohort.clients) if client >= 0]
    real.sort(key=lambda position: cohort.clients[position])
    label = {p: engine.labels[cohort.clients[p]] for p in real}

    def by_client(table):
        return {
            str(label[p]): {
                name: float(table[p, o]) if np.isfinite(table[p, o]) else None
                for o, name in enumerate(names)
                if metrics.seen[p, o]
            }
            for p in real
        }

    losses = {"federated": metrics.federated_loss, "personal": metrics.personal_loss, "local": metrics.local_loss}
    line = {
        "round": round_,
        "clients": [label[p] for p in real],
        "learning_rate": float(settings.rate(round_)),
        "losses": {model: by_client(table) for model, table in losses.items() if table is not None},
    }
    if metrics.replaced is not None:
        line["replacements"] = [
            {"round": round_, "client": label[p], "task": names[o], "variant": variant}
            for variant, replaced in metrics.replaced.items()
            for p in real
            for o in np.flatnonzero(replaced[p])
        ]
    if "federated" in line["losses"] and len(engine.data) > 1:
        # Those of the cohort send what they trained; every client of the federation receives its blocks (Algorithm 1).
        sizes = np.array([blocks.size_bytes(engine.like[name]) for name in engine.partition.names])
        sizes *= engine.partition.sent  # private blocks stay where they are
        line["bytes_sent"] = {str(label[p]): int(engine.sends[cohort.clients[p]] @ sizes) for p in real}
        line["bytes_received"] = int(engine.partition.owned.sum(0) @ sizes)
    if verdicts:
        line["dropped"] = dropped(verdicts, cohort.clients, engine.labels)
        if found := norms(verdicts, cohort.clients, engine.labels):
            line["update_norms"] = found
        if settings.privacy:
            line["epsilon"] = epsilon(
                settings.privacy, clients=len(engine.data), cohort=settings.cohort_size, rounds=round_ + 1
            )
    return line


def run_rounds(
    engine: Engine,
    method: Method,
    state: State,
    *,
    rounds: int,
    workdir: pathlib.Path,
    every: int,
    config_hash: str,
    checkpoints: Checkpoints,
    progress: Callable[[dict], None],
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Plays rounds until `rounds` are done; a line per round goes to metrics.jsonl, the state to checkpoints/.

    Checkpoints are of the ends of windows: the first one at or after every `every` rounds. They are written while the
    next rounds are played; when this returns or raises, none is under way. Of several processes the first one writes.

    Args:
      state: the initial state, or what `resume` returned.
      every: rounds between checkpoints; 0 for one at the end only.
      progress: called with every line.
      stop: asked before every round, and in windows of several (`play_window`) before their personal parts; where it
        says yes in some process, the state is saved and all of them stop. A window that is not done by then is played
        again when the run goes on.

    Raises:
      Preempted: `stop` said so.
      UserError: a checkpoint could not be written.
    """
    path, saved = workdir / "metrics.jsonl", state.round

    def asked() -> bool:
        return any_says(stop())

    metadata = {"config": config_hash, "numerics": engine.numerics}
    if jax.process_index() == 0:
        # Lines of rounds that an interrupted run had played past its last checkpoint will be played again.
        lines = [line for line in read_lines(path) if line["round"] < state.round]
        write_file(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    else:
        path = pathlib.Path(os.devnull)
    with checkpoints, path.open("a", encoding="utf-8") as stream:
        if rounds == 0:  # evaluation and export want one
            store.commit(state, 0)
            checkpoints.save(0, state, metadata)
        while state.round < rounds:
            started = time.monotonic()
            if asked() or (found := play_window(engine, method, state, rounds, asked)) is None:
                if state.round > saved:
                    store.commit(state, state.round)
                    checkpoints.save(state.round, state, metadata)
                checkpoints.wait()
                raise Preempted(
                    f"stopped after round {state.round} of {rounds}, which is saved; the same command goes on there"
                    if state.round
                    else "stopped before the first round; the same command starts again"
                )
            before, (state, lines) = int(state.round), found
            del found
            seconds = (time.monotonic() - started) / len(lines)
            for line in lines:
                line["seconds"] = round(seconds, 4)
                stream.write(json.dumps(line, allow_nan=False) + "\n")
                stream.flush()
                progress(line)
            if state.round == rounds or (every and state.round // every > before // every):
                store.commit(state, state.round)
                checkpoints.save(state.round, state, metadata)
                store.release(state, checkpoints.steps())
                saved = state.round
    return state


def resume(checkpoints: Checkpoints, state: State, config_hash: str | None = None, numerics: str = "") -> State | None:
    """The newest whole checkpoint as a state like the given one, or None where there is none.

    Args:
      config_hash: of the configuration that must have written it; None: any whose state looks like this one.
      numerics: `Engine.numerics` of who goes on; where the run began with others, the checkpoints get a note.

    Raises:
      UserError: there are checkpoints, but none that can be used.
    """
    found = checkpoints.restore_latest(state, {"config": config_hash} if config_hash else None)
    if found is None:
        return None
    _, restored, metadata = found
    began = metadata.get("numerics", numerics)
    if numerics and began != numerics:
        checkpoints.note(
            f"the run began with {began}, and goes on with {numerics}: its numbers differ from those of a run on one"
            " platform; compute_dtype and engine.microbatch say it for all"
        )
    server = jax.tree.map(lambda new, old: parallel.put(new, old.sharding), restored.server, state.server)
    restored = restored.replace(server=server, round=int(restored.round))
    store.verify(restored)
    return restored


def read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl; what is none, cut off by a kill or damaged, is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                if isinstance(line, dict) and "round" in line:
                    lines.append(line)
    return lines
