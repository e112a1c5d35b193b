"""The partition of the trainables into blocks B_0..B_R (Sec. 3.1), and everything that is done to blocks.

By name, blocks are a plain mapping `Blocks`: block name -> tree of arrays. For computing, blocks of equal shapes
form a *group*, and many clients' blocks of a group are the rows of one matrix, a `Stack`: a slot holds one client's
block, its leaves one after the other. `Seats` says which client and which block sit in which slot: only owned
blocks have one, so nothing is stored, moved or updated for blocks a client does not have.

Letters: K clients, R blocks, O tasks, G slots of a group, n parameters of one of its blocks.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

Tree = Any
Blocks = Mapping[str, Tree]
Stack = Mapping[str, Array]
PRIVATE = "private/"  # how names and groups of blocks begin that are never sent


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


def take(blocks: Blocks, names: Sequence[str]) -> dict[str, Tree]:
    """The named blocks, P_{B_i} W̃; nothing is copied."""
    return {name: blocks[name] for name in names}


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which blocks there are and which of them each task touches.

    Attributes:
      names: block names, R of them.
      groups: the group of each block; blocks of one group have equal shapes.
      touches: bool [O, R], B_o: block r lies on a path of task o.
      task_mask: bool [K, O], client k has task o.

    Blocks whose name begins with `PRIVATE` are never sent: their owners have them beside the others (`with_private`).
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    touches: np.ndarray
    task_mask: np.ndarray

    @functools.cached_property
    def owned(self) -> np.ndarray:
        """bool [K, R], read-only: a client owns the union of its tasks' blocks."""
        found = (self.task_mask.astype(int) @ self.touches.astype(int)) > 0
        found.flags.writeable = False
        return found

    @property
    def sent(self) -> np.ndarray:
        """bool [R]: the blocks that clients and server exchange, all but the private ones."""
        return np.array([not name.startswith(PRIVATE) for name in self.names])

    @property
    def chained(self) -> tuple[str, ...]:
        """The blocks that clients keep from round to round: the private ones where there are any, else all."""
        private = tuple(name for name, sent in zip(self.names, self.sent, strict=True) if not sent)
        return private or self.names

    def with_private(self, names: Sequence[str]) -> "Partition":
        """The partition with a private twin of each of the named blocks, in a group of its own, behind the others."""
        twins = [self.names.index(name) for name in names]
        return Partition(
            (*self.names, *(PRIVATE + name for name in names)),
            (*self.groups, *(PRIVATE + self.groups[r] for r in twins)),
            np.concatenate([self.touches, self.touches[:, twins]], axis=1),
            self.task_mask,
        )

    def blocks_of(self, client: int) -> tuple[str, ...]:
        """Names of the blocks that client number `client` owns."""
        return tuple(name for name, owns in zip(self.names, self.owned[client], strict=True) if owns)

    def replaceable(self, scope: str = "task") -> np.ndarray:
        """bool [K, O, R]: the blocks that client k's replacement for task o takes.

        With scope "task" all of B_o (eq. 4); with "exclusive" only those no other task of the client touches.
        """
        mine = self.task_mask[:, :, None] & self.touches[None]
        if scope == "exclusive":
            mine &= mine.sum(1, keepdims=True) == 1
        return mine

    def members(self) -> dict[str, np.ndarray]:
        """Group -> int [.], the blocks of the group in order."""
        groups = np.array(self.groups)
        return {group: np.flatnonzero(groups == group) for group in dict.fromkeys(self.groups)}

    def capacities(self, owned: np.ndarray, clients: int) -> dict[str, int]:
        """Group -> slots that any `clients` of the federation's clients can fill, at least 1.

        Args:
          owned: bool [K, R] of the federation.
        """
        counts = {group: np.sort(owned[:, blocks].sum(1))[::-1] for group, blocks in self.members().items()}
        return {group: max(1, int(count[:clients].sum())) for group, count in counts.items()}


class Seats(struct.PyTreeNode):
    """Who sits where in a stack.

    Attributes:
      slot: int32 [K, R], the slot of client k's block r in its group; 0 where k does not own r.
      client: group -> int32 [G], the client (position) in each slot, K where the slot is idle.
      block: group -> int32 [G], the block (0..R-1) in each slot, some block of the group where idle.
    """

    slot: Array
    client: Mapping[str, Array]
    block: Mapping[str, Array]


def seat(partition: Partition, owned: np.ndarray, capacities: Mapping[str, int] | None = None) -> Seats:
    """Seats without gaps, client by client and block by block; numpy leaves.

    Args:
      owned: bool [K, R], what each of K positions holds (a row of False is an empty position).
      capacities: group -> slots to provide; None: just enough, and at least 1.

    Raises:
      ValueError: a group has more holders than slots.
    """
    slot = np.zeros(owned.shape, np.int32)
    client, block = {}, {}
    for group, blocks in partition.members().items():
        holders, position = np.nonzero(owned[:, blocks])
        size = max(1, len(holders)) if capacities is None else capacities[group]
        if len(holders) > size:
            raise ValueError(f"{group}: {len(holders)} holders for {size} slots")
        slot[holders, blocks[position]] = np.arange(len(holders))
        client[group] = np.full(size, len(owned), np.int32)
        client[group][: len(holders)] = holders
        block[group] = np.full(size, blocks[0], np.int32)
        block[group][: len(holders)] = blocks[position]
    return Seats(slot, client, block)


def server_seats(partition: Partition) -> Seats:
    """Seats of one holder of everything: the server, or a teacher of all tasks."""
    return seat(partition, np.ones((1, len(partition.names)), bool))


def pack(partition: Partition, seats: Seats, holders: Sequence[Blocks], like: Blocks) -> dict[str, np.ndarray]:
    """The stack of what the holders have, on the host; idle slots are zero.

    Args:
      holders: one mapping per position, with at least the blocks it owns of the groups wanted.
      like: any mapping with the shapes of every block of the groups wanted; which these are, it says.

    Returns:
      Group -> float32 [G, n].
    """
    stack = {}
    for group, blocks in partition.members().items():
        if partition.names[blocks[0]] not in like:
            continue
        clients, numbers = np.asarray(seats.client[group]), np.asarray(seats.block[group])
        matrix = np.zeros((len(clients), count(like[partition.names[blocks[0]]])), np.float32)
        for g in np.flatnonzero(clients < len(seats.slot)):
            leaves = jax.tree.leaves(holders[clients[g]][partition.names[numbers[g]]])
            np.concatenate([np.ravel(leaf) for leaf in leaves], out=matrix[g])
        stack[group] = matrix
    return stack


def unpack(partition: Partition, seats: Seats, stack: Stack, like: Blocks) -> list[dict[str, Tree]]:
    """The inverse of `pack`: per position the blocks it holds, by name, copied to the host."""
    out: list[dict[str, Tree]] = [{} for _ in range(len(seats.slot))]
    for group, matrix in jax.device_get(dict(stack)).items():
        numbers = np.asarray(seats.block[group])
        for g, position in enumerate(np.asarray(seats.client[group])):
            if position < len(out):
                name = partition.names[numbers[g]]
                out[position][name] = unflatten(np.array(matrix[g]), like[name])
    return out


def broadcast(server: Stack, server_seats: Seats, seats: Seats) -> dict[str, Array]:
    """W̃[i] = P_{B_i} W̃ for every seated client: the server's blocks in the slots of their holders.

    Args:
      server: W̃, stack of `server_seats`.
      seats: where the clients sit.

    Returns:
      A stack of `seats`; idle slots hold some block of their group.
    """
    place = jnp.asarray(server_seats.slot)[0]
    return {group: matrix[place[seats.block[group]]] for group, matrix in server.items()}


def aggregate(server: Stack, cohort: Stack, server_seats: Seats, seats: Seats, weights: Array) -> dict[str, Array]:
    """Component-wise FedAvg (Sec. 3.1): each block is averaged over the clients that sent it.

    What is averaged for a LoRA pair is A and B each; mean(B)·mean(A) is not mean(BA).

    Args:
      server: W̃, stack of `server_seats`.
      cohort: what the clients sent, stack of `seats`.
      server_seats, seats: which block, and whose, is in which slot of the two; see `seat`.
      weights: w[k, r] >= 0 [K, R], client k's say in block r (sample count); 0 where it has none.

    Returns:
      A stack like `server`. A block whose weights are all 0 is returned bit by bit, and what a client of weight 0
      holds has no influence, whatever it is.

    Raises:
      AssertionError: the shapes do not belong together.

    Example:
      Two clients with twice and once as many samples; the second does not own the head.

      >>> import numpy as np
      >>> import tap_jax as tap
      >>> from tap_jax.blocks import Partition, seat, server_seats
      >>> touches = np.array([[True, True], [True, False]])  # task 0 uses encoder and head, task 1 the encoder
      >>> partition = Partition(("encoder", "head"), ("encoder", "head"), touches, task_mask=np.eye(2, dtype=bool))
      >>> server = {"encoder": np.zeros((1, 1)), "head": np.zeros((1, 1))}
      >>> sent = {"encoder": np.array([[1.0], [4.0]]), "head": np.array([[5.0]])}
      >>> weights = np.array([[2.0, 2.0], [1.0, 0.0]])
      >>> new = tap.aggregate(server, sent, server_seats(partition), seat(partition, partition.owned), weights)
      >>> new["encoder"].tolist(), new["head"].tolist()
      ([[2.0]], [[5.0]])
    """
    # Whatever does not fit would be broadcast or clipped, silently. Checked when traced, so at no cost.
    chex.assert_equal_shape([weights, seats.slot])
    for group, matrix in server.items():
        chex.assert_shape(matrix, (len(server_seats.client[group]), None))
        chex.assert_shape(cohort[group], (len(seats.client[group]), matrix.shape[1]))
    padded = jnp.pad(weights, ((0, 1), (0, 0)))
    place = jnp.asarray(server_seats.slot)[0]

    def one(group):
        weight = padded[seats.client[group], seats.block[group]]
        at = place[seats.block[group]]
        total = jnp.zeros(len(server_seats.client[group]), weight.dtype).at[at].add(weight)
        share = (weight / jnp.where(total > 0, total, 1)[at])[:, None]
        sent = jnp.where(weight[:, None] > 0, share * cohort[group], 0)
        average = jnp.zeros_like(server[group]).at[at].add(sent)
        return jnp.where(total[:, None] > 0, average, server[group])

    return {group: one(group) for group in server}


def replacement_indicator(local_loss: Array, personal_loss: Array, margin: Array, seen: Array) -> Array:
    """R_i[o] of equation 3: 1 where h^(l) + m < h^(p), for tasks seen in this round.

    Args:
      local_loss, personal_loss: h^(l), h^(p) [K, O]; h^(p) = +inf before a client's first participation, so
        that one always replaces.
      margin: m [O] or [K, O], in the loss's units.
      seen: bool [K, O].

    Returns:
      bool [K, O]. A loss that is not a number never leads to a replacement.

    Example:
      >>> import numpy as np
      >>> import tap_jax as tap
      >>> h_l, h_p = np.array([[0.50, 0.50]]), np.array([[0.52, 0.505]])
      >>> tap.replacement_indicator(h_l, h_p, 0.01, np.array([[True, True]])).tolist()
      [[True, False]]
    """
    return seen & (local_loss + margin < personal_loss)


def replace(personal: Stack, federated: Stack, seats: Seats, chosen: Array) -> dict[str, Array]:
    """X_[i,o] = (1 - R) X_[i,o] + R W̃_[i,o] (eq. 4), as a choice: what is not replaced keeps its bits.

    Args:
      personal, federated: stacks of `seats`.
      chosen: bool [K, R], client k takes the federated block r; see `chosen_blocks`.

    Returns:
      A stack like `personal`.

    Raises:
      AssertionError: the shapes do not belong together.

    Example:
      One client with two blocks, of which it takes the first.

      >>> import numpy as np
      >>> import tap_jax as tap
      >>> from tap_jax.blocks import Partition, seat
      >>> one = np.ones((1, 1), bool)
      >>> partition = Partition(("encoder", "head"), ("encoder", "head"), touches=one.repeat(2, 1), task_mask=one)
      >>> personal = {"encoder": np.array([[1.0]]), "head": np.array([[1.0]])}
      >>> federated = {"encoder": np.array([[2.0]]), "head": np.array([[2.0]])}
      >>> seats = seat(partition, partition.owned)
      >>> new = tap.replace(personal, federated, seats, np.array([[True, False]]))
      >>> new["encoder"].tolist(), new["head"].tolist()
      ([[2.0]], [[1.0]])
    """
    chex.assert_equal_shape([chosen, seats.slot])
    for group, matrix in personal.items():
        chex.assert_shape(matrix, (len(seats.client[group]), None))
        chex.assert_equal_shape([matrix, federated[group]])
    padded = jnp.pad(chosen, ((0, 1), (0, 0)))

    def one(group):
        flag = padded[seats.client[group], seats.block[group]]
        return jnp.where(flag[:, None], federated[group], personal[group])

    return {group: one(group) for group in personal}


def chosen_blocks(replaced: Array, replaceable: Array) -> Array:
    """bool [K, R]: some task o with R_i[o] = 1 (`replaced` [K, O]) takes block r (`replaceable` [K, O, R])."""
    return (replaced[:, :, None] & replaceable).any(1)


def count(tree: Tree) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Tree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
