"""One function over the devices of a mesh: clients are dealt out to shards, every shard runs the same program.

Whatever belongs to clients has a leading shard axis [D, ...]; whatever all share is replicated. With one device
the function is called as it is. (The `data` axis of the mesh, pmap and several hosts are not here yet.)

Letters: D devices, K positions of a shard.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tap_jax.errors import UserError


def client_mesh(devices: int = 0) -> Mesh:
    """A mesh with the one axis "clients" over `devices` devices; 0 takes all there are.

    Raises:
      UserError: fewer devices exist.
    """
    available = len(jax.devices())
    if devices > available:
        raise UserError(f"mesh.clients: {devices} of {available} devices; use at most {available}")
    count = devices or available
    return jax.make_mesh(
        (count,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )


def shared_sharding(mesh: Mesh) -> NamedSharding:
    """Replicated over the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def client_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis [D, ...] over the shards."""
    return NamedSharding(mesh, PartitionSpec("clients"))


def over_clients(function: Callable, mesh: Mesh, by_client: Sequence[bool]) -> Callable:
    """`function`, written for one shard, over all shards of the mesh.

    Args:
      function: takes and returns trees without a shard axis.
      by_client: per argument, whether it has the shard axis [D, ...] (else it is shared).

    Returns:
      A function whose outputs have the shard axis.
    """

    def local(*args):
        args = [jax.tree.map(lambda x: x[0], arg) if own else arg for arg, own in zip(args, by_client, strict=True)]
        return jax.tree.map(lambda x: x[None], function(*args))

    if mesh.size == 1:
        return local
    specs = tuple(PartitionSpec("clients") if own else PartitionSpec() for own in by_client)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("clients"), check_vma=False)


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
