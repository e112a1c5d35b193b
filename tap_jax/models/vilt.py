"""ViLT's modality embeddings (Kim et al., 2021): patch projection and word embeddings, no towers.

The patch projection is frozen with LoRA (without, where the model has bottleneck adapters: there is no feed-forward
network here to put one behind); CLS token and position table are trained; the text side is frozen and
has no adapter. Behind both a trainable Linear + LayerNorm.

In HF's names the image side is `ViltEmbeddings.visual_embed` without its shuffling of patches, the text side
`TextEmbeddings`. The modality types that HF adds to both afterwards are left out: the backbone tells the modalities
apart by their stacks, and Table 7 counts no modality types on the image side. Neither is ViLT's last LayerNorm on a
path, since only the first layers of its encoder are.
"""

import math

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
from tap_jax.models.lora import FrozenDense, frozen, stand_in_positions

_normal = nn.initializers.normal(0.02)


class ImageEncoder(nn.Module):
    """images [B, 64, 64, 3], standardised -> tokens [B, 1 + (image_size/patch)², D], in the images' type.

    The mask is None: every patch is real. The pre-trained position table (12×12 in dandelin/vilt-*, plus CLS) is a
    parameter of its full size; it is brought to the grid in use inside the model, by bilinear interpolation or by
    taking its top-left corner (`position`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, images: Array, mask: None, *, deterministic: bool) -> Array:
        c = self.config
        x = InputAdaptor(c, name="adaptor")(images)
        rank = 0 if c.bottleneck else c.encoder_rank
        project = FrozenDense(c.width, rank, c.lora_alpha_ratio * rank, c.lora_dropout, name="patch")
        x = project(patches(x, c.patch), deterministic=deterministic)
        cls = self.param("cls", _normal, (c.width,), jnp.float32).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, c.width)), x], axis=1)
        table = self.param("positions", _normal, (1 + c.position_grid**2, c.width), jnp.float32)
        x = x + position_table(table, c.image_size // c.patch, c.position).astype(x.dtype)
        return OutputProjection(name="output")(x)


class TextEncoder(nn.Module):
    """tokens int32 [B, T] -> [B, T, D], in `config.dtype`; T <= text_rows, the positions stored.

    Positions, int32 [B, T], count from 0 in every sequence, unless they are given, each below text_rows.
    Token by token: the mask makes no difference, nor does `deterministic`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, positions: Array | None = None, deterministic: bool) -> Array:
        c = self.config
        words = frozen(self, "words", _normal, (c.vocab, c.width))
        table = frozen(self, "positions", stand_in_positions, (c.text_rows, c.width))
        place = table[: tokens.shape[1]] if positions is None else table[positions]
        types = frozen(self, "types", stand_in_positions, (2, c.width))
        x = (words[tokens] + place + types[0]).astype(c.dtype)
        x = FrozenLayerNorm(c.layer_norm_eps, name="embedding_norm")(x)
        return OutputProjection(name="output")(x)


def position_table(table: Array, grid: int, how: str) -> Array:
    """[1 + G², D] -> [1 + grid², D]: the CLS row kept, the G×G grid brought to grid×grid.

    Args:
      how: "interpolate": bilinearly, so that corners stay corners; "slice": its top-left corner, where grid <= G.
    """
    side = math.isqrt(table.shape[0] - 1)
    cells = table[1:].reshape(side, side, -1)
    if how == "interpolate":
        matrix = jnp.asarray(bilinear_matrix(side, grid, align_corners=True), table.dtype)
        cells = jnp.einsum("ph,qw,hwd->pqd", matrix, matrix, cells)
    else:
        cells = cells[:grid, :grid]
    return jnp.concatenate([table[:1], cells.reshape(grid * grid, -1)])
