"""How the tokens of a batch belong to its samples: one sequence each, or several samples packed into one.

Letters: S samples, B sequences, T tokens of a sequence, D width.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array


class TokenLayout(struct.PyTreeNode):
    """Which tokens are real, which belong together, and how a sample's tokens are averaged.

    Attributes:
      real: bool [B, T].
      segments: int32 [B, T], the sample of each token, -1 where it is padding; None where sequence b is sample b.
      samples: S.
    """

    real: Array
    segments: Array | None = None
    samples: int = struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.real.shape

    @property
    def mask(self) -> Array:
        """For attention: bool [B, T], the keys that are real, or bool [B, T, T], the pairs of one sample."""
        return self.real if self.segments is None else same_segment(self.segments)

    def mean(self, states: Array) -> Array:
        """The mean over each sample's real tokens, [..., B, T, D] -> [..., S, D]; 0 where there is none."""
        if self.segments is None:
            weight = self.real.astype(states.dtype)
            weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
            return jnp.einsum("...btd,bt->...bd", states, weight)
        owner = self.segments.reshape(-1) == jnp.arange(self.samples, dtype=self.segments.dtype)[:, None]
        weight = owner.astype(states.dtype)
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
        return jnp.einsum("...td,st->...sd", states.reshape(*states.shape[:-3], -1, states.shape[-1]), weight)


def same_segment(segments: Array) -> Array:
    """bool [B, T, T], tokens of one sample, from int32 [B, T]; padding is with padding, so that no row is empty."""
    return segments[:, :, None] == segments[:, None, :]
