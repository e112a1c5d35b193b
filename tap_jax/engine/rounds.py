"""The loop over rounds: draw a cohort, let the method act, log, checkpoint; and how a run resumes."""

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from tap_jax import blocks
from tap_jax.blocks import Blocks
from tap_jax.data.sampling import sample_cohort
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.cohort import Cohort, Engine
from tap_jax.methods.base import Method, State, put_chain, put_rows

LOSSES = {"federated_loss": "federated", "personal_loss": "personal", "local_loss": "local"}


def initial_state(engine: Engine, server: Blocks, method: Method) -> State:
    """The state before round 0: every client's chains start as its blocks of the server's (Sec. 3.2).

    Where there are private blocks, chains are of those, since the server holds the others.
    """
    partition, chains = engine.partition, method.chains
    table = partition.task_mask
    kept = [name for name, sent in zip(partition.names, partition.sent, strict=True) if not sent] or partition.names
    start = tuple(
        blocks.take(server, [name for name in partition.blocks_of(k) if name in kept]) for k in range(len(table))
    )
    never = np.full(table.shape, np.inf, np.float32)
    trained = ("federated", *(chain for chain in chains if kept == partition.names))
    untouched = tuple(
        {name: np.zeros(engine.moments_like[name].shape, np.float32) for name in partition.blocks_of(k)}
        for k in range(len(table) if engine.settings.persist else 0)
    )
    return State(
        round=0,
        server=engine.server_stack(server),
        chains=dict.fromkeys(chains, start),
        local_loss=never,
        personal_loss={chain: never.copy() for chain in method.margins},
        replacements={chain: np.zeros(table.shape, np.int32) for chain in method.margins},
        seen=np.zeros(table.shape, bool),
        finite={name: np.ones(table.shape, bool) for name in trained},
        moments=dict.fromkeys(trained, untouched) if untouched else {},
    )


def play_round(engine: Engine, method: Method, state: State) -> tuple[State, dict]:
    """One round: the cohort is drawn from (seed, round), the method does the rest.

    Returns:
      The new state and a JSON-ready line: round, clients, losses by chain, client and task, replacements, bytes.
    """
    settings = engine.settings
    clients = sample_cohort(settings.seed, state.round, len(engine.data), settings.cohort_size)
    cohort = engine.cohort(clients, state.round, state.moments)
    after, metrics = method.round(cohort, state)
    moments = {chain: put_chain(state.moments[chain], found) for chain, found in cohort.moments().items()}
    seen = np.asarray(metrics["seen"])
    after = after.replace(
        moments={**state.moments, **moments}, seen=put_rows(state.seen, cohort.clients, seen, where=seen)
    )
    return after, _line(engine, cohort, state.round, metrics)


def _line(engine: Engine, cohort: Cohort, round_: int, metrics: Mapping) -> dict:
    metrics = jax.device_get(dict(metrics))
    names = [task.name for task in engine.tasks]
    real = [position for position, client in enumerate(cohort.clients) if client >= 0]
    real.sort(key=lambda position: cohort.clients[position])

    def by_client(table):
        return {
            str(cohort.clients[p]): {
                name: float(table[p, o]) if np.isfinite(table[p, o]) else None
                for o, name in enumerate(names)
                if metrics["seen"][p, o]
            }
            for p in real
        }

    received = client_bytes(engine)
    line = {
        "round": round_,
        "clients": [int(cohort.clients[p]) for p in real],
        "learning_rate": float(engine.settings.rate(round_)),
        "losses": {chain: by_client(metrics[key]) for key, chain in LOSSES.items() if key in metrics},
    }
    if "replaced" in metrics:
        line["replacements"] = [
            {"round": round_, "client": int(cohort.clients[p]), "task": names[o], "variant": variant}
            for variant, replaced in metrics["replaced"].items()
            for p in real
            for o in np.flatnonzero(replaced[p])
        ]
    if "federated" in line["losses"] and len(engine.data) > 1:
        # Every client receives its blocks (Algorithm 1); those of the cohort send as much.
        line["bytes_sent"] = {str(k): received[k] for k in line["clients"]}
        line["bytes_received"] = {str(k): size for k, size in enumerate(received)}
    return line


def client_bytes(engine: Engine) -> list[int]:
    """Bytes of each client's blocks W̃[i]; private blocks stay where they are."""
    partition = engine.partition
    sizes = np.array([blocks.size_bytes(engine.like[name]) for name in partition.names])
    return (partition.owned @ (sizes * partition.sent)).tolist()


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
) -> State:
    """Plays rounds until `rounds` are done; a line per round goes to metrics.jsonl, the state to checkpoints/.

    Args:
      state: the initial state, or what `resume` returned.
      every: rounds between checkpoints; 0 for one at the end only.
      progress: called with every line.
    """
    path = workdir / "metrics.jsonl"
    # Lines of rounds that an interrupted run had played past its last checkpoint will be played again.
    kept = [line for line in read_lines(path) if line["round"] < state.round]
    _rewrite(path, kept)
    with path.open("a", encoding="utf-8") as stream:
        while state.round < rounds:
            started = time.monotonic()
            state, line = play_round(engine, method, state)
            line["seconds"] = round(time.monotonic() - started, 4)
            stream.write(json.dumps(line, allow_nan=False) + "\n")
            stream.flush()
            progress(line)
            if state.round == rounds or (every and state.round % every == 0):
                checkpoints.save(state.round, jax.device_get(state), {"config": config_hash})
    return state


def resume(checkpoints: Checkpoints, state: State) -> State | None:
    """The newest whole checkpoint as a state like the given one, or None where there is none."""
    like = jax.tree.map(lambda leaf: np.asarray(leaf), jax.device_get(state))
    found = checkpoints.restore_latest(like)
    if found is None:
        return None
    restored = found[1]
    server = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), restored.server, state.server)
    return restored.replace(server=server, round=int(restored.round))


def read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _rewrite(path: pathlib.Path, lines: Sequence[dict]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)
