"""Several rounds in a window: their federated parts one after the other, then their personal parts together.

What a client trains for itself in a round (X[i]) takes of that round only W̃[i] and its losses, and gives nothing to
the server. So the federated parts of a window's rounds come first, and their personal parts wait for the window's end.
There the clients of all its rounds train in one program, each with its own round's minibatches, dropout keys and
learning rate. Where a client is drawn more than once, its trainings go in *waves*: its n-th of the window is in the
n-th wave, so that they follow each other in the order of the rounds.

W̃[i] of the window stay on the devices. They are a quarter of what the personal training of as many clients needs
there (blocks, gradients and two moments), and that comes after them: what is kept is no more than what is needed
anyway, and nothing goes to the host and back.

Letters: D shards, K positions of a shard, P = D·K positions, O tasks, G slots of a shape class.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array

from tap_jax.engine.cohort import Cohort, cohort_of_round
from tap_jax.engine.engine import Engine
from tap_jax.engine.parallel import CLIENTS
from tap_jax.engine.screening import Verdicts
from tap_jax.methods.base import Method, RoundMetrics, State, Trained

# Rounds that wait for the devices at once. The host draws the next one's plans meanwhile, and a run that is to stop
# does so soon.
IN_FLIGHT = 2


def waves(drawn: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """[(place of the round in the window, client)] of every wave.

    Args:
      drawn: the clients of every round.

    Returns:
      A client is at most once in a wave, and its rounds rise from wave to wave.
    """
    found: list[list[tuple[int, int]]] = []
    times: Counter[int] = Counter()
    for n, clients in enumerate(drawn):
        for client in clients:
            if times[client] == len(found):
                found.append([])
            found[times[client]].append((n, client))
            times[client] += 1
    return found


def play_parts(
    engine: Engine,
    method: Method,
    state: State,
    last: int,
    settled: Callable[[Cohort, State], tuple[State, tuple[Verdicts, ...]]],
    stop: Callable[[], bool],
) -> tuple[State, list[tuple[Cohort, RoundMetrics, tuple[Verdicts, ...]]]] | None:
    """The rounds of a window.

    Args:
      method: its round is a `SplitRound`.
      last: the first round behind the window.
      settled: called with every cohort after its part, and the state then -> the state without what is of that part
        alone, and its verdicts.
      stop: asked before every part but the first.

    Returns:
      The state after the window, and of every round the cohort, its metrics and its verdicts; or None where `stop`
      said yes.
    """
    first, cohorts, kept, verdicts = int(state.round), [], [], []
    for n in range(last - first):
        if n >= IN_FLIGHT:
            jax.block_until_ready(kept[n - IN_FLIGHT].losses)
        if n and stop():
            return None
        cohort = cohort_of_round(engine, first + n, method.first_phase)
        state, trained = method.round.federated(cohort, state)
        state, screened = settled(cohort, state)
        cohorts.append(cohort)
        kept.append(trained)
        verdicts.append(screened)
        del trained
    jax.block_until_ready(kept[-1].losses)
    found, ahead = [], waves([engine.plans.clients(round_) for round_ in range(first, last)])
    for number, wave in enumerate(ahead):
        if stop():
            return None
        cohort = Cohort.of(engine, [client for _, client in wave], [first + n for n, _ in wave])
        needed = [trained if _places(of, cohort).size else None for of, trained in zip(cohorts, kept, strict=True)]
        later = {n for wave in ahead[number + 1 :] for n, _ in wave}
        kept = [trained if n in later else None for n, trained in enumerate(kept)]
        together = [_together(engine, cohort, cohorts, needed)]
        del needed
        state, metrics = method.round.personal(cohort, state, together.pop())
        state, _ = settled(cohort, state)
        found.append((cohort, jax.tree.map(np.asarray, metrics)))
    return state, [(cohort, _of_round(cohort, found), mine) for cohort, mine in zip(cohorts, verdicts, strict=True)]


def _places(one: Cohort, other: Cohort) -> np.ndarray:
    """int [2, n], the positions in one and in the other of every client and round that are in both."""
    at = {pair: position for position, pair in enumerate(_pairs(one))}
    found = [(at[pair], p) for p, pair in enumerate(_pairs(other)) if pair[0] >= 0 and pair in at]
    return np.array(found, int).reshape(-1, 2).T


def _pairs(cohort: Cohort) -> list[tuple[int, int]]:
    """(client, round) at every position."""
    return list(zip(cohort.clients.tolist(), cohort.rounds.reshape(-1).tolist(), strict=True))


def _together(engine: Engine, wave: Cohort, cohorts: Sequence[Cohort], kept: list[Trained | None]) -> Trained:
    """What the clients of a wave have trained in their rounds; takes it out of `kept`, which has None of others."""
    params, losses = None, None
    for n, cohort in enumerate(cohorts):
        if kept[n] is None:
            continue
        index = engine.devices.put(_index(wave, cohort), CLIENTS)
        params = engine.regroup(params, kept[n].federated, index)
        mine, theirs = _places(cohort, wave)

        def exchanged(rest: np.ndarray, table: Array, mine=mine, theirs=theirs) -> np.ndarray:
            rest[theirs] = np.asarray(table)[mine]
            return rest

        if losses is None:
            losses = jax.tree.map(lambda t: np.zeros((len(wave.clients), *t.shape[1:]), t.dtype), kept[n].losses)
        losses = jax.tree.map(exchanged, losses, kept[n].losses)
        kept[n] = None
    return Trained(params, engine.devices.put(losses, engine.shared.spec))


def _index(wave: Cohort, cohort: Cohort) -> dict[str, np.ndarray]:
    """`exchange.regroup`'s, from a round's cohort to a wave."""
    source = np.full(len(wave.clients) + 1, -1)
    mine, theirs = _places(cohort, wave)
    source[theirs] = mine
    slot, index = np.asarray(cohort.flat_layout.slot), {}
    for name, size in cohort.shape.slots.items():
        index[name] = np.full((len(wave.table), wave.shape.slots[name]), -1, np.int32)
        for shard, layout in enumerate(wave.shard_layouts):
            real = layout.owner[name] < wave.positions
            position = source[np.where(real, layout.owner[name] + shard * wave.positions, -1)]
            at = position // cohort.positions * size + slot[position, layout.block[name]]
            index[name][shard] = np.where(position >= 0, at, -1)
    return index


def _of_round(cohort: Cohort, found: Sequence[tuple[Cohort, RoundMetrics]]) -> RoundMetrics:
    """The metrics of a round's clients, from those of the waves."""
    places = [_places(wave, cohort) for wave, _ in found]

    def gathered(*tables: np.ndarray) -> np.ndarray:
        out = np.zeros((len(cohort.clients), *tables[0].shape[1:]), tables[0].dtype)
        for (theirs, mine), table in zip(places, tables, strict=True):
            out[mine] = table[theirs]
        return out

    return jax.tree.map(gathered, *(metrics for _, metrics in found))
