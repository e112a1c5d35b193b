"""Clients that train together: host plans and compiled operations on their stacks.

`Engine` holds what does not change during a run (model, data on the device, compiled programs); `Engine.cohort`
makes the object that methods compose (`methods.base.Cohort`). Everything a cohort returns stays on the device
until somebody reads it.

Letters: D shards (devices), K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a group.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax import blocks
from tap_jax.blocks import Blocks, Partition, Seats, Stack, Tree
from tap_jax.data.families import families, offsets
from tap_jax.data.sampling import PURPOSES, ClientData, Plan, capacities, draw_plan, share_out
from tap_jax.data.store import stored
from tap_jax.engine import parallel
from tap_jax.engine.local_training import Losses, TrainingSettings, local_training
from tap_jax.engine.objective import Objective, Part, SampleLoss, part_table
from tap_jax.engine.parallel import CLIENTS, ROWS, SHARED, Devices
from tap_jax.engine.privacy import Privacy, expected_owners, private_aggregate
from tap_jax.engine.probes import Probes
from tap_jax.engine.programs import Program, abstract
from tap_jax.engine.screening import Screening, Verdicts, screen, update_norms
from tap_jax.federation import Task
from tap_jax.methods.base import LocalRule

# Phase -> the phase with whose optimizer states it goes on, where they persist; the others go on with their own.
CONTINUES = {"post": "federated", "post_again": "post", "distil": "personal"}
_DRAWING = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How local training runs.

    Attributes:
      cohort_size, clients_per_pass: clients in a round, and at once in phases over all clients.
      batch: samples per iteration. local_steps: τ. post_steps: P.
      microbatch: s, samples of a row. rows_per_chunk: v, rows side by side. training: static choices of the program.
      persist: a client goes on with its optimizer states instead of starting every local training afresh.
      rate: round -> learning rate. post_rate: learning rate after the last round.
      aggregation: "samples" or "uniform".
      scope: of a replacement, see `Partition.replaceable`.
      seed: of every draw.
      screening: of the clients' updates. privacy: of the aggregate; None: it is exact.
    """

    cohort_size: int
    clients_per_pass: int
    batch: int
    local_steps: int
    post_steps: int
    microbatch: int
    rows_per_chunk: int
    training: TrainingSettings
    persist: bool
    rate: Callable[[int], float]
    post_rate: float
    aggregation: str
    scope: str
    seed: int
    screening: Screening = Screening()
    privacy: Privacy | None = None


class Finished(NamedTuple):
    """What a model's blocks are like: shapes by name, and family -> what a forward pass takes of them."""

    model: Any
    like: Blocks
    tables: Mapping[str, Mapping[str, Part]]


class Engine:
    """The compiled side of a run.

    Args:
      model: `models.ServerModel` (or anything with its `roles`, `streams`, `tasks`).
      partition: the federation's blocks.
      frozen: Ŵ, host or device arrays; one copy is put on every device.
      arrays: task -> training set (`data.text.TaskArrays`).
      data: one `ClientData` per client. held_out: likewise, samples that nobody trains on.
      sample_loss: see `objective`. rule: how clients train.
      like: shapes of every block by name, private ones too.
      finished: what the blocks of finished models are of, see `Finished`; default: of `model`.
      devices: where everything runs.
    """

    def __init__(
        self,
        model,
        partition: Partition,
        *,
        frozen: Tree,
        arrays: Mapping,
        like: Blocks,
        finished: tuple[Any, Blocks] | None = None,
        data: Sequence[ClientData],
        held_out: Sequence[ClientData] = (),
        sample_loss: SampleLoss,
        rule: LocalRule,
        settings: EngineSettings,
        devices: Devices,
    ):
        self.model, self.partition, self.settings, self.devices = model, partition, settings, devices
        self.data, self.held_out, self.rule = tuple(data), tuple(held_out), rule
        self.tasks: tuple[Task, ...] = model.tasks
        self.shared, self.by_client, self.by_row = map(devices.sharding, (SHARED, CLIENTS, ROWS))
        self.frozen = devices.put(frozen, SHARED)
        self.families = families(self.tasks, arrays)
        self.starts = {name: at for family in self.families for name, at in offsets(family, arrays).items()}
        self.arrays = devices.put(stored(self.families, arrays), SHARED)
        self.server_seats = blocks.server_seats(partition)
        self.like = like
        self.moments_like = {
            name: jax.ShapeDtypeStruct((1 + 2 * blocks.count(tree),), np.float32) for name, tree in self.like.items()
        }
        self.finished = self._tabled(*(finished or (model, like)))
        tables = self._tabled(model, like).tables
        self.objective = Objective(
            sample_loss, self.tasks, self.families, tables, settings.rows_per_chunk, rule, devices.sum_axis
        )
        self.probes = Probes(self)
        mine = [[task for task, has in zip(self.tasks, row, strict=True) if has] for row in partition.task_mask]
        self._lead = frozenset(k for k, found in enumerate(mine) if rule.coupled(found))
        self._blank: dict[tuple, Stack] = {}
        self._begins: str | None = None  # the purpose that a round's first training had
        self._ahead: dict[tuple, concurrent.futures.Future] = {}
        self._replaceable = partition.replaceable(settings.scope)
        self._work = [
            sum(-(-min(settings.batch, len(ids)) // settings.microbatch) for ids in client.streams.values())
            for client in self.data
        ]
        self.shape_of: Callable[[int], _Shape] = functools.cache(
            lambda clients: _shape(self.data, self.families, partition, settings, devices, clients)
        )
        # (frozen, data, stack, moments, aid, seats, plan, rate, key); the stack is donated. The moments are not: two
        # phases may start from the same ones.
        specs = (SHARED, SHARED, CLIENTS, CLIENTS, CLIENTS, CLIENTS, ROWS, SHARED, SHARED)
        self._train = Program(
            functools.partial(_train, devices.over(local_training(self.objective, settings.training), specs)),
            donate_argnums=(2,),
            out_shardings=(self.by_client, self.by_client, self.shared),
        )
        self._broadcast = jax.jit(functools.partial(_broadcast, self.server_seats), out_shardings=self.by_client)
        expected = expected_owners(partition.owned, partition.sent, settings.cohort_size)
        aggregate = functools.partial(_aggregate, settings.screening, settings.privacy, expected, self.server_seats)
        self._aggregate = jax.jit(aggregate, out_shardings=self.shared)
        self._replace = jax.jit(_replace, donate_argnums=(0,), out_shardings=self.by_client)

    def _tabled(self, model, like: Blocks) -> "Finished":
        tables = {f.name: part_table(f, model.roles, self.partition, like) for f in self.families}
        return Finished(model, like, tables)

    def cohort(self, clients: Sequence[int], round_: int, moments: Mapping | None = None) -> "Cohort":
        """The clients of round `round_` (0-based); `moments` as in `State`, where optimizer states persist."""
        return Cohort(self, clients, round_, size=self.settings.cohort_size, moments=moments)

    def draw_ahead(self, clients: Sequence[int], round_: int) -> None:
        """Draws the plan with which a round of these clients will begin, beside what runs now.

        It is taken to begin as the last one did. A plan is a function of (seed, round, purpose, clients), so whether it
        was drawn ahead changes nothing.
        """
        if self._begins is not None:
            drawn = _DRAWING.submit(
                lambda purpose: self.cohort(clients, round_).plan(purpose, post=False), self._begins
            )
            kept = {key: plan for key, plan in self._ahead.items() if key[0] == round_ - 1}
            self._ahead = kept | {(round_, self._begins, tuple(clients)): drawn}

    def passes(self, round_: int, moments: Mapping | None = None) -> list["Cohort"]:
        """All clients, `clients_per_pass` at a time."""
        size, everyone = self.settings.clients_per_pass, range(len(self.data))
        return [Cohort(self, everyone[i : i + size], round_, size=size, moments=moments) for i in everyone[::size]]

    def _nobody(self, shapes: Stack) -> Stack:
        """Stands in for a teacher where there is none; never read, made once per shape."""
        key = tuple((group, shape.shape) for group, shape in shapes.items())
        if key not in self._blank:
            zeros = {group: np.zeros(shape.shape, shape.dtype) for group, shape in shapes.items()}
            self._blank[key] = self.devices.put(zeros, CLIENTS)
        return self._blank[key]

    def placed(self, plan: Plan) -> Plan:
        """A plan of all shards, leaves [D, ...], on the devices that run its rows, leaves [D, E, ...]."""
        return self.devices.put(share_out(plan, self.devices.parts), ROWS)

    def server_stack(self, server: Blocks) -> Stack:
        """The server's blocks by name -> on the device."""
        packed = blocks.pack(self.partition, self.server_seats, [server], self.like)
        return self.devices.put(packed, SHARED)

    def server_blocks(self, server: Stack) -> Blocks:
        """The inverse of `server_stack`, on the host."""
        return blocks.unpack(self.partition, self.server_seats, server, self.like)[0]


class Cohort:
    """See `methods.base.Cohort`; made by `Engine.cohort` and `Engine.passes`."""

    def __init__(
        self, engine: Engine, clients: Sequence[int], round_: int, *, size: int, moments: Mapping | None = None
    ):
        self.engine, self.round = engine, round_
        self._before, self._moments = moments or {}, {}
        self._given, self._trained = tuple(clients), False
        self.verdicts: list[Verdicts] = []
        self.shape = engine.shape_of(size)
        table = parallel.deal(
            clients,
            [engine._work[k] for k in clients],
            shards=engine.devices.shards,
            positions=self.shape.positions,
        )
        self.clients = table.reshape(-1)
        owned = engine.partition.owned[table] & (table >= 0)[..., None]
        shards = [blocks.seat(engine.partition, mine, self.shape.slots) for mine in owned]
        self.positions = self.shape.positions
        self.table, self._owned = table, owned.reshape(len(self.clients), -1)
        self.seats: Seats = engine.devices.put(jax.tree.map(lambda *x: np.stack(x), *shards), CLIENTS)
        self.flat_seats: Seats = _flatten_seats(shards)

    def broadcast(self, server: Stack) -> Stack:
        """W̃[i] for every client, [D, G, n]."""
        return self.engine._broadcast(server, self.seats)

    def load(
        self,
        chain: Sequence[Blocks] | Mapping[int, Blocks],
        rest: Stack | None = None,
        like: Blocks | None = None,
    ) -> Stack:
        """The clients' blocks from host memory, [D, G, n]; where the chain is of private blocks, with those of `rest`.

        Args:
          like: shapes of the blocks, where they are not those that are trained.
        """
        return {**(rest or {}), **self._put(chain, self.engine.like if like is None else like)}

    def _put(self, chain: Sequence[Blocks] | Mapping[int, Blocks], like: Blocks) -> Stack:
        holders = [chain[k] if k >= 0 else {} for k in self.clients]
        kinds = {name.startswith(blocks.PRIVATE) for mine in holders for name in mine}
        like = {name: shapes for name, shapes in like.items() if name.startswith(blocks.PRIVATE) in kinds}
        flat = blocks.pack(self.engine.partition, self.flat_seats, holders, like)
        shards = len(self.table)
        split = jax.tree.map(lambda leaf: leaf.reshape(shards, -1, *leaf.shape[1:]), flat)
        return self.engine.devices.put(split, CLIENTS)

    def unload(self, stack: Stack) -> dict[int, Blocks]:
        """Client number -> its blocks, in host memory."""
        return self._fetch(stack, self.engine.like)

    def moments(self) -> dict[str, dict[int, Blocks]]:
        """Chain -> client number -> optimizer state by block, of the chains trained in this round."""
        trained = [(chain, self._moments[chain]) for chain in self._before if chain in self._moments]
        return {chain: self._fetch(stack, self.engine.moments_like) for chain, stack in trained}

    def _fetch(self, stack: Stack, like: Blocks) -> dict[int, Blocks]:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.engine.devices.fetch(dict(stack)))
        held = blocks.unpack(self.engine.partition, self.flat_seats, flat, like)
        return {int(k): mine for k, mine in zip(self.clients, held, strict=True) if k >= 0}

    def plan(self, purpose: str, *, post: bool, without: Collection[int] = ()) -> Plan:
        """The draws of this (seed, round, purpose), rows [D, draws, τ, ...]; numpy.

        Args:
          without: positions that take no step.
        """
        settings, engine = self.engine.settings, self.engine
        left_out = np.isin(np.arange(self.clients.size), list(without)).reshape(self.table.shape)
        table = np.where(left_out, -1, self.table)

        def one(clients, draw):
            return draw_plan(
                engine.data,
                clients,
                engine.families,
                seed=settings.seed,
                round_=self.round,
                purpose=purpose,
                batch=settings.batch,
                microbatch=settings.microbatch,
                steps=settings.post_steps if post else settings.local_steps,
                capacities=self.shape.rows,
                starts=engine.starts,
                length=max(settings.post_steps, settings.local_steps),
                passes=None if post else 1,
                draw=draw,
                lead=engine._lead,
            )

        shards = []
        for clients in table:
            drawn = [one(clients, draw) for draw in range(engine.rule.draws)]
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
    ) -> tuple[Stack, Losses]:
        """Local training -> (stack, `Losses` [P, O]); see `methods.base.Cohort`."""
        engine, settings = self.engine, self.engine.settings
        key = jax.random.fold_in(jax.random.key(settings.seed), self.round)
        key = jax.random.fold_in(key, PURPOSES.index(purpose))
        rate = np.float32(settings.post_rate if post else settings.rate(self.round))
        plan = self._drawn(purpose, post, idle)
        if steps is not None:
            plan = plan.replace(first=np.full_like(plan.first, steps[0]), steps=np.minimum(plan.steps, steps[1]))
        plan = engine.placed(plan)
        rate, key = engine.devices.put((rate, key), SHARED)
        aid, moments = self._aid(teacher), self._remembered(purpose, chain, steps is not None and steps[0] > 0)
        stack, after, losses = engine._train(
            engine.frozen, engine.arrays, stack, moments, aid, self.seats, plan, rate, key
        )
        if settings.persist or steps is not None:
            self._moments[purpose if post else chain or purpose] = after
        return stack, losses

    def _drawn(self, purpose: str, post: bool, idle: np.ndarray | None) -> Plan:
        """The plan, drawn ahead or now."""
        engine = self.engine
        if not (self._trained or post):
            engine._begins = purpose
        self._trained = True
        ahead = engine._ahead.pop((self.round, purpose, self._given), None)
        if ahead and not post and idle is None:
            return ahead.result()
        return self.plan(purpose, post=post, without=() if idle is None else np.flatnonzero(idle))

    def _remembered(self, purpose: str, chain: str | None, again: bool) -> Stack | None:
        """The optimizer states with which a phase goes on, or None where no phase does."""
        if not self.engine.settings.training.remember:
            return None
        if again:
            return self._moments[purpose]
        before = chain or CONTINUES.get(purpose, purpose)
        if self.engine.settings.persist and before in self._moments:
            return self._moments[before]
        if self.engine.settings.persist and before in self._before:
            return self._put(self._before[before], self.engine.moments_like)
        return self.engine._nobody(self.abstract_stack(self.engine.moments_like))

    def _aid(self, teacher: Stack | None):
        """A teacher's stack and whether it is one, per shard: one program serves training and distillation."""
        engine = self.engine
        if not engine.rule.guided:
            if teacher is not None:
                raise ValueError("the method's rule takes no teacher")
            return None
        flag = engine.devices.put(np.full(len(self.table), teacher is not None), CLIENTS)
        return flag, engine._nobody(self.abstract_stack()) if teacher is None else teacher

    def prepare(self) -> None:
        """Starts compiling `train` in the background."""
        engine = self.engine
        stack = self.abstract_stack()
        flag = abstract(np.zeros(len(self.table), bool), engine.by_client)
        engine._train.prepare(
            *abstract((engine.frozen, engine.arrays), engine.shared),
            stack,
            self.abstract_stack(engine.moments_like) if engine.settings.training.remember else None,
            (flag, stack) if engine.rule.guided else None,
            abstract(self.seats, engine.by_client),
            abstract(share_out(self.plan(PURPOSES[-1], post=True), engine.devices.parts), engine.by_row),
            *abstract((np.float32(0), jax.random.key(0)), engine.shared),
        )

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
        """
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
        """All held-out samples of the clients as one minibatch, on the devices."""
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


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static capacities of a shard: positions K, group -> slots G, family -> rows N."""

    positions: int
    slots: Mapping[str, int]
    rows: Mapping[str, int]


def _shape(data, families, partition, settings: EngineSettings, devices: Devices, clients: int) -> _Shape:
    positions = -(-clients // devices.shards)
    rows = capacities(
        data,
        families,
        positions=positions,
        batch=settings.batch,
        microbatch=settings.microbatch,
        multiple=settings.rows_per_chunk * devices.parts,
    )
    return _Shape(positions, partition.capacities(partition.owned, positions), rows)


def _flatten_seats(shards: Sequence[Seats]) -> Seats:
    """One `Seats` over all P positions for stacks whose shard axis is flattened, [D·G, n]; numpy."""
    positions = len(shards[0].slot)
    total = positions * len(shards)

    def flat(group):
        parts = [
            np.where(shard.client[group] < positions, shard.client[group] + number * positions, total)
            for number, shard in enumerate(shards)
        ]
        return np.concatenate(parts).astype(np.int32)

    return Seats(
        np.concatenate([shard.slot for shard in shards]),
        {group: flat(group) for group in shards[0].client},
        {group: np.concatenate([shard.block[group] for shard in shards]) for group in shards[0].block},
    )


def _flat(stack: Stack) -> Stack:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stack)


def _train(sharded, *args):
    stack, moments, losses = sharded(*args)
    return stack, moments, _flat_losses(losses)


def _flat_losses(losses: Losses) -> Losses:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), losses)


def _broadcast(server_seats: Seats, server: Stack, seats: Seats) -> Stack:
    return blocks.broadcast(server, server_seats, seats)


def _aggregate(
    screening: Screening,
    privacy: Privacy | None,
    expected: np.ndarray,
    server_seats: Seats,
    server: Stack,
    stack: Stack,
    seats: Seats,
    weights: Array,
    losses: Losses,
    key: Array | None,
) -> tuple[Stack, Verdicts]:
    stack, sent = _flat(stack), weights > 0
    norm = update_norms(server, stack, server_seats, seats, sent) if screening.max_norm or privacy else None
    heard, found = screen(stack, seats, sent, losses, norm, screening.max_norm)
    if privacy is None:
        weights = jnp.where(heard[:, None], weights, 0)
        return blocks.aggregate(server, stack, server_seats, seats, weights), found
    sent = sent & heard[:, None]
    after = private_aggregate(
        server, stack, server_seats, seats, sent, norm, expected=expected, privacy=privacy, key=key
    )
    return after, found


def _replace(personal: Stack, federated: Stack, seats: Seats, indicator: Array, replaceable: Array) -> Stack:
    chosen = blocks.chosen_blocks(indicator, replaceable)
    out = blocks.replace(_flat(personal), _flat(federated), seats, chosen)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), out, dict(personal))
