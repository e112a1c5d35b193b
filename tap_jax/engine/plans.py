"""Who takes part in a round, and in which minibatches: drawn on the host, where it can, ahead of its use.

All that is drawn is a function of the seed and the arguments, so it changes nothing whether it was drawn ahead: that is
a cache.

Letters: D shards, K positions of a shard, τ steps.
"""

import concurrent.futures
import functools
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np

from tap_jax.data.packing import RowShape
from tap_jax.data.sampling import ClientData, Plan, capacities, draw_plan, sample_cohort
from tap_jax.data.task_groups import TaskGroup
from tap_jax.engine import parallel
from tap_jax.engine.parallel import Devices
from tap_jax.engine.settings import EngineSettings

_DRAWING = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")


class Plans:
    """Draws for the cohorts of a federation.

    Args:
      data: one `ClientData` per client. held_out: likewise, samples left out of training.
      task_groups: of all tasks. shapes: task group -> shapes of its rows.
      starts: task name -> where its samples start in its group's arrays.
      settings: of the run. devices: where it trains.
      minibatches_per_step: of the rule.
      first_clients: numbers of those whose rows come first in a minibatch.

    Attributes:
      ahead: (round, phase) -> a `Future` of the plan with which those drawn for the round train; the first call starts
        to draw it in the background. The last two are kept.
      training_rows: positions of a shard -> task group -> rows N of each shape that its minibatches can need.
    """

    def __init__(
        self,
        data: Sequence[ClientData],
        held_out: Sequence[ClientData],
        task_groups: Sequence[TaskGroup],
        *,
        shapes: Mapping[str, Sequence[RowShape]],
        starts: Mapping[str, int],
        settings: EngineSettings,
        devices: Devices,
        minibatches_per_step: int,
        first_clients: Collection[int],
    ):
        self.data, self.held_out, self.task_groups = data, held_out, task_groups
        self.shapes, self.starts, self.settings, self.devices = shapes, starts, settings, devices
        self.minibatches_per_step, self.first_clients = minibatches_per_step, first_clients
        self.work = [
            sum(-(-min(settings.batch, len(ids)) // settings.microbatch) for ids in client.streams.values())
            for client in data
        ]
        self.training_rows = functools.cache(functools.partial(self._rows, data, batch=settings.batch))
        self.ahead = functools.lru_cache(maxsize=2)(functools.partial(_DRAWING.submit, self._of_round))

    def clients(self, round_: int) -> tuple[int, ...]:
        """Those drawn for a round."""
        settings = self.settings
        return tuple(sample_cohort(settings.seed, round_, len(self.data), settings.cohort_size).tolist())

    def deal(self, clients: Sequence[int], positions: int) -> np.ndarray:
        """The clients dealt to the shards: int [D, K], -1 at an empty position."""
        work = [self.work[client] for client in clients]
        return parallel.deal(clients, work, shards=self.devices.shards, positions=positions)

    def positions(self, clients: int) -> int:
        """K for so many clients."""
        return -(-clients // self.devices.shards)

    def training(
        self,
        table: np.ndarray,
        rounds: np.ndarray,
        phase: str,
        *,
        post: bool,
        twice: bool = False,
        without: Collection[int] = (),
    ) -> Plan:
        """The minibatches of a local training, rows [D, minibatches_per_step, τ, ...]; numpy.

        Args:
          table: int [D, K], clients by position, -1 at an empty one. rounds: of each position.
          phase: one of `data.sampling.PHASES`.
          post: P steps, 2P where `twice`; else τ, or one pass over a client's samples where that is less.
          without: positions among all D·K that take no step.
        """
        settings = self.settings
        steps = settings.post_steps * (1 + twice) if post else settings.local_steps
        left_out = np.isin(np.arange(table.size), list(without)).reshape(table.shape)
        rows = self.training_rows(table.shape[1])

        def minibatch(number: int) -> Plan:
            return self._drawn(
                self.data,
                np.where(left_out, -1, table),
                rounds,
                rows,
                phase=phase,
                batch=settings.batch,
                steps=steps,
                length=max(settings.longest, steps),
                epochs=None if post else 1,
                minibatch=number,
                first_clients=self.first_clients,
            )

        drawn = [minibatch(number) for number in range(self.minibatches_per_step)]
        return drawn[0].replace(rows=jax.tree.map(lambda *x: np.stack(x, 1), *(plan.rows for plan in drawn)))

    def probe(self, table: np.ndarray, rounds: np.ndarray, streams: Collection[str]) -> Plan:
        """A minibatch of every client's samples of these streams, rows [D, 1, 1, ...]; numpy."""
        data = [mine.only(streams) for mine in self.data]
        return self._single(data, table, rounds, "probe", self.settings.batch, self.training_rows(table.shape[1]))

    def all_held_out(self, table: np.ndarray) -> Plan:
        """All held-out samples of the clients as one minibatch, rows [D, 1, 1, ...]; numpy."""
        batch = max(mine.samples for mine in self.held_out)
        rows = self._rows(self.held_out, table.shape[1], batch=batch)
        return self._single(self.held_out, table, np.zeros_like(table), "held_out", batch, rows)

    def _single(
        self, data: Sequence[ClientData], table: np.ndarray, rounds: np.ndarray, phase: str, batch: int, rows: Mapping
    ) -> Plan:
        plan = self._drawn(data, table, rounds, rows, phase=phase, batch=batch, steps=1, epochs=None)
        return plan.replace(rows=jax.tree.map(lambda leaf: leaf[:, None], plan.rows))

    def _drawn(
        self, data: Sequence[ClientData], table: np.ndarray, rounds: np.ndarray, rows: Mapping, **how: object
    ) -> Plan:
        """One minibatch a step, leaves [D, ...]; `how`: arguments of `draw_plan` in which phases differ."""
        fixed = dict(seed=self.settings.seed, shapes=self.shapes, starts=self.starts, capacities=rows)
        shards = [
            draw_plan(data, clients, self.task_groups, round_=of, **fixed, **how)
            for clients, of in zip(table, rounds, strict=True)
        ]
        return jax.tree.map(lambda *x: np.stack(x), *shards)

    def _of_round(self, round_: int, phase: str) -> Plan:
        table = self.deal(self.clients(round_), self.positions(self.settings.cohort_size))
        return self.training(table, np.full(table.shape, round_), phase, post=False)

    def _rows(self, data: Sequence[ClientData], positions: int, *, batch: int) -> dict[str, tuple[int, ...]]:
        multiple = self.devices.per_shard
        return capacities(data, self.task_groups, self.shapes, positions=positions, batch=batch, multiple=multiple)
