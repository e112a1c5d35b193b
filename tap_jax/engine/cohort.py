"""Clients that train together: what methods compose (`methods.base.Cohort`).

Plans are drawn on the host; everything else a cohort returns stays on the device until it is read.

Letters: D shards (devices), K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a shape class.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax import blocks
from tap_jax.blocks import Blocks
from tap_jax.data.sampling import PHASES, ClientData, Plan, draw_plan, share_out
from tap_jax.engine import packed, parallel
from tap_jax.engine.compiled import Compiled, PhaseInputs
from tap_jax.engine.local_training import Losses
from tap_jax.engine.packed import Layout, Packed, flatten_layouts
from tap_jax.engine.parallel import CLIENTS, SHARED
from tap_jax.engine.programs import abstract
from tap_jax.engine.screening import Verdicts
from tap_jax.errors import UserError
from tap_jax.methods.base import ClientModels, LocalRule, put_models
from tap_jax.tasks import Task

# Phase -> the phase with whose optimizer states it goes on, where they persist; the others go on with their own.
CONTINUES = {"post": "federated", "distil": "personal"}
# Bytes of a device's parameters up to which a place is kept for a teacher where there is none, so that one program
# serves every phase; beyond, a rule that does without has a second program for these phases.
TEACHER_RESERVED = 2**28


class Cohort:
    """See `methods.base.Cohort`; made by `Engine.cohort` and `Engine.client_batches`."""

    def __init__(
        self,
        engine: Compiled,
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
            [engine.work[k] for k in clients],
            shards=engine.devices.shards,
            positions=self.shape.positions,
        )
        self.clients = table.reshape(-1)
        self.rounds = np.full(table.shape, round_ if self.of_one_round else min(round_))
        if not self.of_one_round:
            for client, number in zip(clients, round_, strict=True):
                self.rounds[table == client] = number
        owned = engine.partition.owned[table] & (table >= 0)[..., None]
        self.shard_layouts = [packed.lay_out(engine.partition, mine, self.shape.slots) for mine in owned]
        self.positions = self.shape.positions
        self.table = table
        self.layout: Layout = engine.devices.put(jax.tree.map(lambda *x: np.stack(x), *self.shard_layouts), CLIENTS)
        self.flat_layout: Layout = flatten_layouts(self.shard_layouts)

    @property
    def of_one_round(self) -> bool:
        """Whether all clients are of the same round, as but in windows they are."""
        return np.ndim(self.round) == 0

    def broadcast(self, server: Packed) -> Packed:
        """W̃[i] for every client, [D, G, n]."""
        return self.engine.broadcast(server, self.layout)

    def load(
        self,
        models: Sequence[Blocks] | Mapping[int, Blocks],
        rest: Packed | None = None,
        like: Blocks | None = None,
    ) -> Packed:
        """The clients' blocks from host memory or disk, [D, G, n], beside what else there is of `rest`.

        Of several processes each reads those of its own devices.

        Args:
          like: shapes of the blocks, where they are not those that clients keep.
        """
        return {**(rest or {}), **self._put(models, self._kept if like is None else like)}

    def _put(self, models: Sequence[Blocks] | Mapping[int, Blocks], like: Blocks) -> Packed:
        placed = {}
        for shard in self.engine.devices.reached:
            params = [models[k] if k >= 0 else {} for k in self.table[shard]]
            placed[shard] = packed.pack(self.engine.partition, self.shard_layouts[shard], params, like)
        return self.engine.devices.put_shards(placed)

    def put(self, models: ClientModels, params: Packed) -> ClientModels:
        """The models with the cohort's blocks exchanged for those of `params`."""
        return self._exchange(models, params, self._kept)

    def unload(self, params: Packed) -> dict[int, Blocks]:
        """Client number -> its blocks, in host memory; of several processes in that of each."""
        return self._all(params, self.engine.like)

    def moments(self) -> dict[str, ClientModels]:
        """The optimizer states that the cohort was given, those of what was trained in this round exchanged."""
        return {
            name: self._exchange(models, self._moments[name], self.engine.moments_like)
            if name in self._moments
            else models
            for name, models in self._before.items()
        }

    def _exchange(self, models: ClientModels, params: Packed, like: Blocks) -> ClientModels:
        members, names = packed.members(self.engine.partition), self.engine.partition.names
        params = {name: matrix for name, matrix in params.items() if names[members[name][0]] in like}
        if isinstance(models, tuple):  # in memory, where every process has all clients'
            return put_models(models, self._all(params, like))
        return put_models(models, self._by_client(self.engine.devices.fetch_shards(params), like))

    def _all(self, params: Packed, like: Blocks) -> dict[int, Blocks]:
        fetched = self.engine.devices.fetch(dict(params))
        shards = {shard: jax.tree.map(itemgetter(shard), fetched) for shard in range(len(self.table))}
        return self._by_client(shards, like)

    def _by_client(self, shards: Mapping[int, Packed], like: Blocks) -> dict[int, Blocks]:
        found = {}
        for shard, params in shards.items():
            held = packed.unpack(self.engine.partition, self.shard_layouts[shard], params, like)
            found |= {int(k): mine for k, mine in zip(self.table[shard], held, strict=True) if k >= 0}
        return found

    @property
    def _kept(self) -> Blocks:
        return blocks.select(self.engine.like, self.engine.partition.kept)

    def plan(self, phase: str, *, post: bool, twice: bool = False, without: Collection[int] = ()) -> Plan:
        """The minibatches of this (seed, round, phase), rows [D, minibatches_per_step, τ, ...]; numpy.

        Args:
          without: positions that take no step.
        """
        settings, engine = self.engine.settings, self.engine
        steps = settings.post_steps * (1 + twice) if post else settings.local_steps
        left_out = np.isin(np.arange(self.clients.size), list(without)).reshape(self.table.shape)
        table = np.where(left_out, -1, self.table)

        def one(clients, rounds, minibatch):
            return self._draw(
                engine.data,
                clients,
                rounds,
                phase=phase,
                batch=settings.batch,
                steps=steps,
                capacities=self.shape.rows,
                length=max(settings.longest, steps),
                epochs=None if post else 1,
                minibatch=minibatch,
                first_clients=engine.with_statistics,
            )

        shards = []
        for clients, rounds in zip(table, self.rounds, strict=True):
            drawn = [one(clients, rounds, minibatch) for minibatch in range(engine.rule.minibatches_per_step)]
            shards.append(drawn[0].replace(rows=jax.tree.map(lambda *x: np.stack(x), *(plan.rows for plan in drawn))))
        return jax.tree.map(lambda *x: np.stack(x), *shards)

    def _draw(self, data: Sequence[ClientData], clients: np.ndarray, rounds: np.ndarray, **how: Any) -> Plan:
        """The plan of one shard; `how`: the arguments of `draw_plan` in which phases differ."""
        engine = self.engine
        fixed = dict(seed=engine.settings.seed, round_=rounds, shapes=engine.shapes, starts=engine.starts)
        return draw_plan(data, clients, engine.task_groups, **fixed, **how)

    def train(
        self,
        params: Packed,
        phase: str,
        *,
        model: str | None = None,
        post: bool = False,
        twice: bool = False,
        teacher: Packed | None = None,
        steps: tuple[int, int] | None = None,
        idle: np.ndarray | None = None,
        goes_on: bool = True,
    ) -> tuple[Packed, Losses]:
        """Local training -> (params, `Losses` [P, O]); see `methods.base.Cohort`.

        Args:
          goes_on: a later call begins where `steps` end; else no optimizer states are kept for it.
        """
        engine, inputs = self.engine, self.inputs(phase, post=post, twice=twice, idle=idle)
        if not post and self.of_one_round and not self._trained:
            engine.begins, self._trained = phase, True
        if steps is not None:
            plan = inputs.plan
            first, last = np.full_like(plan.first, steps[0]), np.minimum(plan.steps, steps[1])
            inputs = inputs._replace(plan=plan.replace(first=first, steps=last))
        moments = self._remembered(phase, model, steps if goes_on else None)
        params, after, losses = engine.train(params, moments, self._teacher(teacher), self.layout, inputs)
        if after is not None:
            self._moments[phase if post else model or phase] = after
        return params, losses

    def inputs(
        self, phase: str, *, post: bool = False, twice: bool = False, idle: np.ndarray | None = None
    ) -> PhaseInputs:
        """A local training of this (seed, round, phase); its plan is drawn now, unless it has been."""
        settings = self.engine.settings
        if phase not in PHASES:
            raise ValueError(f"phase: unknown '{phase}'; use one of {', '.join(PHASES)}")
        seed, number = jax.random.key(settings.seed), PHASES.index(phase)
        rounds, place = np.unique(self.rounds, return_inverse=True)
        place = place.reshape(self.table.shape)
        key = jnp.stack([jax.random.fold_in(jax.random.fold_in(seed, t), number) for t in rounds.tolist()])[place]
        rates = [settings.post_rate if post else settings.rate(t) for t in rounds.tolist()]
        rate = np.array(rates, np.float32)[place]
        drawn = self.engine.drawn_ahead.pop((self.round, phase, self.given), None)
        if drawn and not post and idle is None:
            plan = drawn.result()
        else:
            without = () if idle is None else np.flatnonzero(idle)
            plan = self.plan(phase, post=post, twice=twice, without=without)
        plan = share_out(plan, self.engine.devices.per_shard)
        return PhaseInputs(plan, rate, key)

    def _remembered(self, phase: str, model: str | None, steps: tuple[int, int] | None) -> Packed | None:
        """The optimizer states with which a training goes on, or None where it starts afresh and leaves none."""
        if not self.engine.settings.persist and steps is None:
            return None
        if steps is not None and steps[0] > 0:
            return self._moments[phase]
        if self.engine.settings.persist:
            before = model or CONTINUES.get(phase, phase)
            if before in self._moments:
                return self._moments[before]
            if before in self._before:
                return self._put(self._before[before], self.engine.moments_like)
        return self.engine.blank_params(self.abstract_params(self.engine.moments_like))

    def _teacher(self, teacher: Packed | None):
        """A teacher's parameters and whether it is one, per shard: one program serves training and distillation."""
        engine = self.engine
        if not engine.rule.takes_teacher:
            if teacher is not None:
                raise ValueError("the method's rule takes no teacher")
            return None
        if teacher is None and not self.reserves_teacher:
            return None
        flag = engine.devices.put(np.full(len(self.table), teacher is not None), CLIENTS)
        return flag, engine.blank_params(self.abstract_params()) if teacher is None else teacher

    @property
    def reserves_teacher(self) -> bool:
        """Whether training takes parameters of a teacher even where there is none."""
        size = sum(4 * matrix.size for matrix in self.abstract_params().values()) // len(self.table)
        return reserves_teacher(self.engine.rule, size)

    def prepare(self, *, takes_teacher: bool = True) -> None:
        """Starts compiling `train` in the background.

        Args:
          takes_teacher: whether it will be given a teacher.
        """
        for args in self.training(takes_teacher=takes_teacher).values():
            self.engine.train_program.prepare(*args)

    def training(self, *, takes_teacher: bool = True) -> dict[tuple[bool, bool], tuple]:
        """What `train` is given, as shapes: (with a place for a teacher, with optimizer states) -> arguments.

        Args:
          takes_teacher: whether it will be given a teacher.
        """
        engine, settings = self.engine, self.engine.settings
        params = self.abstract_params()
        flag = abstract(np.zeros(len(self.table), bool), engine.by_client)
        moments = self.abstract_params(engine.moments_like)
        keys = jnp.broadcast_to(jax.random.key(0), self.table.shape)
        wanted = {(self.reserves_teacher, settings.persist)}
        if takes_teacher and engine.rule.takes_teacher:
            wanted.add((True, settings.persist or settings.in_pieces))
        found = {}
        for with_teacher, remember in sorted(wanted):
            found[with_teacher, remember] = (
                *abstract((engine.frozen, engine.arrays), engine.shared),
                params,
                moments if remember else None,
                (flag, params) if with_teacher else None,
                abstract(self.layout, engine.by_client),
                abstract(share_out(self.plan(PHASES[-1], post=True), engine.devices.per_shard), engine.by_row),
                *abstract((np.zeros(keys.shape, np.float32), keys), engine.by_client),
            )
        return found

    def abstract_params(self, like: Blocks | None = None) -> Packed:
        """The shapes of the cohort's parameters, of blocks or of what else has a vector per block."""
        like = self.engine.like if like is None else like
        members, found = packed.members(self.engine.partition), {}
        for name, (first, *_) in members.items():
            if (block := self.engine.partition.names[first]) in like:
                size = len(self.table), self.shape.slots[name], blocks.count(like[block])
                found[name] = jax.ShapeDtypeStruct(size, jnp.float32)
        return abstract(found, self.engine.by_client)

    def aggregate(self, server: Packed, params: Packed, losses: Losses) -> Packed:
        """Component-wise FedAvg (Sec. 3.1), weighted by |D_i| or uniformly; or with noise, see `engine.privacy`.

        A block is averaged over the clients with samples on its paths (`engine.sends`).

        What screening found is added to `verdicts`.

        Raises:
          ValueError: the clients are of several rounds, or privacy is accounted for already.
        """
        if not self.of_one_round:
            raise ValueError("clients of several rounds have no aggregate")
        samples = np.array([self.engine.data[k].samples if k >= 0 else 0 for k in self.clients], np.float32)
        if self.engine.settings.aggregation == "uniform":
            samples = (samples > 0).astype(np.float32)
        sends = self.engine.sends[self.clients] & (self.clients >= 0)[:, None]
        weights = np.where(sends, samples[:, None], 0).astype(np.float32)
        key = None
        if self.engine.settings.privacy:
            if self.verdicts:
                raise ValueError("privacy is accounted for one aggregation a round; this is a second one")
            key = jax.random.fold_in(jax.random.key(self.engine.settings.seed), self.round)
            key = self.engine.devices.put(jax.random.fold_in(key, PHASES.index("noise")), SHARED)
        server, found = self.engine.aggregate(server, params, self.flat_layout, weights, losses, key)
        self.verdicts.append(found)
        return server

    def replace(self, personal: Packed, federated: Packed, indicator: Array) -> Packed:
        """Equation 4; `indicator` bool [P, O]. `personal` is consumed."""
        allowed = self.engine.replaceable[np.maximum(self.clients, 0)]
        return self.engine.replace(personal, federated, self.flat_layout, indicator, allowed)

    @functools.cached_property
    def held_out_plan(self) -> Plan:
        """All held-out samples of the clients as one minibatch, on the devices.

        Raises:
          UserError: nothing is held out.
        """
        held = self.engine.held_out
        if not any(mine.streams for mine in held):
            raise UserError("data.held_out: 0 leaves nothing to look at; hold out a part such as 0.1")
        batch = max(mine.samples for mine in held)
        rows = self.engine.capacities(held, self.positions, batch)
        return self._minibatch(held, "held_out", np.zeros_like(self.rounds), batch, rows)

    def _minibatch(self, data: Sequence[ClientData], phase: str, rounds: np.ndarray, batch: int, rows: Mapping) -> Plan:
        """One minibatch of every client, on the devices; `rows`: `Compiled.capacities`."""
        shards = [
            self._draw(data, clients, of, phase=phase, batch=batch, capacities=rows, steps=1, epochs=None)
            for clients, of in zip(self.table, rounds, strict=True)
        ]
        shards = [plan.replace(rows=jax.tree.map(lambda leaf: leaf[None], plan.rows)) for plan in shards]
        return self.engine.placed(jax.tree.map(lambda *x: np.stack(x), *shards))

    def held_out_loss(self, params: Packed) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.mean_loss(*self._probed((params,), self.held_out_plan))

    def similarity(self, params: Packed, other: Packed) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.mean_cosine(*self._probed((params, other), self.held_out_plan))

    def task_gradient(self, params: Packed, task: Task) -> Packed:
        """See `methods.base.Cohort`."""
        names = {stream.name for stream in task.streams}
        data = [mine.only(names) for mine in self.engine.data]
        plan = self._minibatch(data, "probe", self.rounds, self.engine.settings.batch, self.shape.rows)
        return self.engine.probes.gradient(*self._probed(params, plan))

    def inner(self, params: Packed, other: Packed) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.inner(params, other, self.flat_layout)

    def _probed(self, models: Packed | tuple[Packed, ...], plan: Plan) -> tuple:
        return self.engine.frozen, self.engine.arrays, models, self.layout, plan


def reserves_teacher(rule: LocalRule, params: int) -> bool:
    """`Cohort.reserves_teacher`, for parameters of so many bytes on a device."""
    return rule.takes_teacher and (not rule.teacher_optional or params <= TEACHER_RESERVED)
