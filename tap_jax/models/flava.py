"""FLAVA's modality encoders (Singh et al., 2022) as HF's FlavaImageModel and FlavaTextModel compute them.

Frozen towers with LoRA on query and value, or with the bottleneck adapters they are given; in front of the image tower
the trainable adaptor, behind both a trainable Linear + LayerNorm. Poolers, mask token and heads of the checkpoint are
on no path and not stored.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tap_jax.models.layers import (
    FrozenLayerNorm,
    InputAdaptor,
    ModelConfig,
    OutputProjection,
    encoder_layers,
    patches,
)
from tap_jax.models.lora import FrozenDense, Tree, frozen, stand_in_positions

_normal = nn.initializers.normal(0.02)


class ImageEncoder(nn.Module):
    """images [B, 64, 64, 3], standardised -> tokens [B, 1 + (image_size/patch)², D], in the images' type.

    The mask is None: every patch is real. Bottleneck adapters, where there are any, are [image_layers, ...].
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, images: Array, mask: None, adapters: Tree | None = None, *, deterministic: bool) -> Array:
        c = self.config
        x = InputAdaptor(c, name="adaptor")(images)
        x = FrozenDense(c.width, name="patch")(patches(x, c.patch))
        cls = frozen(self, "cls", _normal, (c.width,)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, c.width)), x], axis=1)
        x = x + frozen(self, "positions", _normal, (x.shape[1], c.width)).astype(x.dtype)
        x, _ = encoder_layers(c, c.image_layers, deterministic=deterministic)(x, None, adapters)
        x = FrozenLayerNorm(c.layer_norm_eps, name="norm")(x)
        return OutputProjection(name="output")(x)


class TextEncoder(nn.Module):
    """tokens int32 [B, T], mask as of `attention` -> [B, T, D], in `config.dtype`; T <= text_rows.

    Positions, int32 [B, T], count from 0 in every sequence, unless they are given, each below text_rows.
    Bottleneck adapters, where there are any, are [text_layers, ...].
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        mask: Array,
        adapters: Tree | None = None,
        *,
        positions: Array | None = None,
        deterministic: bool,
    ) -> Array:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        words = frozen(self, "words", _normal, (c.vocab, c.width))
        table = frozen(self, "positions", stand_in_positions, (c.text_rows, c.width))
        place = table[: tokens.shape[1]] if positions is None else table[positions]
        types = frozen(self, "types", stand_in_positions, (2, c.width))
        x = (words[tokens] + place + types[0]).astype(dtype)
        x = FrozenLayerNorm(c.layer_norm_eps, name="embedding_norm")(x)
        x, _ = encoder_layers(c, c.text_layers, deterministic=deterministic)(x, mask, adapters)
        x = FrozenLayerNorm(c.layer_norm_eps, name="norm")(x)
        return OutputProjection(name="output")(x)
