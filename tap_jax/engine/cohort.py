"""Clients that train together: what methods compose (`methods.base.Cohort`).

A cohort is data: which clients, of which rounds, where. What a training leaves is in what it returns.

Plans are drawn on the host; everything else a cohort returns stays on the device until it is read.

Letters: D shards, K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a shape class.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax import blocks
from tap_jax.blocks import Blocks
from tap_jax.data.sampling import PHASES, Plan, share_out
from tap_jax.engine import moments, packed
from tap_jax.engine.engine import Engine, PhaseInputs, Shape
from tap_jax.engine.local_training import Losses
from tap_jax.engine.packed import Layout, Packed, flatten_layouts
from tap_jax.engine.parallel import CLIENTS, SHARED
from tap_jax.engine.programs import abstract
from tap_jax.engine.transfer import Transfer
from tap_jax.errors import UserError
from tap_jax.methods import base
from tap_jax.methods.base import ClientModels, LocalRule, State
from tap_jax.tasks import Task

# Phase -> the phase with whose optimizer states it goes on, where they persist; the others go on with their own.
CONTINUES = {"post": "federated", "distil": "personal"}
# Bytes of a device's parameters up to which a place is kept for a teacher where there is none, so that one program
# serves every phase; beyond, a rule that does without has a second program for these phases.
TEACHER_RESERVED = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """See `methods.base.Cohort`; `Cohort.of` makes one.

    Attributes:
      engine: what trains them.
      shape: capacities of a shard.
      table: int [D, K], client numbers, -1 at an empty position. rounds: int [D, K], of each position (0-based).
      shard_layouts: where the blocks of each shard's clients lie.
      drawn: phase -> its plan (without `post`), drawn in the background.
    """

    engine: Engine
    shape: Shape
    table: np.ndarray
    rounds: np.ndarray
    shard_layouts: tuple[Layout, ...]
    drawn: Mapping[str, "Future[Plan]"]

    @classmethod
    def of(
        cls,
        engine: Engine,
        clients: Sequence[int],
        round_: int | Sequence[int],
        *,
        size: int | None = None,
        drawn: Mapping[str, "Future[Plan]"] | None = None,
    ) -> "Cohort":
        """The clients of round `round_` (0-based).

        Args:
          clients: all different.
          round_: one for all, or each client's own.
          size: how many clients there is room for; default: as many as a round has, or a window where they are more.
          drawn: plans that are drawn already, or are about to be.
        """
        settings = engine.settings
        if size is None:
            small = len(clients) <= settings.cohort_size
            size = settings.cohort_size if small else settings.window_clients(len(engine.data))
        shape = engine.shape_of(size)
        table = engine.plans.deal(clients, shape.positions)
        rounds = np.full(table.shape, np.min(round_))
        for client, number in zip(clients, np.broadcast_to(round_, len(clients)), strict=True):
            rounds[table == client] = number
        owned = engine.partition.owned[table] & (table >= 0)[..., None]
        layouts = tuple(packed.lay_out(engine.partition, mine, shape.slots) for mine in owned)
        return cls(engine, shape, table, rounds, layouts, drawn or {})

    @property
    def clients(self) -> np.ndarray:
        """int [P], client numbers, -1 at an empty position."""
        return self.table.reshape(-1)

    @property
    def positions(self) -> int:
        """K."""
        return self.shape.positions

    @property
    def round(self) -> int:
        """The one round of all clients.

        Raises:
          ValueError: they are of several, as those that train together at the end of a window.
        """
        first, *others = np.unique(self.rounds).tolist()
        if others:
            raise ValueError("clients of several rounds have no aggregate")
        return first

    @functools.cached_property
    def layout(self) -> Layout:
        """`shard_layouts` on the devices, leaves [D, ...]."""
        return self.engine.devices.put(jax.tree.map(lambda *x: np.stack(x), *self.shard_layouts), CLIENTS)

    @functools.cached_property
    def flat_layout(self) -> Layout:
        """Of all shards together."""
        return flatten_layouts(self.shard_layouts)

    @functools.cached_property
    def transfer(self) -> Transfer:
        """The way of the clients' blocks between host and devices."""
        return Transfer(self.engine, self.table, self.shard_layouts)

    def broadcast(self, server: Packed) -> Packed:
        """W̃[i] for every client, [D, G, n]."""
        return self.engine.broadcast(server, self.layout)

    def load(
        self,
        models: ClientModels | Mapping[int, Blocks],
        rest: Packed | None = None,
        like: Blocks | None = None,
    ) -> Packed:
        """The clients' blocks from host memory or disk, [D, G, n], beside what else there is of `rest`.

        Args:
          like: shapes of the blocks, where they are not those that clients keep.
        """
        return {**(rest or {}), **self.transfer.upload(models, self._kept if like is None else like)}

    def put(self, models: ClientModels, params: Packed) -> ClientModels:
        """The models with the cohort's blocks exchanged for those of `params`."""
        return self.transfer.exchanged(models, params, self._kept)

    def unload(self, params: Packed) -> dict[int, Blocks]:
        """Client number -> its blocks, in host memory; of several processes in that of each."""
        return self.transfer.download(params, self.engine.like)

    @property
    def _kept(self) -> Blocks:
        return blocks.select(self.engine.like, self.engine.partition.kept)

    def train(
        self,
        state: State,
        params: Packed,
        phase: str,
        *,
        model: str | None = None,
        post: bool = False,
        twice: bool = False,
        teacher: Packed | None = None,
    ) -> tuple[State, Packed, Losses]:
        """Local training -> (state, params, `Losses` [P, O]); see `methods.base.Cohort`."""
        inputs, name = self.inputs(phase, post=post, twice=twice), model or phase
        opt_state = self.opt_state(state, phase, model=model) if self.engine.settings.persist else None
        params, opt_state, losses = self._train(params, opt_state, teacher, inputs)
        if name in state.moments and not post:
            after = moments.after_training(state.moments[name], self.transfer, opt_state)
            state = state.replace(moments={**state.moments, name: after})
        return state, params, losses

    def train_steps(
        self,
        params: Packed,
        opt_state: Packed | None,
        phase: str,
        steps: tuple[int, int],
        *,
        post: bool = False,
        teacher: Packed | None = None,
        idle: np.ndarray | None = None,
    ) -> tuple[Packed, Packed | None, Losses]:
        """Some steps of a local training -> (params, optimizer states, losses); see `methods.base.Cohort`."""
        inputs = self.inputs(phase, post=post, idle=idle)
        first, last = np.full_like(inputs.plan.first, steps[0]), np.minimum(inputs.plan.steps, steps[1])
        inputs = inputs._replace(plan=inputs.plan.replace(first=first, steps=last))
        return self._train(params, opt_state, teacher, inputs)

    def _train(
        self, params: Packed, opt_state: Packed | None, teacher: Packed | None, inputs: PhaseInputs
    ) -> tuple[Packed, Packed | None, Losses]:
        return self.engine.train(params, opt_state, self._teacher(teacher), self.layout, inputs)

    def opt_state(self, state: State, phase: str, *, model: str | None = None) -> Packed:
        """The optimizer states with which a phase begins, [D, G, 1 + 2n]; see `methods.base.Cohort`."""
        found = state.moments.get(model or CONTINUES.get(phase, phase))
        if found is None:
            return self.engine.blank_params(self.abstract_params(self.engine.moments_like))
        return moments.for_training(found, self.transfer)

    def plan(self, phase: str, *, post: bool, twice: bool = False, without: Collection[int] = ()) -> Plan:
        """The minibatches of this (seed, round, phase), see `Plans.training`."""
        training = self.engine.plans.training
        return training(self.table, self.rounds, phase, post=post, twice=twice, without=without)

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
        if phase in self.drawn and not post and idle is None:
            plan = self.drawn[phase].result()
        else:
            without = () if idle is None else np.flatnonzero(idle)
            plan = self.plan(phase, post=post, twice=twice, without=without)
        return PhaseInputs(share_out(plan, self.engine.devices.per_shard), rate, key)

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

    def abstract_params(self, like: Blocks | None = None) -> Packed:
        """The shapes of the cohort's parameters, of blocks or of what else has a vector per block."""
        like = self.engine.like if like is None else like
        members, found = packed.members(self.engine.partition), {}
        for name, (first, *_) in members.items():
            if (block := self.engine.partition.names[first]) in like:
                size = len(self.table), self.shape.slots[name], blocks.count(like[block])
                found[name] = jax.ShapeDtypeStruct(size, jnp.float32)
        return abstract(found, self.engine.by_client)

    def aggregate(self, state: State, params: Packed, losses: base.Losses) -> State:
        """Component-wise FedAvg (Sec. 3.1), weighted by |D_i| or uniformly; or with noise, see `engine.privacy`.

        A block is averaged over the clients with samples on its paths (`engine.sends`).

        Returns:
          The state with the server's new blocks, and with what screening found added to `verdicts`.

        Raises:
          ValueError: the clients are of several rounds, or privacy is accounted for already.
        """
        settings, round_ = self.engine.settings, self.round
        samples = np.array([self.engine.data[k].samples if k >= 0 else 0 for k in self.clients], np.float32)
        if settings.aggregation == "uniform":
            samples = (samples > 0).astype(np.float32)
        sends = self.engine.sends[self.clients] & (self.clients >= 0)[:, None]
        weights = np.where(sends, samples[:, None], 0).astype(np.float32)
        key = None
        if settings.privacy:
            if state.verdicts:
                raise ValueError("privacy is accounted for one aggregation a round; this is a second one")
            key = jax.random.fold_in(jax.random.key(settings.seed), round_)
            key = self.engine.devices.put(jax.random.fold_in(key, PHASES.index("noise")), SHARED)
        server, found = self.engine.aggregate(state.server, params, self.flat_layout, weights, losses, key)
        return state.replace(server=server, verdicts=(*state.verdicts, found))

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
        if not any(mine.streams for mine in self.engine.held_out):
            raise UserError("data.held_out: 0 leaves nothing to look at; hold out a part such as 0.1")
        return self.engine.placed(self.engine.plans.all_held_out(self.table))

    def held_out_loss(self, params: Packed) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.mean_loss(*self._probed((params,), self.held_out_plan))

    def similarity(self, params: Packed, other: Packed) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.mean_cosine(*self._probed((params, other), self.held_out_plan))

    def task_gradient(self, params: Packed, task: Task) -> Packed:
        """See `methods.base.Cohort`."""
        streams = {stream.name for stream in task.streams}
        plan = self.engine.placed(self.engine.plans.probe(self.table, self.rounds, streams))
        return self.engine.probes.gradient(*self._probed(params, plan))

    def inner(self, params: Packed, other: Packed) -> Array:
        """See `methods.base.Cohort`."""
        return self.engine.probes.inner(params, other, self.flat_layout)

    def _probed(self, models: Packed | tuple[Packed, ...], plan: Plan) -> tuple:
        return self.engine.frozen, self.engine.arrays, models, self.layout, plan


def cohort_of_round(engine: Engine, round_: int, first_phase: str) -> Cohort:
    """The clients drawn for a round.

    The plans with which this round and the next one begin are drawn in the background, unless they have been.

    Args:
      first_phase: in which their first training is.
    """
    plan, _ = [engine.plans.ahead(t, first_phase) for t in (round_, round_ + 1)]
    return Cohort.of(engine, engine.plans.clients(round_), round_, drawn={first_phase: plan})


def client_batches(engine: Engine, round_: int) -> list[Cohort]:
    """All clients, `clients_at_once` at a time."""
    size, everyone = engine.settings.clients_at_once, range(len(engine.data))
    return [Cohort.of(engine, everyone[i : i + size], round_, size=size) for i in everyone[::size]]


def reserves_teacher(rule: LocalRule, params: int) -> bool:
    """`Cohort.reserves_teacher`, for parameters of so many bytes on a device."""
    return rule.takes_teacher and (not rule.teacher_optional or params <= TEACHER_RESERVED)
