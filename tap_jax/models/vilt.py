"""ViLT's modality embeddings (Kim et al., 2021): patch projection and word embeddings, no towers.

The patch projection is frozen with LoRA; CLS token and position table are trained; the text side is frozen and
has no adapter. Behind both a trainable Linear + LayerNorm.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tap_jax.models.layers import (
    FrozenLayerNorm,
    InputAdaptor,
    ModelConfig,
    OutputProjection,
    bilinear_matrix,
    patches,
)
from tap_jax.models.lora import FrozenDense, frozen

_normal = nn.initializers.normal(0.02)
PRETRAINED_GRID = 12  # dandelin/vilt-*: 384 pixels in patches of 32


class ImageEncoder(nn.Module):
    """images [B, 64, 64, 3], standardised -> tokens [B, 1 + (image_size/patch)², D].

    The pre-trained 12×12 position table (plus CLS) is a parameter of its full size; it is brought to the grid in
    use inside the model, by bilinear interpolation or by taking its top-left corner (`position`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, images: Array, mask: None, *, deterministic: bool) -> Array:
        c = self.config
        x = InputAdaptor(c, name="adaptor")(images)
        rank = c.encoder_rank
        project = FrozenDense(c.width, rank, c.lora_alpha_ratio * rank, c.lora_dropout, name="patch")
        x = project(patches(x, c.patch), deterministic=deterministic)
        cls = self.param("cls", _normal, (c.width,), jnp.float32).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, c.width)), x], axis=1)
        table = self.param("positions", _normal, (1 + PRETRAINED_GRID**2, c.width), jnp.float32)
        x = x + position_table(table, c.image_size // c.patch, c.position).astype(x.dtype)
        return OutputProjection(name="output")(x)


class TextEncoder(nn.Module):
    """tokens int32 [B, T], mask bool [B, T] -> [B, T, D]; T <= max_text."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, deterministic: bool) -> Array:
        c = self.config
        words = frozen(self, "words", _normal, (c.vocab, c.width))
        positions = frozen(self, "positions", _normal, (c.max_text, c.width))
        types = frozen(self, "types", _normal, (2, c.width))
        x = (words[tokens] + positions[: tokens.shape[1]] + types[0]).astype(c.dtype)
        x = FrozenLayerNorm(c.layer_norm_eps, name="embedding_norm")(x)
        return OutputProjection(name="output")(x)


def position_table(table: Array, grid: int, how: str) -> Array:
    """[1 + 144, D] -> [1 + grid², D]: CLS row kept, the 12×12 grid interpolated or sliced."""
    cells = table[1:].reshape(PRETRAINED_GRID, PRETRAINED_GRID, -1)
    if how == "interpolate":
        matrix = jnp.asarray(bilinear_matrix(PRETRAINED_GRID, grid), table.dtype)
        cells = jnp.einsum("ph,qw,hwd->pqd", matrix, matrix, cells)
    else:
        cells = cells[:grid, :grid]
    return jnp.concatenate([table[:1], cells.reshape(grid * grid, -1)])
