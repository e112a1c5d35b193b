"""The partition of the trainables into blocks B_0..B_R (Sec. 3.1), and everything that is done to blocks.

`Blocks` maps a block name to a tree of arrays. In a *stack* every leaf has a leading slot axis, and each block has
only as many slots as there are holders: `Slots` says in which slot of a block a client sits. A dense stack with
one slot per client is the special case `slot[k, r] = k`.

Letters: K clients, R blocks, S_r slots of block r, O tasks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree = Any
Blocks = Mapping[str, Tree]


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which blocks there are and which of them each task touches.

    Attributes:
      names: block names, R of them.
      touches: bool [O, R], B_o: block r lies on a path of task o.
      task_mask: bool [K, O], client k has task o.
    """

    names: tuple[str, ...]
    touches: np.ndarray
    task_mask: np.ndarray

    @property
    def owned(self) -> np.ndarray:
        """bool [K, R]: a client owns the union of its tasks' blocks."""
        return (self.task_mask.astype(int) @ self.touches.astype(int)) > 0

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


def take(blocks: Blocks, names: Sequence[str]) -> dict[str, Tree]:
    """The named blocks, W̃[i] = P_{B_i} W̃."""
    return {name: blocks[name] for name in names}


def put(blocks: Blocks, update: Blocks) -> dict[str, Tree]:
    """`blocks` with those in `update` exchanged; nothing is copied.

    Raises:
      KeyError: `update` names a block that is not there.
    """
    unknown = set(update) - set(blocks)
    if unknown:
        raise KeyError(f"no such block: {', '.join(sorted(unknown))}")
    return {**blocks, **update}


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the clients of a cohort sit in a stack.

    Attributes:
      index: int32 [K, R], slot of client k in block r (0 where it does not own r).
      owned: bool [K, R].
      sizes: S_r per block; slots past the holders of a cohort are idle.
    """

    index: np.ndarray
    owned: np.ndarray
    sizes: tuple[int, ...]

    def holders(self, block: int) -> np.ndarray:
        """int32 [S_r]: the cohort position that sits in each slot of the block, -1 where idle."""
        out = np.full(self.sizes[block], -1, np.int32)
        clients = np.flatnonzero(self.owned[:, block])
        out[self.index[clients, block]] = clients
        return out


def compact_slots(owned: np.ndarray, sizes: Sequence[int] | None = None) -> Slots:
    """Slots without gaps: the k-th holder of a block takes its k-th slot.

    Args:
      owned: bool [K, R].
      sizes: S_r to provide for; at least the number of holders. None: exactly that, and at least 1.

    Raises:
      ValueError: more holders than slots in some block.
    """
    counts = owned.sum(0)
    sizes = tuple(int(s) for s in (np.maximum(counts, 1) if sizes is None else sizes))
    if (counts > np.array(sizes)).any():
        raise ValueError("more holders than slots")
    index = np.where(owned, np.cumsum(owned, axis=0) - 1, 0).astype(np.int32)
    return Slots(index, owned, sizes)


def gather(clients: Sequence[Blocks], slots: Slots, names: Sequence[str], like: Blocks) -> dict[str, Tree]:
    """Host-side stack of the clients' blocks: leaves [S_r, ...]; idle slots are zero.

    Args:
      clients: one mapping per cohort position, holding at least the blocks it owns.
      like: any mapping with every block's shapes and dtypes.
    """
    stack = {}
    for r, name in enumerate(names):
        holders = slots.holders(r)

        def leaf(like_leaf, *held, holders=holders):
            out = np.zeros((len(holders), *like_leaf.shape), like_leaf.dtype)
            for slot, value in zip(np.flatnonzero(holders >= 0), held, strict=True):
                out[slot] = value
            return out

        held = [clients[k][name] for k in holders if k >= 0]
        stack[name] = jax.tree.map(leaf, like[name], *held)
    return stack


def scatter(stack: Blocks, slots: Slots, names: Sequence[str]) -> list[dict[str, Tree]]:
    """The inverse of `gather`: per cohort position the blocks it owns, as host arrays."""
    host = jax.device_get(dict(stack))
    return [
        {
            name: jax.tree.map(lambda leaf, s=slots.index[k, r]: leaf[s].copy(), host[name])
            for r, name in enumerate(names)
            if slots.owned[k, r]
        }
        for k in range(len(slots.index))
    ]


def broadcast(server: Blocks, sizes: Mapping[str, int]) -> dict[str, Tree]:
    """The server's blocks in every slot of a stack: leaves [...] -> [S_r, ...]."""
    return {
        name: jax.tree.map(lambda leaf, s=sizes[name]: jnp.broadcast_to(leaf, (s, *leaf.shape)), tree)
        for name, tree in server.items()
    }


def aggregate(server: Blocks, cohort: Blocks, weights: Mapping[str, Array]) -> dict[str, Tree]:
    """Component-wise FedAvg (Sec. 3.1): each block is averaged over the clients that sent it.

    What is averaged for a LoRA pair is A and B each; mean(B)·mean(A) is not mean(BA).

    Args:
      server: block name -> tree of arrays, shapes [...].
      cohort: the same names and trees with a leading slot axis, shapes [S_r, ...].
      weights: block name -> [S_r], each slot's say in the block (sample count); 0 where nobody sits.

    Returns:
      Trees shaped like `server`. A block whose weights are all 0 is returned unchanged, and a slot of weight 0
      has no influence, whatever it holds.
    """

    def mean(old, sent, weight):
        weight = weight.reshape(-1, *(1,) * old.ndim).astype(old.dtype)
        total = weight.sum()
        share = weight / jnp.where(total > 0, total, 1)
        average = jnp.where(weight > 0, share * sent, 0).sum(0)
        return jnp.where(total > 0, average, old)

    return {
        name: jax.tree.map(lambda old, sent, w=weights[name]: mean(old, sent, w), tree, cohort[name])
        for name, tree in server.items()
    }


def replacement_indicator(local_loss: Array, personal_loss: Array, margin: Array, seen: Array) -> Array:
    """R_i[o] of equation 3: 1 where h^(l) + m < h^(p), for tasks seen in this round.

    Args:
      local_loss, personal_loss: h^(l), h^(p) [K, O]; h^(p) = +inf before a client's first participation, so
        that one always replaces.
      margin: m [O] or [K, O], in the loss's units.
      seen: bool [K, O].

    Returns:
      bool [K, O]. A loss that is not a number never leads to a replacement.
    """
    return seen & (local_loss + margin < personal_loss)


def replace(personal: Blocks, federated: Blocks, chosen: Mapping[str, Array]) -> dict[str, Tree]:
    """X_[i,o] = (1 - R) X_[i,o] + R W̃_[i,o] (eq. 4), as a choice: what is not replaced keeps its bits.

    Args:
      personal, federated: stacks with equal shapes [S_r, ...].
      chosen: block name -> bool [S_r], true where the slot's client takes the federated block.
    """

    def pick(mine, theirs, flag):
        return jnp.where(flag.reshape(-1, *(1,) * (mine.ndim - 1)), theirs, mine)

    return {
        name: jax.tree.map(lambda mine, theirs, c=chosen[name]: pick(mine, theirs, c), tree, federated[name])
        for name, tree in personal.items()
    }


def count(tree: Tree) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Tree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
