"""Parameters of many clients, packed: the engine's own form of them.

Blocks of equal shapes are of one *shape class*, and many clients' blocks of a class are the rows of one matrix: a slot
holds one client's block, its leaves one after the other. A `Layout` says which client's which block lies in which slot.
Only owned blocks have one, so nothing is stored, moved or updated for blocks that a client does not have.

The operators are those of `tap_jax.blocks`, to the same bits.

Letters: K clients, R blocks, O tasks, G slots of a shape class, n parameters of one of its blocks, D shards.
"""

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from tap_jax.blocks import Blocks, Partition, Tree, count

Packed = Mapping[str, Array]  # shape class -> [G, n]


def flatten(tree: Tree, lead: int = 0) -> Array:
    """The leaves of a block one after the other, [n]; with `lead` common leading axes, [..., n]."""
    leaves = [leaf.reshape(*leaf.shape[:lead], -1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves, axis=-1)


def unflatten(flat: Array, like: Tree) -> Tree:
    """The inverse of `flatten`: [..., n] -> the tree `like` (arrays or shapes), leaves [..., *shape]."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([int(np.prod(leaf.shape)) for leaf in leaves])
    pieces = [flat[..., end - int(np.prod(leaf.shape)) : end] for leaf, end in zip(leaves, ends, strict=True)]
    return structure.unflatten(
        [p.reshape(*flat.shape[:-1], *leaf.shape) for p, leaf in zip(pieces, leaves, strict=True)]
    )


def members(partition: Partition) -> dict[str, np.ndarray]:
    """Shape class -> int [.], the blocks of the class in order."""
    classes = np.array(partition.shape_classes)
    return {name: np.flatnonzero(classes == name) for name in dict.fromkeys(partition.shape_classes)}


def capacities(partition: Partition, owned: np.ndarray, clients: int) -> dict[str, int]:
    """Shape class -> slots that any `clients` of the federation's clients can fill, at least 1.

    Args:
      owned: bool [K, R] of the federation.
    """
    counts = {name: np.sort(owned[:, blocks].sum(1))[::-1] for name, blocks in members(partition).items()}
    return {name: max(1, int(count[:clients].sum())) for name, count in counts.items()}


class Layout(struct.PyTreeNode):
    """Where each client's blocks lie in packed parameters.

    Attributes:
      slot: int32 [K, R], the slot of client k's block r in its shape class; 0 where k does not own r.
      owner: shape class -> int32 [G], the client (position) whose block is in a slot, K where the slot is free.
      block: shape class -> int32 [G], the block (0..R-1) in each slot, some block of the class where free.
    """

    slot: Array
    owner: Mapping[str, Array]
    block: Mapping[str, Array]


def lay_out(partition: Partition, owned: np.ndarray, capacities: Mapping[str, int] | None = None) -> Layout:
    """Layout without gaps, client by client and block by block; numpy leaves.

    Args:
      owned: bool [K, R], what each of K positions owns (a row of False is an empty position).
      capacities: shape class -> slots to provide; None: just enough, and at least 1.

    Raises:
      ValueError: a shape class has more owned blocks than slots.
    """
    slot = np.zeros(owned.shape, np.int32)
    owner, block = {}, {}
    for name, blocks in members(partition).items():
        owners, position = np.nonzero(owned[:, blocks])
        size = max(1, len(owners)) if capacities is None else capacities[name]
        if len(owners) > size:
            raise ValueError(f"{name}: {len(owners)} owned blocks for {size} slots")
        slot[owners, blocks[position]] = np.arange(len(owners))
        owner[name] = np.full(size, len(owned), np.int32)
        owner[name][: len(owners)] = owners
        block[name] = np.full(size, blocks[0], np.int32)
        block[name][: len(owners)] = blocks[position]
    return Layout(slot, owner, block)


def server_layout(partition: Partition) -> Layout:
    """Layout of one owner of all blocks: the server, or a teacher of all tasks."""
    return lay_out(partition, np.ones((1, len(partition.names)), bool))


def pack(partition: Partition, layout: Layout, clients: Sequence[Blocks], like: Blocks) -> dict[str, np.ndarray]:
    """Clients' parameters packed, on the host; free slots are zero.

    Args:
      clients: one mapping per position, with at least the blocks it owns of the classes wanted.
      like: any mapping with the shapes of every block of the classes wanted; which these are, it says.

    Returns:
      Shape class -> float32 [G, n].
    """
    packed = {}
    for name, blocks in members(partition).items():
        if partition.names[blocks[0]] not in like:
            continue
        owners, numbers = np.asarray(layout.owner[name]), np.asarray(layout.block[name])
        matrix = np.zeros((len(owners), count(like[partition.names[blocks[0]]])), np.float32)
        for g in np.flatnonzero(owners < len(layout.slot)):
            leaves = jax.tree.leaves(clients[owners[g]][partition.names[numbers[g]]])
            np.concatenate([np.ravel(leaf) for leaf in leaves], out=matrix[g])
        packed[name] = matrix
    return packed


def unpack(partition: Partition, layout: Layout, packed: Packed, like: Blocks) -> list[dict[str, Tree]]:
    """The inverse of `pack`: per position the blocks it owns, by name, copied to the host."""
    out: list[dict[str, Tree]] = [{} for _ in range(len(layout.slot))]
    for name, matrix in jax.device_get(dict(packed)).items():
        numbers = np.asarray(layout.block[name])
        for g, position in enumerate(np.asarray(layout.owner[name])):
            if position < len(out):
                block = partition.names[numbers[g]]
                out[position][block] = unflatten(np.array(matrix[g]), like[block])
    return out


def broadcast(server: Packed, server_layout: Layout, layout: Layout) -> dict[str, Array]:
    """W̃[i] = P_{B_i} W̃ for every client: the server's blocks in the slots of their owners.

    Args:
      server: W̃, laid out as `server_layout`.
      layout: of the clients.

    Returns:
      As `layout` says; free slots hold some block of their class.
    """
    place = jnp.asarray(server_layout.slot)[0]
    return {name: matrix[place[layout.block[name]]] for name, matrix in server.items()}


def aggregate(
    server: Packed, cohort: Packed, server_layout: Layout, layout: Layout, weights: Array
) -> dict[str, Array]:
    """Component-wise FedAvg (Sec. 3.1): each block is averaged over the clients that sent it.

    What is averaged for a LoRA pair is A and B each; mean(B)·mean(A) is not mean(BA).

    Args:
      server: W̃, laid out as `server_layout`.
      cohort: what the clients sent, laid out as `layout`.
      server_layout, layout: which block, and whose, is in which slot of the two; see `lay_out`.
      weights: w[k, r] >= 0 [K, R], client k's say in block r (sample count); 0 where it has none.

    Returns:
      Like `server`. A block whose weights are all 0 is returned bit by bit, and what a client of weight 0
      holds has no influence, whatever it is.

    Raises:
      AssertionError: the shapes do not belong together.
    """
    # Whatever does not fit would be broadcast or clipped, silently. Checked when traced, so at no cost.
    chex.assert_equal_shape([weights, layout.slot])
    for name, matrix in server.items():
        chex.assert_shape(matrix, (len(server_layout.owner[name]), None))
        chex.assert_shape(cohort[name], (len(layout.owner[name]), matrix.shape[1]))
    padded = jnp.pad(weights, ((0, 1), (0, 0)))
    place = jnp.asarray(server_layout.slot)[0]

    def one(name):
        weight = padded[layout.owner[name], layout.block[name]]
        at = place[layout.block[name]]
        total = jnp.zeros(len(server_layout.owner[name]), weight.dtype).at[at].add(weight)
        share = (weight / jnp.where(total > 0, total, 1)[at])[:, None]
        sent = jnp.where(weight[:, None] > 0, share * cohort[name], 0)
        average = jnp.zeros_like(server[name]).at[at].add(sent)
        return jnp.where(total[:, None] > 0, average, server[name])

    return {name: one(name) for name in server}


def replace(personal: Packed, federated: Packed, layout: Layout, chosen: Array) -> dict[str, Array]:
    """X_[i,o] = (1 - R) X_[i,o] + R W̃_[i,o] (eq. 4), as a choice: what is not replaced keeps its bits.

    Args:
      personal, federated: laid out as `layout`.
      chosen: bool [K, R], client k takes the federated block r; see `blocks.chosen_blocks`.

    Returns:
      Like `personal`.

    Raises:
      AssertionError: the shapes do not belong together.
    """
    chex.assert_equal_shape([chosen, layout.slot])
    for name, matrix in personal.items():
        chex.assert_shape(matrix, (len(layout.owner[name]), None))
        chex.assert_equal_shape([matrix, federated[name]])
    padded = jnp.pad(chosen, ((0, 1), (0, 0)))

    def one(name):
        flag = padded[layout.owner[name], layout.block[name]]
        return jnp.where(flag[:, None], federated[name], personal[name])

    return {name: one(name) for name in personal}


def flatten_layouts(shards: Sequence[Layout]) -> Layout:
    """One `Layout` over all P positions, for parameters whose shard axis is flattened, [D·G, n]; numpy."""
    positions = len(shards[0].slot)
    total = positions * len(shards)

    def flat(name):
        parts = [
            np.where(shard.owner[name] < positions, shard.owner[name] + number * positions, total)
            for number, shard in enumerate(shards)
        ]
        return np.concatenate(parts).astype(np.int32)

    return Layout(
        np.concatenate([shard.slot for shard in shards]),
        {name: flat(name) for name in shards[0].owner},
        {name: np.concatenate([shard.block[name] for shard in shards]) for name in shards[0].block},
    )


def flat(packed: Packed) -> Packed:
    """Without the axis of shards, [D·G, n]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), packed)
