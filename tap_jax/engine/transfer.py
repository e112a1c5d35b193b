"""Clients' blocks between the host (memory or disk) and the devices, where they are packed.

Letters: D shards, K positions of a shard, G slots of a shape class.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from operator import itemgetter

import jax
import numpy as np

from tap_jax.blocks import Blocks
from tap_jax.engine import packed
from tap_jax.engine.engine import Engine
from tap_jax.engine.packed import Layout, Packed
from tap_jax.methods.base import ClientModels, put_models


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """To and from the places where the blocks of a cohort's clients lie.

    Attributes:
      engine: its devices.
      table: int [D, K], clients by position, -1 at an empty one.
      layouts: of each shard.
    """

    engine: Engine
    table: np.ndarray
    layouts: Sequence[Layout]

    def upload(self, models: Sequence[Blocks] | Mapping[int, Blocks], like: Blocks) -> Packed:
        """The clients' blocks, [D, G, n]; of several processes each reads those of its own devices.

        Args:
          models: client number -> its blocks. like: shapes of the blocks.
        """
        placed = {}
        for shard in self.engine.devices.reached:
            params = [models[k] if k >= 0 else {} for k in self.table[shard]]
            placed[shard] = packed.pack(self.engine.partition, self.layouts[shard], params, like)
        return self.engine.devices.put_shards(placed)

    def download(self, params: Packed, like: Blocks) -> dict[int, Blocks]:
        """Client number -> its blocks, in the memory of every process."""
        fetched = self.engine.devices.fetch(dict(params))
        shards = {shard: jax.tree.map(itemgetter(shard), fetched) for shard in range(len(self.table))}
        return self._by_client(shards, like)

    def exchanged(self, models: ClientModels, params: Packed, like: Blocks) -> ClientModels:
        """The models of all clients, with the cohort's blocks exchanged for those of `params`."""
        members, names = packed.members(self.engine.partition), self.engine.partition.names
        params = {name: matrix for name, matrix in params.items() if names[members[name][0]] in like}
        if isinstance(models, tuple):  # in memory, where every process has all clients'
            return put_models(models, self.download(params, like))
        return put_models(models, self._by_client(self.engine.devices.fetch_shards(params), like))

    def _by_client(self, shards: Mapping[int, Packed], like: Blocks) -> dict[int, Blocks]:
        found = {}
        for shard, params in shards.items():
            held = packed.unpack(self.engine.partition, self.layouts[shard], params, like)
            found |= {int(k): mine for k, mine in zip(self.table[shard], held, strict=True) if k >= 0}
        return found
