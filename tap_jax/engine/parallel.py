"""One function over the devices of a run: clients are dealt out to shards, a shard's rows to its devices.

The mesh has the axes "clients" (D shards of the cohort) and "data" (E devices that share out the rows of one shard's
minibatches and add up their gradients). Whatever belongs to clients has a leading axis [D, ...]; rows have [D, E, ...];
what all share is replicated. The same function runs as it is on one device ("vmap": one operation updates all clients'
blocks, and rows follow each other), under `pmap` over the clients, or under `shard_map` over both axes and several
processes.

Several processes run one and the same program on the same host data, each with its own devices of the mesh. Arrays are
made from the part of them that lies on a process's own devices (`Devices.put`, `Devices.put_shards`), and read by all
of them together (`Devices.fetch`) or each its own (`Devices.fetch_shards`).

Letters: D shards, E devices of a shard, K positions of a shard.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tap_jax.errors import UserError
from tap_jax.platforms import Platform, platform_of

# How an argument lies on the mesh.
SHARED = PartitionSpec()
CLIENTS = PartitionSpec("clients")  # [D, ...]
ROWS = PartitionSpec("clients", "data")  # [D, E, ...]


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run and how functions are spread over them.

    Attributes:
      mesh: axes "clients" and "data".
      parallel: "vmap" (one device), "pmap" (E = 1, one process) or "shard_map".
    """

    mesh: Mesh
    parallel: str

    @property
    def shards(self) -> int:
        """D."""
        return self.mesh.shape["clients"]

    @property
    def per_shard(self) -> int:
        """E."""
        return self.mesh.shape["data"]

    @property
    def size(self) -> int:
        """D·E."""
        return self.mesh.size

    @property
    def local(self) -> list[jax.Device]:
        """Those of this process."""
        return [device for device in self.mesh.devices.flat if _is_mine(device)]

    @property
    def reached(self) -> list[int]:
        """The shards that have a device of this process."""
        return [shard for shard, row in enumerate(self.mesh.devices) if any(map(_is_mine, row))]

    @property
    def sum_axis(self) -> str | None:
        """The axis over which what rows add up to has to be summed; None where a shard has one device."""
        return "data" if self.per_shard > 1 else None

    @property
    def platform(self) -> Platform:
        """Of its devices, which are all of one kind."""
        return platform_of(self.mesh.devices.flat[0])

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Where arrays of this kind lie."""
        return NamedSharding(self.mesh, spec)

    def put(self, tree: Any, spec: PartitionSpec) -> Any:
        """Host arrays, the same in every process, on the devices."""
        return put(tree, self.sharding(spec))

    def put_shards(self, trees: Mapping[int, Any]) -> Any:
        """Host arrays of the shards that this process reaches, of equal shapes -> one tree of `CLIENTS`."""
        trees = {shard: jax.tree.map(lambda leaf: leaf[None], tree) for shard, tree in trees.items()}
        if self.size == 1:
            return jax.device_put(trees[0], self.sharding(CLIENTS))
        placed = [
            jax.device_put(trees[shard], device)
            for shard, row in enumerate(self.mesh.devices)
            for device in filter(_is_mine, row)
        ]

        def whole(*leaves: jax.Array) -> jax.Array:
            shape = (self.shards, *leaves[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self.sharding(CLIENTS), leaves)

        return jax.tree.map(whole, *placed)

    def fetch(self, tree: Any) -> Any:
        """Host arrays, whole in every process."""
        if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
            return jax.device_get(tree)
        # One by one: each is whole on every device for a while.
        return jax.tree.map(lambda leaf: jax.device_get(self._gather(leaf)), tree)

    def fetch_shards(self, tree: Any) -> dict[int, Any]:
        """Host arrays of `CLIENTS`, shard by shard; every shard in one of the processes."""

        def of(device: jax.Device) -> Any:
            def part(leaf: jax.Array) -> jax.Array:
                found = next(piece.data for piece in leaf.addressable_shards if piece.device == device)
                return found.reshape(leaf.shape[1:])

            return jax.tree.map(part, tree)

        first = {shard: row[0] for shard, row in enumerate(self.mesh.devices) if _is_mine(row[0])}
        return jax.device_get({shard: of(device) for shard, device in first.items()})

    @functools.cached_property
    def _gather(self) -> Callable:
        return jax.jit(lambda tree: tree, out_shardings=self.sharding(SHARED))

    def over(self, function: Callable, specs: Sequence[PartitionSpec], out: PartitionSpec = CLIENTS) -> Callable:
        """`function`, written for one device, over all of them.

        Args:
          function: takes and returns trees without the axes of the mesh. What it returns must be the same on all
            devices of a shard where `out` has no axis for them.
          specs: of every argument. out: of the result.

        Returns:
          A function of whole arrays, to be compiled by the caller.
        """

        def local(*args):
            args = [_without_axes(arg, len(spec)) for arg, spec in zip(args, specs, strict=True)]
            return _with_axes(function(*args), len(out))

        if self.size == 1:
            return local
        if self.parallel == "pmap":  # which takes the axis of the clients away itself

            def shard(*args):
                args = [_with_axes(arg, bool(spec)) for arg, spec in zip(args, specs, strict=True)]
                return _without_axes(local(*args), 1)

            devices = self.mesh.devices.ravel().tolist()
            axes = tuple(0 if spec else None for spec in specs)
            return jax.pmap(shard, axis_name="clients", in_axes=axes, devices=devices)
        return jax.shard_map(local, mesh=self.mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)


class AbsentDevices(Devices):
    """Devices that programs are compiled for and that are not here: what is put on them stays a shape."""

    def put(self, tree: Any, spec: PartitionSpec) -> Any:
        """Shapes of host arrays, or shapes themselves, with where they would lie."""
        sharding = self.sharding(spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def devices(
    clients: int = 0,
    data: int = 0,
    parallel: str = "auto",
    *,
    cohort: int = 0,
    absent: Sequence[jax.Device] = (),
) -> Devices:
    """The mesh that a configuration asks for.

    Args:
      clients: D; 0: what `data` leaves of all devices, or, where that is 0 too, the most that divide their number and
        do not exceed the cohort.
      data: E; 0: 1 where `clients` is given, else what the cohort leaves over.
      parallel: "vmap", "pmap", "shard_map", or "auto": the first on one device, else the last.
      cohort: clients that train at once in a round; 0: any number.
      absent: devices of a topology in the place of those that are here.

    Raises:
      UserError: fewer devices exist, or the way of spreading does not fit their number.
    """
    found = list(absent) or jax.devices()
    available = len(found)
    if not clients and not data:
        clients = max(n for n in range(1, available + 1) if available % n == 0 and n <= (cohort or available))
        if parallel == "vmap":
            clients, data = 1, 1
        elif parallel == "pmap":
            data = 1
        else:
            data = available // clients
    data = data or 1
    clients = clients or max(1, available // data)
    if clients * data > available:
        field = "mesh.clients" if data == 1 else "mesh.clients, mesh.data"
        shape = f"{clients}" if data == 1 else f"{clients} x {data}"
        raise UserError(f"{field}: {shape} of {available} devices; use at most {available}")
    count = clients * data
    if parallel == "vmap" and count > 1:
        raise UserError(f"mesh.parallel: 'vmap' is for one device, not {count}; use 'shard_map'")
    if parallel == "pmap" and (data > 1 or jax.process_count() > 1):
        raise UserError("mesh.parallel: 'pmap' spreads clients over one process's devices only; use 'shard_map'")
    if jax.process_count() > 1 and count < available:
        raise UserError(f"mesh.clients: {count} of {available} devices; several processes must use all they have")
    mesh = jax.make_mesh((clients, data), ("clients", "data"), axis_types=(AxisType.Auto,) * 2, devices=found[:count])
    if parallel == "auto":
        parallel = "vmap" if count == 1 else "shard_map"
    return (AbsentDevices if absent else Devices)(mesh, parallel)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, the same in every process, where `sharding` says."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(leaf):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree)


def deal(clients: Sequence[int], work: Sequence[float], *, shards: int, positions: int) -> np.ndarray:
    """Deals clients to shards so that loads are even: longest first, each to the least loaded shard with room.

    Args:
      clients: client numbers, at most shards · positions.
      work: estimated work of each.

    Returns:
      int [D, K], client numbers, -1 where a position is empty.
    """
    table = np.full((shards, positions), -1)
    load, filled = np.zeros(shards), np.zeros(shards, int)
    for index in np.argsort(-np.asarray(work), kind="stable"):
        shard = int(np.argmin(np.where(filled < positions, load, np.inf)))
        table[shard, filled[shard]] = clients[index]
        load[shard] += work[index]
        filled[shard] += 1
    return table


def _is_mine(device: jax.Device) -> bool:
    return device.process_index == jax.process_index()


def _without_axes(tree: Any, axes: int) -> Any:
    return jax.tree.map(lambda x: x[(0,) * axes], tree) if axes else tree


def _with_axes(tree: Any, axes: int) -> Any:
    return jax.tree.map(lambda x: x[(None,) * axes], tree)
