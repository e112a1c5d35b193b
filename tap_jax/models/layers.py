"""Pieces that every tower shares: sizes, layer normalisation, image resizing, the encoder layer, the adaptor.

Letters: B samples, T tokens, D width, R rank.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.models.attention import attention
from tap_jax.models.bottleneck import with_bottleneck
from tap_jax.models.lora import FrozenDense, Tree, frozen
from tap_jax.models.residuals import inputs_only


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the server model: the `model` section of a configuration and what others say of it (Sec. 5.1, App. D).

    Attributes:
      name: "flava" or "vilt"; the other defaults are FLAVA's.
      width, heads, mlp: D, attention heads and F, the inner width of feed-forward networks, in encoders and backbone.
      image_layers, text_layers: depths of FLAVA's encoders; ViLT has none.
      image_size, patch: pixels a side of what the image encoder sees, and of its patches.
      upsample: factor of the input adaptor's first resize.
      vocab: V.
      max_text, max_answer: word pieces of the longest input and answer.
      text_positions: rows of the text side's position table; 0: as `text_rows` says.
      backbone: "routed" or "standard" (App. C.4).
      backbone_layers: depths L of the MoTE and the MoME stage.
      bottleneck: r > 0 puts FedDAT's adapters of that width behind every feed-forward network of encoders and backbone;
        then there is no LoRA and no `qv_delta`.
      qv_delta: full trainable weights, starting at 0, on query and value of the routed backbone.
      encoder_rank, attention_rank, expert_rank: R of LoRA in the encoders, on the backbone's query and value, and in
        its feed-forward networks; alpha = lora_alpha_ratio · R.
      lora_dropout, lora_alpha_ratio: of every LoRA.
      head_hidden, head_activation, head_dropout, head_layer_norm: of `heads.ClassificationHead`.
      image_channels: of `heads.ImageHead`.
      text_heads, text_cond_heads, text_inner, text_dropout, condition: of `heads.TextHead`.
      position, position_grid: ViLT's position table: "interpolate" or "slice" to the grid in use; positions a side.
      layer_norm_eps: of the pre-trained LayerNorms.
      attention: implementation, see `attention.attention`.
      remat: transformer layers are computed again in the backward pass, which then keeps their inputs alone.
      dtype: in which it computes; parameters are float32.
    """

    name: str = "flava"
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    image_layers: int = 12
    text_layers: int = 12
    image_size: int = 224
    patch: int = 16
    upsample: float = 2.0
    vocab: int = 30522
    max_text: int = 256
    text_positions: int = 0
    max_answer: int = 256
    backbone: str = "routed"
    backbone_layers: tuple[int, int] = (1, 1)
    bottleneck: int = 0
    qv_delta: bool = True
    encoder_rank: int = 8
    attention_rank: int = 16
    expert_rank: int = 4
    lora_dropout: float = 0.3
    lora_alpha_ratio: float = 2.0
    head_hidden: tuple[int, ...] = (384,)
    head_activation: str = "relu"
    head_dropout: float = 0.3
    head_layer_norm: bool = False
    image_channels: tuple[int, ...] = (64, 32, 16)
    text_heads: int = 4
    text_cond_heads: int = 8
    text_inner: int = 1536
    text_dropout: float = 0.1
    condition: str = "pooled"
    position: str = "interpolate"
    position_grid: int = 12
    layer_norm_eps: float = 1e-12
    attention: str = "auto"
    remat: bool = False
    dtype: str = "float32"

    @property
    def image_tokens(self) -> int:
        """T of an image: one for each patch, and the CLS token."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def text_rows(self) -> int:
        """Rows of the text position table: `text_positions`, or else as many as max_text needs.

        Every published FLAVA has 512, so one that reads long texts is given those.
        """
        long_flava = self.name == "flava" and self.max_text > 128
        return self.text_positions or (512 if long_flava else self.max_text)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation over the last axis, computed in float32 and returned in x's type.

    Args:
      x: [..., D].
      scale, bias: [D], or what broadcasts to x's shape.
      eps: added to the variance.
    """

    def normalised(x: Array, scale: Array, bias: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)

    return inputs_only(normalised, x.dtype)(x, scale, bias)


def gelu(x: Array) -> Array:
    """Exact GELU, x·Φ(x), of any shape, elementwise; computed in float32 and returned in x's type, as torch does it.

    By erf, which compilers know: `jax.nn.gelu` goes through erfc, whose expansion is some hundred instructions.
    """

    def activated(x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        return (0.5 * x32 * (1 + jax.lax.erf(x32 * np.float32(np.sqrt(0.5))))).astype(x.dtype)

    return inputs_only(activated, x.dtype)(x)


class FrozenLayerNorm(nn.Module):
    """Pre-trained layer normalisation over the last axis, see `layer_norm` (HF FLAVA and ViLT: eps 1e-12)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = frozen(self, "scale", nn.initializers.ones, x.shape[-1:])
        bias = frozen(self, "bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, self.eps)


class EncoderLayer(nn.Module):
    """Pre-LN transformer layer of HF's FLAVA towers; x [B, T, D] -> ([B, T, D], None), as a scan wants it.

    LoRA on query and value, or, in a model with bottlenecks, the adapter that is given behind the feed-forward network.
    """

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, adapter: Tree | None) -> tuple[Array, None]:
        c = self.config
        rank = 0 if c.bottleneck else c.encoder_rank
        plain = functools.partial(FrozenDense, c.width)
        adapted = functools.partial(plain, rank, c.lora_alpha_ratio * rank, lora_dropout=c.lora_dropout)
        n = FrozenLayerNorm(c.layer_norm_eps, name="norm1")(x)
        q = adapted(name="query")(n, deterministic=self.deterministic)
        k = plain(name="key")(n)
        v = adapted(name="value")(n, deterministic=self.deterministic)
        mixed = attention(q, k, v, mask, heads=c.heads, implementation=c.attention)
        x = x + plain(name="out")(mixed)
        n = FrozenLayerNorm(c.layer_norm_eps, name="norm2")(x)
        n = gelu(FrozenDense(c.mlp, name="fc1")(n))
        n = plain(name="fc2")(n)
        return x + (n if adapter is None else with_bottleneck(n, adapter)), None


def encoder_layers(config: ModelConfig, depth: int, *, deterministic: bool) -> nn.Module:
    """`depth` encoder layers as one scanned module; its weights and its adapters carry a leading layer axis."""
    layer = nn.remat(EncoderLayer) if config.remat else EncoderLayer
    scanned = nn.scan(
        layer,
        variable_axes={"frozen": 0, "params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=depth,
    )
    return scanned(config, deterministic, name="layers")


@functools.lru_cache
def bilinear_matrix(size: int, target: int, *, align_corners: bool = False) -> np.ndarray:
    """float32 [target, size]: 1-D bilinear resampling as torch's `interpolate` does it, without antialiasing.

    With `align_corners` the first and last samples keep their places, else the edges of their cells do.
    """
    if align_corners:
        source = np.arange(target) * (size - 1) / max(target - 1, 1)
    else:
        source = np.maximum((np.arange(target) + 0.5) * size / target - 0.5, 0)
    low = np.minimum(source.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((target, size), np.float32)
    np.add.at(matrix, (np.arange(target), low), (1 - (source - low)).astype(np.float32))
    np.add.at(matrix, (np.arange(target), high), (source - low).astype(np.float32))
    return matrix


def resize(images: Array, target: int) -> Array:
    """Bilinear resize [B, H, H, C] -> [B, target, target, C], as two products with static matrices, in images' type."""
    size = images.shape[1]
    if size == target:
        return images
    matrix = jnp.asarray(bilinear_matrix(size, target), images.dtype)
    return jnp.einsum("ph,qw,bhwc->bpqc", matrix, matrix, images)


class InputAdaptor(nn.Module):
    """Trainable image adaptor: bilinear ×upsample, conv 3×3 (3→3, no bias), GELU, bilinear to image_size, conv 1×1.

    images [B, 64, 64, 3] in standardised units -> [B, image_size, image_size, 3]. The 3×3 convolution is written
    as a product with shifted copies: under vmap over clients a convolution would become a slow grouped one.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        c = self.config
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's Conv2d default
        kernel3 = self.param("conv3", init, (3, 3, 3, 3), jnp.float32).astype(images.dtype)
        x = resize(images, round(images.shape[1] * c.upsample))
        size = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
        x = jnp.concatenate(shifted, -1) @ kernel3.reshape(27, 3)
        x = resize(gelu(x), c.image_size)
        kernel1 = self.param("conv1", init, (3, 3), jnp.float32).astype(images.dtype)
        bias1 = self.param("bias1", nn.initializers.zeros, (3,), jnp.float32).astype(images.dtype)
        return x @ kernel1 + bias1


class OutputProjection(nn.Module):
    """The trainable Linear(D, D) + LayerNorm (eps 1e-5) after each encoder: [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = TrainableDense(x.shape[-1], name="linear")(x)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return layer_norm(x, scale, bias, 1e-5)


class TrainableDense(nn.Module):
    """x W + b, trained in full: [..., inputs] -> [..., features].

    W starts as that of torch's Linear (uniform ±1/√inputs), b at 0.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def patches(images: Array, patch: int) -> Array:
    """[B, H, H, C] -> [B, (H/patch)², C·patch²] with channel-major patches, the order of torch's Conv2d weights.

    `patch` must divide H.
    """
    b, h, _, c = images.shape
    n = h // patch
    x = images.reshape(b, n, patch, n, patch, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, n * n, c * patch * patch)
