"""Logits over a vocabulary that are not computed yet: the two matrices whose product they are.

The logits of N tokens over V words take 4·N·V bytes, more than all else that a training step keeps. So a model hands
out their factors, and a loss multiplies them a block of tokens at a time.

Letters: D width, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class TokenLogits(NamedTuple):
    """The logits `hidden @ projection` of tokens, as factors.

    Attributes:
      hidden: [..., D], what a text decoder's last LayerNorm returns, in the compute type.
      projection: [D, V], float32.
    """

    hidden: Array
    projection: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits: [..., V]."""
        return (*self.hidden.shape[:-1], self.projection.shape[-1])

    def whole(self) -> Array:
        """The logits, float32 [..., V]; factors are multiplied in the compute type and summed in float32."""
        return float32_product("...d,dv->...v", self.hidden, self.projection.astype(self.hidden.dtype))


def whole(outputs: Array | TokenLogits) -> Array:
    """A model's outputs as one array, whatever they are."""
    return outputs.whole() if isinstance(outputs, TokenLogits) else outputs


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def float32_product(subscripts: str, x: Array, y: Array) -> Array:
    """`einsum` of two arrays of one type, summed and returned in float32; its gradients are products in that type.

    Without a rule of its own the gradient would multiply a float32 array by a bfloat16 one, and compilers make a
    float32 product of that.
    """
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


@float32_product.defjvp
def _(subscripts: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    tangent = jnp.einsum(subscripts, dx, y) + jnp.einsum(subscripts, x, dy)
    return float32_product(subscripts, x, y), tangent.astype(jnp.float32)
