"""By how much the average of LoRA's factors misses the average of what they stand for.

FedAvg averages A and B each, and mean(B)·mean(A) is not mean(BA): what is missing is Σ_k p_k (B_k - B̄)(A_k - Ā), with
p_k client k's share in the average. Its norm follows from products of A's with A's and of B's with B's, which have the
size of the rank; no matrix of the size of the adapted one is made.

Letters: P positions, R blocks, G slots of a group, n parameters of one of its blocks, L adapters side by side, r rank.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.blocks import Seats, Stack, Tree, unflatten
from tap_jax.models.lora import adapters


def lora_gap(stack: Stack, seats: Seats, weights: Array, trees: Mapping[str, Tree]) -> Array | None:
    """‖mean(BA) - mean(B)·mean(A)‖ / ‖mean(BA)‖, with Frobenius norms over all adapters of all blocks that were sent.

    Args:
      stack: what the clients sent, group -> [G, n]. seats: of it.
      weights: w[k, r] >= 0 [P, R], as in `blocks.aggregate`; what has weight 0 is not looked at.
      trees: group -> the tree of one of its blocks, of arrays or shapes.

    Returns:
      float32 scalar: 0 where all clients sent the same or every block has one sender. None where there is no adapter.
    """
    padded = jnp.pad(weights, ((0, 1), (0, 0)))
    sums = []
    for group, tree in trees.items():
        if not adapters(tree):
            continue
        weight, block = padded[seats.client[group], seats.block[group]], jnp.asarray(seats.block[group])
        said = (block[:, None] == block[None, :]) * weight[None, :]  # [G, G]: h's say in what g is averaged with
        total = said.sum(1)
        said = said / jnp.where(total > 0, total, 1)[:, None]
        share = weight / jnp.where(total > 0, total, 1)
        for a, b in adapters(unflatten(jnp.where(weight[:, None] > 0, stack[group], 0), tree)):
            sums.append(_squares(a, b, said, share))
    if not sums:
        return None
    gap, whole = (sum(parts) for parts in zip(*sums, strict=True))
    return jnp.sqrt(jnp.maximum(gap, 0) / jnp.where(whole > 0, whole, 1))


def _squares(a: Array, b: Array, said: Array, share: Array) -> tuple[Array, Array]:
    """The squares of both norms over the blocks of a group, for one of their adapters.

    Args:
      a: [G, ..., inputs, r]. b: [G, ..., r, outputs].
      said: p_h [G, G] where slots g and h have the same block, else 0. share: p_g [G].
    """

    def inner(a, b):
        """Σ_g p_g p_h ⟨A_g B_g, A_h B_h⟩ over slots of the same block."""
        products = jnp.einsum("gir,his->ghrs", a, a) * jnp.einsum("gro,hso->ghrs", b, b)
        return (share[:, None] * said * products.sum((2, 3))).sum()

    def one(sums, pair):
        a, b = pair
        centred = (x - jnp.einsum("gh,h...->g...", said, x) for x in pair)
        return (sums[0] + inner(*centred), sums[1] + inner(a, b)), None

    side_by_side = (jnp.moveaxis(x.reshape(len(x), -1, *x.shape[-2:]), 1, 0) for x in (a, b))
    zero = jnp.zeros((), a.dtype)
    return jax.lax.scan(one, (zero, zero), tuple(side_by_side))[0]
