"""How much memory a run will need beside activations, and where: from shapes alone.

Letters: R blocks, D shards.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from tap_jax import blocks
from tap_jax.blocks import PRIVATE, Blocks, Partition
from tap_jax.engine import packed
from tap_jax.engine.cohort import reserves_teacher
from tap_jax.engine.settings import EngineSettings
from tap_jax.methods.base import Method

ROUND, WINDOW, LAST = "round", "end of a window", "after the last"


@dataclasses.dataclass(frozen=True)
class PhaseMemory:
    """What is on a device while a cohort trains.

    Attributes:
      clients: how many share the device. parts: name -> bytes.
    """

    clients: int
    parts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by name; parameters are sized for the most demanding clients.

    Attributes:
      devices: how many there are.
      always: on every device, throughout. phases: on every device, by phase.
      host: in memory, in all phases. disk: in the run's folder. finished: in memory, after the last round.
    """

    devices: int
    always: Mapping[str, int]
    phases: Mapping[str, PhaseMemory]
    host: Mapping[str, int]
    disk: Mapping[str, int]
    finished: Mapping[str, int]

    def on_device(self, phase: str) -> int:
        """Of one device."""
        return sum(self.always.values()) + sum(self.phases[phase].parts.values())

    def together(self, phase: str) -> int:
        """Of all devices and the host."""
        finished = sum(self.finished.values()) if phase == LAST else 0
        return self.devices * self.on_device(phase) + sum(self.host.values()) + finished


def memory_plan(
    model,
    partition: Partition,
    method: Method,
    settings: EngineSettings,
    *,
    like: Blocks,
    frozen: int,
    data: int | None,
    made: bool,
    after: bool,
    shards: int = 1,
    per_shard: int = 1,
) -> MemoryPlan:
    """The plan of a run.

    Args:
      model: `models.ServerModel`.
      partition: with private blocks, where the method has them.
      like: shapes of every block by name; a private one is like its twin.
      frozen: bytes of Ŵ in the compute type. data: bytes of training and test sets at most; None: not known.
      made: the last phase makes models of the clients' own. after: it trains.
      shards: D. per_shard: devices of each.
    """
    sizes = np.array([4 * blocks.count(like[name.removeprefix(PRIVATE)]) for name in partition.names])
    server = int(sizes.sum())
    row = max(_row_bytes(model.roles(stream), like) for stream in model.streams)

    def packed_bytes(positions: int) -> int:
        slots = packed.capacities(partition, partition.owned, positions)
        return sum(slots[name] * int(sizes[of[0]]) for name, of in packed.members(partition).items())

    def phase(name: str, clients: int) -> PhaseMemory:
        positions, last = -(-clients // shards), name == LAST
        params = packed_bytes(positions)
        found = {"blocks in training": params, "their gradients": params, "AdamW's two moments": 2 * params}
        if settings.persist or settings.in_pieces and last:
            found["optimizer states as they were before"] = 2 * params
        if settings.window > 1 and not last:
            # A client that is drawn in every round of the window has its W̃ of the last one there until then.
            found["server's blocks before the window"] = server
            found["federated blocks of other rounds, at most"] = (settings.window - 1) * packed_bytes(
                -(-settings.cohort_size // shards)
            )
        elif method.personal_variants and not last:
            found["server's blocks of the next round"] = server
        if len(method.personal_variants) > 1 and name == (WINDOW if settings.window > 1 else ROUND):
            found["federated blocks"] = params  # until the last personal model trains
        if reserves_teacher(method.rule, params) or last and method.rule.takes_teacher:
            found["teacher's blocks"] = params
        found["one row's blocks and gradients"] = 2 * row
        return PhaseMemory(positions, found)

    owned = int((partition.owned @ sizes).sum())
    mine = int((partition.owned @ (sizes * np.isin(partition.names, partition.kept))).sum())
    stored = {f"{name} blocks of all clients, only those they own": mine for name in method.client_models}
    if settings.persist:
        trained = ("federated", *(method.client_models if mine == owned else ()))
        stored |= {f"AdamW's two moments of {name} blocks": 2 * owned for name in trained}
    on_disk = sum(stored.values()) > settings.host_bytes
    known = {} if data is None else {"training and test data, at most": data}
    # A teacher of two sets of adapters is about as large as both.
    share = min(1.0, settings.clients_at_once / len(partition.owned))
    return MemoryPlan(
        devices=shards * per_shard,
        always={"frozen weights": frozen, "server's blocks": server, **known},
        phases={ROUND: phase(ROUND, settings.cohort_size)}
        | ({WINDOW: phase(WINDOW, settings.window_clients(len(partition.owned)))} if settings.window > 1 else {})
        | ({LAST: phase(LAST, settings.clients_at_once)} if after else {}),
        host=({} if on_disk else stored)
        | ({name.replace(", at", " as read, at"): size for name, size in known.items()}),
        disk=stored if on_disk else {},
        finished={"finished models, one variant of a client batch at a time": round(owned * share)} if made else {},
    )


def _row_bytes(roles: Mapping[str, str | tuple[str, ...]], like: Blocks) -> int:
    """Of the parts of one forward pass; a block that several paths take is there once for each."""
    names = [name for part in roles.values() for name in ((part,) if isinstance(part, str) else part)]
    return sum(blocks.size_bytes(like[name]) for name in names)


def array_bytes() -> int:
    """Of all arrays that are on devices now, on all of them."""
    # Not through the arrays' shards: looking at these makes further arrays.
    return sum(
        int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize * len(array.sharding.device_set)
        for array in jax.live_arrays()
    )
