"""The blocks B_0..B_R of the trainables (Sec. 3.1), and the paper's operators on them, on plain trees.

A client's parameters are a mapping from block names to trees of arrays. Those of many clients are a list of such
mappings, one a client with the blocks that it owns; or one mapping whose leaves have a leading client axis, as vmap
wants them. Who owns what is a mask. All operators are pure and work under jit, vmap and grad, on any trees.

Letters: K clients, R blocks, O tasks.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree = Any
Blocks = Mapping[str, Tree]
Params = Any  # of a cohort's clients, as the engine packs them: a tree of arrays for jax.tree.map and optax
PRIVATE = "private/"  # how names and shape classes of blocks begin that are never sent


def select(params: Blocks, names: Sequence[str]) -> dict[str, Tree]:
    """The named blocks, P_{B_i} W̃ for the blocks of client i. Nothing is copied.

    Args:
      params: block name -> tree.
      names: of blocks in `params`.

    Raises:
      KeyError: a name that `params` does not have.

    Example:
      >>> import tap_jax as tap
      >>> tap.select({"encoder": 1.0, "head": 2.0}, ["head"])
      {'head': 2.0}
    """
    return {name: params[name] for name in names}


def ownership(task_mask: np.ndarray, touches: np.ndarray) -> np.ndarray:
    """bool [K, R]: a client owns the union of its tasks' blocks (Sec. 3.1).

    Args:
      task_mask: bool [K, O], client k has task o.
      touches: bool [O, R], B_o: task o's forward pass goes through block r.

    Example:
      Both tasks use the encoder, each has a head; the second client has the second task alone.

      >>> import tap_jax as tap
      >>> touches = [[True, True, False], [True, False, True]]
      >>> tap.ownership([[True, True], [False, True]], touches).tolist()
      [[True, True, True], [True, False, True]]
    """
    return (np.asarray(task_mask, int) @ np.asarray(touches, int)) > 0


def replaceable(task_mask: np.ndarray, touches: np.ndarray, scope: str = "task") -> np.ndarray:
    """bool [K, O, R]: the blocks that client k's replacement for task o takes.

    Args:
      task_mask, touches: as of `ownership`.
      scope: "task" for all of B_o (eq. 4); "exclusive" for those that no other task of the client touches.
    """
    mine = np.asarray(task_mask, bool)[:, :, None] & np.asarray(touches, bool)[None]
    if scope == "exclusive":
        mine &= mine.sum(1, keepdims=True) == 1
    return mine


def chosen_blocks(indicator: Array, replaceable: Array) -> Array:
    """bool [K, R]: the blocks that some task o with R_i[o] = 1 takes.

    Args:
      indicator: bool [K, O], R of equation 3.
      replaceable: bool [K, O, R], see `replaceable`.
    """
    return (indicator[:, :, None] & replaceable).any(1)


def by_block(names: Sequence[str], mask: Array) -> dict[str, Array]:
    """A table [..., R] as block name -> [...]: the masks and weights that `replace` and `aggregate` take."""
    return {name: mask[..., r] for r, name in enumerate(names)}


def aggregate(
    server: Blocks, clients: Sequence[Blocks] | Blocks, weights: Array | Mapping[str, Array]
) -> dict[str, Tree]:
    """Component-wise FedAvg (Sec. 3.1): each block is averaged over the clients that send it.

    What is averaged for a LoRA pair is A and B each; mean(B)·mean(A) is not mean(BA).

    Args:
      server: W̃, block name -> tree.
      clients: one mapping per client with the blocks that it sends; or block name -> tree, leaves with a leading
        client axis [K, ...].
      weights: >= 0, sample counts for example: [K], or block name -> [K]. A client of weight 0 has no influence,
        whatever it sends.

    A run computes the same on packed parameters, `engine.packed.aggregate`.

    Returns:
      Block name -> tree, like `server`. A block that no client sends, or whose weights are all 0, keeps its bits.

    Raises:
      AssertionError: the shapes do not belong together.

    Example:
      Two clients with twice and once as many samples; the second does not send the head.

      >>> import numpy as np
      >>> import tap_jax as tap
      >>> server = {"encoder": np.array(0.0), "head": np.array(0.0)}
      >>> sent = [{"encoder": np.array(1.0), "head": np.array(5.0)}, {"encoder": np.array(4.0)}]
      >>> {name: float(mean) for name, mean in tap.aggregate(server, sent, np.array([2.0, 1.0])).items()}
      {'encoder': 2.0, 'head': 5.0}
    """
    return {name: _mean_of_owners(name, tree, clients, weights) for name, tree in server.items()}


def _mean_of_owners(name: str, old: Tree, clients: Any, weights: Any) -> Tree:
    weight = jnp.asarray(weights[name] if isinstance(weights, Mapping) else weights)
    if isinstance(clients, Mapping):
        if name not in clients:
            return old
        sent = clients[name]
    else:
        chex.assert_shape(weight, (len(clients),))
        owners = [k for k, params in enumerate(clients) if name in params]
        if not owners:
            return old
        sent = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(clients[k][name] for k in owners))
        weight = weight[np.array(owners)]
    total = weight.sum()
    # By an array: XLA divides by a scalar in multiplying by its reciprocal, which is rounded.
    share = weight / jnp.full_like(weight, jnp.where(total > 0, total, 1))

    def mean(old: Array, leaf: Array) -> Array:
        chex.assert_shape(leaf, (*weight.shape, *jnp.shape(old)))
        part = jnp.expand_dims(share, range(1, leaf.ndim)).astype(leaf.dtype)
        return jnp.where(total > 0, jnp.where(part > 0, part * leaf, 0).sum(0), old)

    return jax.tree.map(mean, old, sent)


def replacement_indicator(
    local_loss: Array, personal_loss: Array | np.ndarray, margin: Array | np.ndarray, seen: Array
) -> Array:
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


def replace(personal: Blocks, federated: Blocks, chosen: Mapping[str, Array]) -> dict[str, Tree]:
    """X_[i,o] = (1 - R) X_[i,o] + R W̃_[i,o] (eq. 4), as a choice: what is not replaced keeps its bits.

    A run computes the same on packed parameters, `engine.packed.replace`.

    Args:
      personal: X[i], block name -> tree; or of many clients, leaves [K, ...].
      federated: W̃[i] after its local training; at least the blocks of `chosen`.
      chosen: block name -> bool, or bool [K]: whether the federated block is taken. What is not in it stays.

    Returns:
      Block name -> tree, like `personal`.

    Raises:
      AssertionError: the shapes do not belong together.

    Example:
      >>> import numpy as np
      >>> import tap_jax as tap
      >>> personal, federated = {"encoder": np.array(1.0), "head": np.array(1.0)}, {"encoder": np.array(2.0)}
      >>> {name: float(x) for name, x in tap.replace(personal, federated, {"encoder": True}).items()}
      {'encoder': 2.0, 'head': 1.0}
    """

    def one(flag: Array, old: Tree, new: Tree) -> Tree:
        def choose(old: Array, new: Array) -> Array:
            chex.assert_equal_shape([old, new])
            return jnp.where(jnp.expand_dims(flag, range(flag.ndim, jnp.ndim(old))), new, old)

        return jax.tree.map(choose, old, new)

    return {
        name: one(jnp.asarray(chosen[name]), tree, federated[name]) if name in chosen else tree
        for name, tree in personal.items()
    }


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which blocks there are and which of them each task touches.

    Attributes:
      names: block names, R of them.
      shape_classes: of each block; blocks of one class have equal shapes (`engine.packed`).
      touches: bool [O, R], B_o: block r lies on a path of task o.
      task_mask: bool [K, O], client k has task o.

    Blocks whose name begins with `PRIVATE` are never sent: their owners have them beside the others (`with_private`).
    """

    names: tuple[str, ...]
    shape_classes: tuple[str, ...]
    touches: np.ndarray
    task_mask: np.ndarray

    @functools.cached_property
    def owned(self) -> np.ndarray:
        """bool [K, R], read-only: a client owns the union of its tasks' blocks."""
        found = ownership(self.task_mask, self.touches)
        found.flags.writeable = False
        return found

    @property
    def sent(self) -> np.ndarray:
        """bool [R]: the blocks that clients and server exchange, all but the private ones."""
        return np.array([not name.startswith(PRIVATE) for name in self.names])

    @property
    def kept(self) -> tuple[str, ...]:
        """The blocks that clients keep from round to round: the private ones where there are any, else all."""
        private = tuple(name for name, sent in zip(self.names, self.sent, strict=True) if not sent)
        return private or self.names

    def with_private(self, names: Sequence[str]) -> "Partition":
        """The partition with a private twin of each named block, in a shape class of its own, behind the others."""
        twins = [self.names.index(name) for name in names]
        return Partition(
            (*self.names, *(PRIVATE + name for name in names)),
            (*self.shape_classes, *(PRIVATE + self.shape_classes[r] for r in twins)),
            np.concatenate([self.touches, self.touches[:, twins]], axis=1),
            self.task_mask,
        )

    def blocks_of(self, client: int) -> tuple[str, ...]:
        """Names of the blocks that client number `client` owns."""
        return tuple(name for name, owns in zip(self.names, self.owned[client], strict=True) if owns)

    def replaceable(self, scope: str = "task") -> np.ndarray:
        """bool [K, O, R], numpy; see `replaceable`."""
        return replaceable(self.task_mask, self.touches, scope)


def count(tree: Tree) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Tree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
