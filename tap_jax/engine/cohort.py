"""Clients that train together: what methods compose (`methods.base.Cohort`).

Plans are drawn on the host; everything else a cohort returns stays on the device until somebody reads it.

Letters: D shards (devices), K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a group.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax import blocks
from tap_jax.blocks import Blocks, Partition, Seats, Stack
from tap_jax.data.families import Family
from tap_jax.data.packing import RowShape
from tap_jax.data.sampling import PURPOSES, ClientData, Plan, capacities, draw_plan, share_out
from tap_jax.engine import parallel
from tap_jax.engine.local_training import Losses
from tap_jax.engine.parallel import CLIENTS, SHARED, Devices
from tap_jax.engine.programs import abstract
from tap_jax.engine.screening import Verdicts
from tap_jax.engine.settings import EngineSettings
from tap_jax.engine.stacks import flatten_seats
from tap_jax.federation import Task
from tap_jax.methods.base import Chain, LocalRule, put_chain

if TYPE_CHECKING:
    from tap_jax.engine.engine import Engine

# Phase -> the phase with whose optimizer states it goes on, where they persist; the others go on with their own.
CONTINUES = {"post": "federated", "post_again": "post", "distil": "personal"}
# Bytes of a device's stack up to which a place is kept for a teacher where there is none, so that one program serves
# every phase; beyond, a rule that does without has a second program for these phases.
PLACE_KEPT = 2**28


class Phase(NamedTuple):
    """What a local training of a cohort is given.

    Attributes:
      plan: dealt out to the E devices of every shard, leaves [D, E, ...]; numpy.
      rate: float32 [D, K], numpy.
      key: of (seed, round, purpose), [D, K].
    """

    plan: Plan
    rate: np.ndarray
    key: Array


class Cohort:
    """See `methods.base.Cohort`; made by `Engine.cohort` and `Engine.passes`."""

    def __init__(
        self,
        engine: "Engine",
        clients: Sequence[int],
        round_: int | Sequence[int],
        *,
        size: int,
        moments: Mapping | None = None,
    ):
        self.engine, self.round = engine, round_ if np.ndim(round_) == 0 else tuple(round_)
        self._before, self._moments = moments or {}, {}
        self.given, self._trained = tuple(clients), False
        self.verdicts: list[Verdicts] = []
        self.shape = engine.shape_of(size)
        table = parallel.deal(
            clients,
            [engine._work[k] for k in clients],
            shards=engine.devices.shards,
            positions=self.shape.positions,
        )
        self.clients = table.reshape(-1)
        self.rounds = np.full(table.shape, round_ if self.of_one_round else min(round_))
        if not self.of_one_round:
            for client, number in zip(clients, round_, strict=True):
                self.rounds[table == client] = number
        owned = engine.partition.owned[table] & (table >= 0)[..., None]
        self.shard_seats = [blocks.seat(engine.partition, mine, self.shape.slots) for mine in owned]
        self.positions = self.shape.positions
        self.table, self._owned = table, owned.reshape(len(self.clients), -1)
        self.seats: Seats = engine.devices.put(jax.tree.map(lambda *x: np.stack(x), *self.shard_seats), CLIENTS)
        self.flat_seats: Seats = flatten_seats(self.shard_seats)

    @property
    def of_one_round(self) -> bool:
        """Whether all clients are of the same round, as but in windows they are."""
        return np.ndim(self.round) == 0

    def broadcast(self, server: Stack) -> Stack:
        """W̃[i] for every client, [D, G, n]."""
        return self.engine._broadcast(server, self.seats)

    def load(
        self,
        chain: Sequence[Blocks] | Mapping[int, Blocks],
        rest: Stack | None = None,
        like: Blocks | None = None,
    ) -> Stack:
        """The clients' blocks from host memory or disk, [D, G, n], beside what else there is of `rest`.

        Of several processes each reads those of its own devices.

        Args:
          like: shapes of the blocks, where they are not those of a chain.
        """
        return {**(rest or {}), **self._put(chain, self._chained if like is None else like)}

    def _put(self, chain: Sequence[Blocks] | Mapping[int, Blocks], like: Blocks) -> Stack:
        packed = {}
        for shard in self.engine.devices.reached:
            holders = [chain[k] if k >= 0 else {} for k in self.table[shard]]
            packed[shard] = blocks.pack(self.engine.partition, self.shard_seats[shard], holders, like)
        return self.engine.devices.put_shards(packed)

    def put(self, chain: Chain, stack: Stack) -> Chain:
        """The chain with the cohort's blocks exchanged for those of the stack."""
        return self._exchange(chain, stack, self._chained)

    def unload(self, stack: Stack) -> dict[int, Blocks]:
        """Client number -> its blocks, in host memory; of several processes in that of each."""
        return self._all(stack, self.engine.like)

    def moments(self) -> dict[str, Chain]:
        """The optimizer states that the cohort was given, those of the chains trained in this round exchanged."""
        return {
            name: self._exchange(chain, self._moments[name], self.engine.moments_like)
            if name in self._moments
            else chain
            for name, chain in self._before.items()
        }

    def _exchange(self, chain: Chain, stack: Stack, like: Blocks) -> Chain:
        members, names = self.engine.partition.members(), self.engine.partition.names
        stack = {group: matrix for group, matrix in stack.items() if names[members[group][0]] in like}
        if isinstance(chain, tuple):  # in memory, where every process has all clients'
            return put_chain(chain, self._all(stack, like))
        return put_chain(chain, self._by_client(self.engine.devices.fetch_shards(stack), like))

    def _all(self, stack: Stack, like: Blocks) -> dict[int, Blocks]:
        fetched = self.engine.devices.fetch(dict(stack))
        shards = {shard: jax.tree.map(itemgetter(shard), fetched) for shard in range(len(self.table))}
        return self._by_client(shards, like)

    def _by_client(self, shards: Mapping[int, Stack], like: Blocks) -> dict[int, Blocks]:
        found = {}
        for shard, stack in shards.items():
            held = blocks.unpack(self.engine.partition, self.shard_seats[shard], stack, like)
            found |= {int(k): mine for k, mine in zip(self.table[shard], held, strict=True) if k >= 0}
        return found

    @property
    def _chained(self) -> Blocks:
        return blocks.take(self.engine.like, self.engine.partition.chained)

    def plan(self, purpose: str, *, post: bool, without: Collection[int] = ()) -> Plan:
        """The draws of this (seed, round, purpose), rows [D, draws, τ, ...]; numpy.

        Args:
          without: positions that take no step.
        """
        settings, engine = self.engine.settings, self.engine
        left_out = np.isin(np.arange(self.clients.size), list(without)).reshape(self.table.shape)
        table = np.where(left_out, -1, self.table)

        def one(clients, rounds, draw):
            return draw_plan(
                engine.data,
                clients,
                engine.families,
                seed=settings.seed,
                round_=rounds,
                purpose=purpose,
                batch=settings.batch,
                shapes=engine.shapes,
                steps=settings.post_steps if post else settings.local_steps,
                capacities=self.shape.rows,
                starts=engine.starts,
                length=max(settings.post_steps, settings.local_steps),
                passes=None if post else 1,
                draw=draw,
                lead=engine._lead,
            )

        shards = []
        for clients, rounds in zip(table, self.rounds, strict=True):
            drawn = [one(clients, rounds, draw) for draw in range(engine.rule.draws)]
            shards.append(drawn[0].replace(rows=jax.tree.map(lambda *x: np.stack(x), *(plan.rows for plan in drawn))))
        return jax.tree.map(lambda *x: np.stack(x), *shards)

    def train(
        self,
        stack: Stack,
        purpose: str,
        *,
        chain: str | None = None,
        post: bool = False,
        teacher: Stack | None = None,
        steps: tuple[int, int] | None = None,
        idle: np.ndarray | None = None,
        goes_on: bool = True,
    ) -> tuple[Stack, Losses]:
        """Local training -> (stack, `Losses` [P, O]); see `methods.base.Cohort`.

        Args:
          goes_on: a later call begins where `steps` end; else no optimizer states are kept for it.
        """
        engine, phase = self.engine, self.phase(purpose, post=post, idle=idle)
        if not post and self.of_one_round and not self._trained:
            engine.begins, self._trained = purpose, True
        if steps is not None:
            plan = phase.plan
            first, last = np.full_like(plan.first, steps[0]), np.minimum(plan.steps, steps[1])
            phase = phase._replace(plan=plan.replace(first=first, steps=last))
        moments = self._remembered(purpose, chain, steps if goes_on else None)
        stack, after, losses = engine.train(stack, moments, self._aid(teacher), self.seats, phase)
        if after is not None:
            self._moments[purpose if post else chain or purpose] = after
        return stack, losses

    def phase(self, purpose: str, *, post: bool = False, idle: np.ndarray | None = None) -> "Phase":
        """A local training of this (seed, round, purpose); its plan is drawn now, unless it has been."""
        settings = self.engine.settings
        seed, number = jax.random.key(settings.seed), PURPOSES.index(purpose)
        rounds, place = np.unique(self.rounds, return_inverse=True)
        place = place.reshape(self.table.shape)
        key = jnp.stack([jax.random.fold_in(jax.random.fold_in(seed, t), number) for t in rounds.tolist()])[place]
        rates = [settings.post_rate if post else settings.rate(t) for t in rounds.tolist()]
        rate = np.array(rates, np.float32)[place]
        drawn = self.engine._drawn.pop((self.round, purpose, self.given), None)
        if drawn and not post and idle is None:
            plan = drawn.result()
        else:
            plan = self.plan(purpose, post=post, without=() if idle is None else np.flatnonzero(idle))
        plan = share_out(plan, self.engine.devices.parts)
        return Phase(plan, rate, key)

    def _remembered(self, purpose: str, chain: str | None, steps: tuple[int, int] | None) -> Stack | None:
        """The optimizer states with which a training goes on, or None where it starts afresh and leaves none."""
        if not self.engine.settings.persist and steps is None:
            return None
        if steps is not None and steps[0] > 0:
            return self._moments[purpose]
        if self.engine.settings.persist:
            before = chain or CONTINUES.get(purpose, purpose)
            if before in self._moments:
                return self._moments[before]
            if before in self._before:
                return self._put(self._before[before], self.engine.moments_like)
        return self.engine.nobody(self.abstract_stack(self.engine.moments_like))

    def _aid(self, teacher: Stack | None):
        """A teacher's stack and whether it is one, per shard: one program serves training and distillation."""
        engine = self.engine
        if not engine.rule.guided:
            if teacher is not None:
                raise ValueError("the method's rule takes no teacher")
            return None
        if teacher is None and not self.keeps_place:
            return None
        flag = engine.devices.put(np.full(len(self.table), teacher is not None), CLIENTS)
        return flag, engine.nobody(self.abstract_stack()) if teacher is None else teacher

    @property
    def keeps_place(self) -> bool:
        """Whether training takes a stack for a teacher even where there is none."""
        size = sum(4 * matrix.size for matrix in self.abstract_stack().values()) // len(self.table)
        return keeps_place(self.engine.rule, size)

    def prepare(self, *, guided: bool = True) -> None:
        """Starts compiling `train` in the background.

        Args:
          guided: whether it will be given a teacher.
        """
        for args in self.training(guided=guided).values():
            self.engine._train.prepare(*args)

    def training(self, *, guided: bool = True) -> dict[tuple[bool, bool], tuple]:
        """What `train` is given, as shapes: (with a place for a teacher, with optimizer states) -> arguments.

        Args:
          guided: whether it will be given a teacher.
        """
        engine, settings = self.engine, self.engine.settings
        stack = self.abstract_stack()
        flag = abstract(np.zeros(len(self.table), bool), engine.by_client)
        moments = self.abstract_stack(engine.moments_like)
        keys = jnp.broadcast_to(jax.random.key(0), self.table.shape)
        wanted = {(self.keeps_place, settings.persist)}
        if guided and engine.rule.guided:
            wanted.add((True, settings.persist or settings.in_pieces))
        found = {}
        for taught, remember in sorted(wanted):
            found[taught, remember] = (
                *abstract((engine.frozen, engine.arrays), engine.shared),
                stack,
                moments if remember else None,
                (flag, stack) if taught else None,
                abstract(self.seats, engine.by_client),
                abstract(share_out(self.plan(PURPOSES[-1], post=True), engine.devices.parts), engine.by_row),
                *abstract((np.zeros(keys.shape, np.float32), keys), engine.by_client),
            )
        return found

    def abstract_stack(self, like: Blocks | None = None) -> Stack:
        """The shapes of the cohort's stacks, of blocks or of what else has a vector per block."""
        like = self.engine.like if like is None else like
        shards, groups = len(self.table), self.engine.partition.members()
        names = {group: self.engine.partition.names[members[0]] for group, members in groups.items()}
        sizes = {group: blocks.count(like[name]) for group, name in names.items() if name in like}
        zero = {g: jax.ShapeDtypeStruct((shards, self.shape.slots[g], n), jnp.float32) for g, n in sizes.items()}
        return abstract(zero, self.engine.by_client)

    def aggregate(self, server: Stack, stack: Stack, losses: Losses) -> Stack:
        """Component-wise FedAvg (Sec. 3.1), weighted by |D_i| or uniformly; or with noise, see `engine.privacy`.

        What screening found is added to `verdicts`.

        Raises:
          ValueError: the clients are of several rounds, or privacy is accounted for already.
        """
        if not self.of_one_round:
            raise ValueError("clients of several rounds have no aggregate")
        samples = np.array([self.engine.data[k].samples if k >= 0 else 0 for k in self.clients], np.float32)
        if self.engine.settings.aggregation == "uniform":
            samples = (samples > 0).astype(np.float32)
        weights = np.where(self._owned & self.engine.partition.sent, samples[:, None], 0).astype(np.float32)
        key = None
        if self.engine.settings.privacy:
            if self.verdicts:
                raise ValueError("privacy is accounted for one aggregation a round; this is a second one")
            key = jax.random.fold_in(jax.random.key(self.engine.settings.seed), self.round)
            key = self.engine.devices.put(jax.random.fold_in(key, PURPOSES.index("noise")), SHARED)
        server, found = self.engine._aggregate(server, stack, self.flat_seats, weights, losses, key)
        self.verdicts.append(found)
        return server

    def replace(self, personal: Stack, federated: Stack, indicator: Array) -> Stack:
        """Equation 4; `indicator` bool [P, O]. `personal` is consumed."""
        allowed = self.engine._replaceable[np.maximum(self.clients, 0)]
        return self.engine._replace(personal, federated, self.flat_seats, indicator, allowed)

    @functools.cached_property
    def held_out_plan(self) -> Plan:
        """All held-out samples of the clients as one minibatch, on the devices.

        Raises:
          UserError: nothing is held out.
        """
        return self.engine.probes.held_out_plan(self)

    def held_out_loss(self, stack: Stack) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.held_out_loss(self, stack)

    def task_gradient(self, stack: Stack, task: Task) -> Stack:
        """See `methods.base.Cohort`."""
        return self.engine.probes.task_gradient(self, stack, task)

    def similarity(self, stack: Stack, other: Stack) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.similarity(self, stack, other)

    def inner(self, stack: Stack, other: Stack) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.inner(self, stack, other)


def keeps_place(rule: LocalRule, stack: int) -> bool:
    """`Cohort.keeps_place`, for stacks of so many bytes on a device."""
    return rule.guided and (not rule.also_alone or stack <= PLACE_KEPT)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static capacities of a shard: positions K, group -> slots G, family -> rows N of each shape."""

    positions: int
    slots: Mapping[str, int]
    rows: Mapping[str, tuple[int, ...]]


def shape_of(
    data: Sequence[ClientData],
    families: Sequence[Family],
    shapes: Mapping[str, Sequence[RowShape]],
    partition: Partition,
    settings: EngineSettings,
    devices: Devices,
    clients: int,
) -> Shape:
    """Capacities for any so many of the federation's clients at once.

    Args:
      data: of all clients.
      shapes: family -> shapes of its rows.
      clients: how many train together.
    """
    positions = -(-clients // devices.shards)
    rows = capacities(data, families, shapes, positions=positions, batch=settings.batch, multiple=devices.parts)
    return Shape(positions, partition.capacities(partition.owned, positions), rows)
