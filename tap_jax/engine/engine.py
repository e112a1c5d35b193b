"""The engine of a run: what does not change from round to round (model, data on the device, programs).

It knows of no cohort; `engine.cohort` makes these of it.

Letters: D shards, K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a shape class.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from tap_jax import blocks
from tap_jax.blocks import Blocks, Partition, Tree
from tap_jax.data.device_data import stored
from tap_jax.data.sampling import ClientData, Plan, row_shapes, share_out
from tap_jax.data.task_groups import offsets, task_groups
from tap_jax.engine import exchange, packed
from tap_jax.engine.local_training import Losses, local_training
from tap_jax.engine.objective import Objective, Part, SampleLoss, part_table
from tap_jax.engine.packed import Layout, Packed
from tap_jax.engine.parallel import CLIENTS, ROWS, SHARED, Devices
from tap_jax.engine.plans import Plans
from tap_jax.engine.privacy import expected_owners
from tap_jax.engine.probes import Probes
from tap_jax.engine.programs import Program
from tap_jax.engine.settings import EngineSettings
from tap_jax.methods.base import LocalRule
from tap_jax.tasks import Task


class BlockTables(NamedTuple):
    """What a model's blocks are like: shapes by name, and task group -> what a forward pass takes of them."""

    model: Any
    like: Blocks
    tables: Mapping[str, Mapping[str, Part]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static capacities of a shard: positions K, shape class -> slots G."""

    positions: int
    slots: Mapping[str, int]


class PhaseInputs(NamedTuple):
    """What a local training of a cohort is given.

    Attributes:
      plan: dealt out to the E devices of every shard, leaves [D, E, ...]; numpy.
      rate: float32 [D, K], numpy.
      key: of (seed, round, phase), [D, K].
    """

    plan: Plan
    rate: np.ndarray
    key: Array


class Engine:
    """The compiled side of a run. After construction none of its attributes changes.

    Args:
      model: `models.ServerModel` (or anything with its `roles`, `blocks_of`, `streams`, `tasks`).
      partition: the federation's blocks.
      frozen: Ŵ, host or device arrays; one copy is put on every device.
      arrays: task -> training set (`data.text.TaskArrays`).
      data: one `ClientData` per client. held_out: likewise, samples left out of training.
      sample_loss: see `objective`. rule: how clients train.
      like: shapes of every block by name, private ones too.
      finished: what the blocks of finished models are of, see `BlockTables`; default: of `model`.
      devices: where everything runs.
      labels: what files and reports call each client; default: its number.
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
        labels: Sequence[int | str] = (),
    ):
        self.model, self.partition, self.settings, self.devices = model, partition, settings, devices
        self.data, self.held_out, self.rule = tuple(data), tuple(held_out), rule
        self.labels = tuple(labels) or tuple(range(len(self.data)))
        self.tasks: tuple[Task, ...] = model.tasks
        self.shared, self.by_client, self.by_row = map(devices.sharding, (SHARED, CLIENTS, ROWS))
        self.frozen = devices.put(frozen, SHARED)
        self.task_groups = task_groups(self.tasks, arrays)
        self.shapes = row_shapes(
            self.task_groups,
            arrays,
            packed=settings.packed,
            microbatch=settings.microbatch,
            batch=settings.batch,
            image_tokens=model.config.image_tokens,
        )
        self.arrays = devices.put(stored(self.task_groups, arrays), SHARED)
        self.server_layout = packed.server_layout(partition)
        self.like = like
        self.moments_like = {
            name: jax.ShapeDtypeStruct((1 + 2 * blocks.count(tree),), np.float32) for name, tree in self.like.items()
        }
        self.finished = self._tabled(*(finished or (model, like)))
        tables = self._tabled(model, like).tables
        self.objective = Objective(
            sample_loss,
            self.tasks,
            self.task_groups,
            tables,
            self.shapes,
            rule,
            devices.sum_axis,
            settings.generator,
        )
        self.probes = Probes(self.objective, model, devices, len(partition.names))
        mine = [[task for task, has in zip(self.tasks, row, strict=True) if has] for row in partition.task_mask]
        self.with_statistics = frozenset(k for k, found in enumerate(mine) if rule.needs_statistics(found))
        self.plans = Plans(
            self.data,
            self.held_out,
            self.task_groups,
            shapes=self.shapes,
            starts={name: at for group in self.task_groups for name, at in offsets(group, arrays).items()},
            settings=settings,
            devices=devices,
            minibatches_per_step=rule.minibatches_per_step,
            first_clients=self.with_statistics,
        )
        self.replaceable = partition.replaceable(settings.scope)
        self.sends = sends(model, partition, self.data)
        self.shape_of: Callable[[int], Shape] = functools.cache(self._shape)
        self._zeros = functools.cache(self._made_zeros)
        # (frozen, data, params, moments, teacher, layout, plan, rate, key); the parameters are donated. The moments are
        # not: two phases may start from the same ones.
        specs = (SHARED, SHARED, CLIENTS, CLIENTS, CLIENTS, CLIENTS, ROWS, CLIENTS, CLIENTS)
        self.train_program = Program(
            "local training",
            functools.partial(exchange.train, devices.over(local_training(self.objective, settings.training), specs)),
            platform=devices.platform,
            donate_argnums=(2,),
            out_shardings=(self.by_client, self.by_client, self.shared),
        )
        self.broadcast = jax.jit(
            lambda server, layout: packed.broadcast(server, self.server_layout, layout), out_shardings=self.by_client
        )
        expected = expected_owners(partition.owned, partition.sent, settings.cohort_size)
        aggregate = functools.partial(
            exchange.aggregate, settings.screening, settings.privacy, expected, self.server_layout
        )
        self.aggregate = jax.jit(aggregate, out_shardings=self.shared)
        self.regroup = jax.jit(exchange.regroup, donate_argnums=(0,), out_shardings=self.by_client)
        self.replace = jax.jit(exchange.replace, donate_argnums=(0,), out_shardings=self.by_client)

    def _tabled(self, model, like: Blocks) -> BlockTables:
        tables = {f.name: part_table(f, model.roles, self.partition, like) for f in self.task_groups}
        return BlockTables(model, like, tables)

    def _shape(self, clients: int) -> Shape:
        """Capacities for any so many of the federation's clients at once."""
        positions = self.plans.positions(clients)
        return Shape(positions, packed.capacities(self.partition, self.partition.owned, positions))

    @property
    def numerics(self) -> str:
        """What the platform decides where the configuration leaves it open, and numbers follow from."""
        texts = ", packed" if self.settings.packed else ""
        masks = "" if self.settings.generator == "threefry2x32" else f", dropout by {self.settings.generator}"
        return f"{self.model.config.dtype}, rows of {self.settings.microbatch}{texts}{masks}"

    def train(
        self, params: Packed, moments: Packed | None, teacher: Any, layout: Layout, inputs: PhaseInputs
    ) -> tuple[Packed, Packed | None, Losses]:
        """Local training -> (params, moments, `Losses` [P, O]); the parameters are consumed."""
        rate, key = self.devices.put((inputs.rate, inputs.key), CLIENTS)
        plan = self.devices.put(inputs.plan, ROWS)
        return self.train_program(self.frozen, self.arrays, params, moments, teacher, layout, plan, rate, key)

    def blank_params(self, shapes: Packed) -> Packed:
        """Zeros of a cohort, float32, made once per shape: where optimizers start, and in a missing teacher's place."""
        return self._zeros(tuple((name, shape.shape) for name, shape in shapes.items()))

    def _made_zeros(self, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Packed:
        return self.devices.put({name: np.zeros(shape, np.float32) for name, shape in shapes}, CLIENTS)

    def placed(self, plan: Plan) -> Plan:
        """A plan of all shards, leaves [D, ...], on the devices that run its rows, leaves [D, E, ...]."""
        return self.devices.put(share_out(plan, self.devices.per_shard), ROWS)

    def server_params(self, server: Blocks) -> Packed:
        """The server's blocks by name -> on the device."""
        return self.devices.put(packed.pack(self.partition, self.server_layout, [server], self.like), SHARED)

    def server_shapes(self) -> Packed:
        """The shapes of `server_params`."""
        members, names = packed.members(self.partition), self.partition.names
        sizes = {name: (len(found), blocks.count(self.like[names[found[0]]])) for name, found in members.items()}
        shapes = {name: jax.ShapeDtypeStruct(size, np.float32) for name, size in sizes.items()}
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.shared), shapes)

    def server_blocks(self, server: Packed) -> Blocks:
        """The inverse of `server_params`, on the host."""
        return packed.unpack(self.partition, self.server_layout, server, self.like)[0]


def sends(model, partition: Partition, data: Sequence[ClientData]) -> np.ndarray:
    """bool [K, R]: the blocks that a client sends, those on the paths of the streams that it has samples of.

    A client owns the blocks of all domains of its tasks, and so can predict for all of them. The experts of a domain
    that it has no sample of are as it received them, but for weight decay: in the mean over those that did train them
    they would count as clients that learned nothing.

    Args:
      data: of all clients.
    """
    touches = np.zeros((len(model.streams), len(partition.names)), bool)
    for s, stream in enumerate(model.streams):
        touches[s] = np.isin(partition.names, model.blocks_of(stream))
    has = np.array([[stream.name in mine.streams for stream in model.streams] for mine in data])
    return partition.owned & partition.sent & blocks.ownership(has, touches)
