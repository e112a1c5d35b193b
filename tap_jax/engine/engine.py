"""The compiled side of a run: what does not change from round to round (model, data on the device, programs).

Its cohorts (`engine.cohort`) are what methods work with.

Letters: D shards (devices), K positions of a shard, P = D·K positions, O tasks, R blocks, G slots of a shape class.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tap_jax import blocks
from tap_jax.blocks import Blocks, Partition, Tree
from tap_jax.data.device_data import stored
from tap_jax.data.families import families, offsets
from tap_jax.data.sampling import ClientData, Plan, row_shapes, sample_cohort, share_out
from tap_jax.engine import exchange, packed
from tap_jax.engine.cohort import Cohort, PhaseInputs, Shape, shape_of
from tap_jax.engine.local_training import Losses, local_training
from tap_jax.engine.objective import Objective, Part, SampleLoss, part_table
from tap_jax.engine.packed import Layout, Packed
from tap_jax.engine.parallel import CLIENTS, ROWS, SHARED, Devices
from tap_jax.engine.privacy import expected_owners
from tap_jax.engine.probes import Probes
from tap_jax.engine.programs import Program
from tap_jax.engine.settings import EngineSettings
from tap_jax.engine.windows import regroup
from tap_jax.methods.base import LocalRule
from tap_jax.tasks import Task

_DRAWING = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")


class BlockTables(NamedTuple):
    """What a model's blocks are like: shapes by name, and family -> what a forward pass takes of them."""

    model: Any
    like: Blocks
    tables: Mapping[str, Mapping[str, Part]]


class Engine:
    """The compiled side of a run.

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
        self.families = families(self.tasks, arrays)
        self.starts = {name: at for family in self.families for name, at in offsets(family, arrays).items()}
        self.shapes = row_shapes(
            self.families,
            arrays,
            packed=settings.packed,
            microbatch=settings.microbatch,
            batch=settings.batch,
            image_tokens=model.config.image_tokens,
        )
        self.arrays = devices.put(stored(self.families, arrays), SHARED)
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
            self.families,
            tables,
            self.shapes,
            rule,
            devices.sum_axis,
            settings.generator,
        )
        self.probes = Probes(self)
        mine = [[task for task, has in zip(self.tasks, row, strict=True) if has] for row in partition.task_mask]
        self._with_statistics = frozenset(k for k, found in enumerate(mine) if rule.needs_statistics(found))
        self._blank: dict[tuple, Packed] = {}
        self.begins: str | None = None  # phase of the first training of the cohort before
        self._drawn: dict[tuple, concurrent.futures.Future] = {}
        self._replaceable = partition.replaceable(settings.scope)
        self.sends = sends(model, partition, self.data)
        self._work = [
            sum(-(-min(settings.batch, len(ids)) // settings.microbatch) for ids in client.streams.values())
            for client in self.data
        ]
        self.shape_of: Callable[[int], Shape] = functools.cache(
            lambda clients: shape_of(self.data, self.families, self.shapes, partition, settings, devices, clients)
        )
        # (frozen, data, params, moments, teacher, layout, plan, rate, key); the parameters are donated. The moments are
        # not: two phases may start from the same ones.
        specs = (SHARED, SHARED, CLIENTS, CLIENTS, CLIENTS, CLIENTS, ROWS, CLIENTS, CLIENTS)
        self._train = Program(
            functools.partial(exchange.train, devices.over(local_training(self.objective, settings.training), specs)),
            platform=devices.platform,
            donate_argnums=(2,),
            out_shardings=(self.by_client, self.by_client, self.shared),
        )
        self._broadcast = jax.jit(
            lambda server, layout: packed.broadcast(server, self.server_layout, layout), out_shardings=self.by_client
        )
        expected = expected_owners(partition.owned, partition.sent, settings.cohort_size)
        aggregate = functools.partial(
            exchange.aggregate, settings.screening, settings.privacy, expected, self.server_layout
        )
        self._aggregate = jax.jit(aggregate, out_shardings=self.shared)
        self._regroup = jax.jit(regroup, donate_argnums=(0,), out_shardings=self.by_client)
        self._replace = jax.jit(exchange.replace, donate_argnums=(0,), out_shardings=self.by_client)

    def _tabled(self, model, like: Blocks) -> BlockTables:
        tables = {f.name: part_table(f, model.roles, self.partition, like) for f in self.families}
        return BlockTables(model, like, tables)

    @property
    def numerics(self) -> str:
        """What the platform decides where the configuration leaves it open, and numbers follow from."""
        texts = ", packed" if self.settings.packed else ""
        masks = "" if self.settings.generator == "threefry2x32" else f", dropout by {self.settings.generator}"
        return f"{self.model.config.dtype}, rows of {self.settings.microbatch}{texts}{masks}"

    def drawn(self, round_: int) -> tuple[int, ...]:
        """The clients that the seed draws for a round."""
        settings = self.settings
        return tuple(sample_cohort(settings.seed, round_, len(self.data), settings.cohort_size).tolist())

    def cohort(
        self,
        clients: Sequence[int],
        round_: int | Sequence[int],
        moments: Mapping | None = None,
    ) -> Cohort:
        """The clients of round `round_` (0-based).

        Args:
          clients: all different; more than a round has where they are of a window.
          round_: one for all, or each client's own.
          moments: as in `State`, where optimizer states persist.
        """
        settings = self.settings
        size = settings.cohort_size if len(clients) <= settings.cohort_size else settings.window_clients(len(self.data))
        return Cohort(self, clients, round_, size=size, moments=moments)

    def draw_ahead(self, round_: int) -> None:
        """Draws the plans with which a round of the clients drawn for it will begin, beside what runs now.

        It is taken to begin as the last one did. A plan is a function of (seed, round, phase, clients), so whether it
        was drawn ahead changes nothing.
        """
        kept = {key: plan for key, plan in self._drawn.items() if abs(key[0] - round_) <= 1}
        key = round_, self.begins, self.drawn(round_)
        if self.begins and key not in kept:
            kept[key] = _DRAWING.submit(self._draw, *key)
        self._drawn = kept

    def _draw(self, round_: int, phase: str, clients: Sequence[int]) -> Plan:
        return self.cohort(clients, round_).plan(phase, post=False)

    def train(
        self, params: Packed, moments: Packed | None, teacher: Any, layout: Layout, inputs: PhaseInputs
    ) -> tuple[Packed, Packed | None, Losses]:
        """Local training -> (params, moments, `Losses` [P, O]); the parameters are consumed."""
        rate, key = self.devices.put((inputs.rate, inputs.key), CLIENTS)
        plan = self.devices.put(inputs.plan, ROWS)
        return self._train(self.frozen, self.arrays, params, moments, teacher, layout, plan, rate, key)

    def client_batches(self, round_: int, moments: Mapping | None = None) -> list[Cohort]:
        """All clients, `clients_at_once` at a time."""
        size, everyone = self.settings.clients_at_once, range(len(self.data))
        return [Cohort(self, everyone[i : i + size], round_, size=size, moments=moments) for i in everyone[::size]]

    def blank_params(self, shapes: Packed) -> Packed:
        """Stands in for a teacher where there is none; never read, made once per shape."""
        key = tuple((group, shape.shape) for group, shape in shapes.items())
        if key not in self._blank:
            zeros = {group: np.zeros(shape.shape, shape.dtype) for group, shape in shapes.items()}
            self._blank[key] = self.devices.put(zeros, CLIENTS)
        return self._blank[key]

    def placed(self, plan: Plan) -> Plan:
        """A plan of all shards, leaves [D, ...], on the devices that run its rows, leaves [D, E, ...]."""
        return self.devices.put(share_out(plan, self.devices.parts), ROWS)

    def server_params(self, server: Blocks) -> Packed:
        """The server's blocks by name -> on the device."""
        return self.devices.put(packed.pack(self.partition, self.server_layout, [server], self.like), SHARED)

    def server_shapes(self) -> Packed:
        """The shapes of `server_params`."""
        members, names = packed.members(self.partition), self.partition.names
        sizes = {group: (len(found), blocks.count(self.like[names[found[0]]])) for group, found in members.items()}
        shapes = {group: jax.ShapeDtypeStruct(size, np.float32) for group, size in sizes.items()}
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
