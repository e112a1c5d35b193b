"""Decoders, one per head of the task registry (Tables 18-20 of the paper).

Axes: B samples, P path vectors, A answer tokens, D width, V vocabulary, C classes or channels.

All parameters are trainable (collection `params`, float32); products run in `dtype`, while LayerNorm
statistics, softmax and outputs are float32. Dropout draws from the rng collection `dropout`.

Every head runs under `jax.vmap` with different parameters per client, where a convolution would become a
grouped one, slow on every backend. Hence there are only matrix products here.

The paper does not say how decoders start: each layer starts as its PyTorch namesake, embeddings and block as GPT-2's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from tap_jax.errors import UserError
from tap_jax.models.layers import gelu
from tap_jax.models.residuals import inputs_only
from tap_jax.models.token_layout import same_segment
from tap_jax.token_logits import TokenLogits, float32_product

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "gelu": gelu}
CONDITIONS = ("pooled", "paths")

# Uniform in +-1/sqrt(fan in): torch.nn.Linear's weight.
_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# GPT-2: standard deviation .02, divided by sqrt(residual branches) = sqrt(2) for what is added to the stream.
_gpt2_init = nn.initializers.normal(0.02)
_gpt2_residual_init = nn.initializers.normal(0.02 / 2**0.5)


class ClassificationHead(nn.Module):
    """Multi-layer perceptron from the pooled embedding to class scores (Table 18).

    FLAVA: hidden (D/2,), relu, dropout .3. ViLT: hidden (4D, D), gelu, dropout .1, LayerNorm. Dropout and
    LayerNorm act on the first hidden layer alone: a second LayerNorm would exceed ViLT's parameter count in Table 7.

    Attributes:
      classes: C.
      hidden: width of each hidden layer.
      activation: a key of `ACTIVATIONS`; 'gelu' is the exact one.
      dropout: rate after the first activation.
      layer_norm: whether the first hidden layer is normalised before its activation.
      layer_norm_eps: added to the variance.
      dtype: of the products; the last layer is always float32.

    Raises:
      UserError: unknown activation.
    """

    classes: int
    hidden: tuple[int, ...]
    activation: str
    dropout: float
    layer_norm: bool
    layer_norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pooled: jax.Array, *, deterministic: bool) -> jax.Array:
        """Maps pooled [B, D] to logits [B, C], float32."""
        if self.activation not in ACTIVATIONS:
            raise UserError(f"model.head_activation: unknown '{self.activation}'; use one of {', '.join(ACTIVATIONS)}")
        x = pooled
        for index, width in enumerate(self.hidden):
            x = _linear(x, width, dtype=self.dtype, name=f"hidden_{index}")
            if index == 0 and self.layer_norm:
                x = _layer_norm(x, eps=self.layer_norm_eps, dtype=self.dtype, name="layer_norm")
            x = ACTIVATIONS[self.activation](x)
            if index == 0:
                x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return _linear(x, self.classes, dtype=jnp.float32, name="output")


class TransposedConv(nn.Module):
    """Transposed convolution with kernel 4, stride 2 and padding 1: doubles height and width.

    Equals torch.nn.ConvTranspose2d(C, features, 4, 2, 1) with weight = kernel.transpose(0, 3, 1, 2).

    Attributes:
      features: output channels F.
      dtype: of the product and the output.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, 2H, 2W, F]."""
        # PyTorch takes the fan in of a transposed convolution from its output side, F * 4 * 4.
        start = _uniform(1 / (self.features * 16) ** 0.5)
        kernel = self.param("kernel", start, (x.shape[-1], 4, 4, self.features), jnp.float32)
        bias = self.param("bias", start, (self.features,), jnp.float32)
        # What each pixel adds to its 4x4 window: [B, H, 4, W, 4, F].
        windows = jnp.einsum("bhwc,cklf->bhkwlf", x.astype(self.dtype), kernel.astype(self.dtype))
        y = _overlap_add(_overlap_add(windows, axis=1), axis=2)
        return y + bias.astype(self.dtype)[None, None, None]


def _overlap_add(windows: jax.Array, *, axis: int) -> jax.Array:
    """Adds windows of 4 at stride 2 along one axis, then drops one entry at either end (the padding).

    Args:
      windows: [..., N, 4, ...] with N at `axis`.
      axis: position of N.

    Returns:
      [..., 2N, ...].
    """
    # Entry k of window i lands on 2i + k. Entries 0, 1 of all windows side by side therefore tile 0 .. 2N-1,
    # and entries 2, 3 tile 2 .. 2N+1. After the first output is dropped these are shifts by -1 and +1, which
    # a pad with a negative side does in one go (the last output falls off the second).
    shape = windows.shape[:axis] + (2 * windows.shape[axis],) + windows.shape[axis + 2 :]
    zero = jnp.zeros((), windows.dtype)

    def shifted(first: int, by: int) -> jax.Array:
        tiles = lax.slice_in_dim(windows, first, first + 2, axis=axis + 1).reshape(shape)
        return lax.pad(tiles, zero, [(by, -by, 0) if a == axis else (0, 0, 0) for a in range(len(shape))])

    return shifted(0, -1) + shifted(2, 1)


class ImageHead(nn.Module):
    """Transposed-convolutional decoder of images (Table 19): [8, 8, 64] -> [64, 64, 3], ReLU between.

    Attributes:
      channels: of the seed and of every layer but the last, which has 3.
      seed_size: height and width of the seed; the image is seed_size * 2**len(channels) wide.
      dtype: of the products; the last layer is always float32.
    """

    channels: tuple[int, ...] = (64, 32, 16)
    seed_size: int = 8
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pooled: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps pooled [B, D] to standardised images [B, H, W, 3], float32, without output activation.

        `deterministic` has no effect (there is no dropout); it is here so that all heads are called alike.
        """
        del deterministic
        size, channels = self.seed_size, self.channels[0]
        x = _linear(pooled, channels * size * size, dtype=self.dtype, name="seed")
        # The features are ordered [C, H, W] as PyTorch would view them, so that weights carry over unpermuted.
        x = x.reshape(-1, channels, size, size).transpose(0, 2, 3, 1)
        for index, features in enumerate(self.channels[1:]):
            x = nn.relu(TransposedConv(features, dtype=self.dtype, name=f"deconv_{index}")(x))
        return TransposedConv(3, dtype=jnp.float32, name=f"deconv_{len(self.channels) - 1}")(x)


class ConditioningAttention(nn.Module):
    """torch.nn.MultiheadAttention from answer positions to the vectors that condition the answer.

    Attributes:
      heads: number of heads.
      dtype: of the products.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, queries: jax.Array, vectors: jax.Array) -> jax.Array:
        """Attends from queries [A, D] to vectors [B, P, D]: [B, A, D], or [B, 1, D] (for all A) if P = 1."""
        width = vectors.shape[-1]
        kernel = self.param("in_proj_kernel", nn.initializers.xavier_uniform(), (width, 3 * width), jnp.float32)
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * width,), jnp.float32)
        out = nn.Dense(width, dtype=self.dtype, kernel_init=_linear_init, name="out_proj")

        def project(x: jax.Array, first: int, last: int) -> jax.Array:
            columns = slice(first * width, last * width)
            y = x.astype(self.dtype) @ kernel[:, columns].astype(self.dtype)
            return y + bias[columns].astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

        if vectors.shape[1] == 1:
            # The softmax over one key is 1 whatever the query: every position reads the value itself. The
            # query and key projections remain parameters, as in PyTorch (and in Table 7's count), with zero gradient.
            return out(project(vectors, 2, 3))
        query = _split_heads(project(queries, 0, 1)[None], self.heads)
        keys, values = jnp.split(_split_heads(project(vectors, 1, 3), 2 * self.heads), 2, axis=2)

        def attend(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            return _read(nn.softmax(_scores(jnp.broadcast_to(query, (len(keys), *query.shape[1:])), keys)), values)

        return out(inputs_only(attend, self.dtype)(query, keys, values))


class GPT2Block(nn.Module):
    """One pre-LayerNorm layer of GPT-2 with its dropouts, for whole sequences or token by token.

    Attributes:
      heads: number of attention heads.
      inner: width of the feed-forward part.
      dropout: rate on attention weights and on both residual branches.
      dtype: of the products.
    """

    heads: int
    inner: int
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        deterministic: bool,
        cache: tuple[jax.Array, jax.Array] | None = None,
        position: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Runs the layer on T tokens that may look at S keys.

        Args:
          x: [B, T, D].
          mask: bool [T, S] or [B, T, S], true where token t may look at key s.
          deterministic: no dropout.
          cache: keys and values so far, each [B, S, heads, D / heads]; None: those of x alone, S = T.
          position: where in the cache the keys and values of x go.

        Returns:
          x [B, T, D] and the updated keys and values.
        """
        width = x.shape[-1]
        dropout = nn.Dropout(self.dropout, deterministic=deterministic)

        def dense(x: jax.Array, features: int, name: str, init: nn.initializers.Initializer) -> jax.Array:
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)(x)

        n = _layer_norm(x, eps=1e-5, dtype=self.dtype, name="ln_1")
        qkv = _split_heads(dense(n, 3 * width, "attn_c_attn", _gpt2_init), 3 * self.heads)
        query, keys, values = jnp.split(qkv, 3, axis=2)
        if cache is not None:
            keys = lax.dynamic_update_slice_in_dim(cache[0], keys, position, axis=1)
            values = lax.dynamic_update_slice_in_dim(cache[1], values, position, axis=1)
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
        # Which weights dropout leaves is drawn outside of what the backward pass computes again.
        shape = (*query.shape[:1], self.heads, *mask.shape[-2:])
        left = None if deterministic or not self.dropout else dropout(jnp.ones(shape, self.dtype)) != 0

        def attend(query: jax.Array, keys: jax.Array, values: jax.Array, left: jax.Array | None) -> jax.Array:
            scores = jnp.where(mask, _scores(query, keys), jnp.finfo(jnp.float32).min)
            weights = nn.softmax(scores)
            if left is not None:
                weights = jnp.where(left, weights / (1 - self.dropout), 0)
            return _read(weights, values)

        attended = inputs_only(attend, self.dtype)(query, keys, values, left)
        x = x + dropout(dense(attended, width, "attn_c_proj", _gpt2_residual_init))

        n = _layer_norm(x, eps=1e-5, dtype=self.dtype, name="ln_2")
        activated = inputs_only(functools.partial(nn.gelu, approximate=True), self.dtype)
        n = activated(dense(n, self.inner, "mlp_c_fc", _gpt2_init))
        x = x + dropout(dense(n, width, "mlp_c_proj", _gpt2_residual_init))
        return x, (keys, values)


class TextHead(nn.Module):
    """Conditional autoregressive text decoder: one GPT-2 layer that also reads the pooled embedding (Table 20).

    input = wte[ids] + position + attention(position -> condition vectors), then GPT-2: + wpe, dropout, the
    block, final LayerNorm; then an untied projection without bias.

    Attributes:
      vocab: V.
      max_length: most answer tokens.
      width: D.
      heads: of GPT-2.
      inner: feed-forward width of GPT-2; None: 2 D.
      cond_heads: of the conditioning attention.
      dropout: rate within GPT-2 (embeddings, attention weights, residual branches).
      condition: 'pooled': the condition vectors are averaged to one key and value; 'paths': each is one.
      dtype: of the products; logits are accumulated and returned in float32.

    Raises:
      UserError: unknown condition, heads that do not divide the width, or an answer above max_length.
    """

    vocab: int
    max_length: int
    width: int
    heads: int = 4
    inner: int | None = None
    cond_heads: int = 8
    dropout: float = 0.1
    condition: str = "pooled"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declares the parameters and checks the configuration; see the class for what is raised."""
        if self.condition not in CONDITIONS:
            raise UserError(f"model.condition: unknown '{self.condition}'; use one of {', '.join(CONDITIONS)}")
        for field, heads in (("text_heads", self.heads), ("text_cond_heads", self.cond_heads)):
            if self.width % heads:
                raise UserError(f"model.{field}: {heads} does not divide model.width {self.width}; use one that does")
        self.wte = self.param("wte", _gpt2_init, (self.vocab, self.width), jnp.float32)
        self.position = self.param("position", _gpt2_init, (self.max_length, self.width), jnp.float32)
        self.wpe = self.param("wpe", _gpt2_init, (self.max_length, self.width), jnp.float32)
        self.conditioning = ConditioningAttention(self.cond_heads, dtype=self.dtype)
        self.embedding_dropout = nn.Dropout(self.dropout)
        self.block = GPT2Block(self.heads, self.inner or 2 * self.width, self.dropout, dtype=self.dtype)
        self.ln_f = _norm(self.dtype)(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False)
        self.output = self.param("output", _linear_init, (self.width, self.vocab), jnp.float32)

    def __call__(self, condition_vectors: jax.Array, ids: jax.Array, *, deterministic: bool) -> jax.Array:
        """Scores the next token at every position (teacher forcing; the caller shifts).

        Args:
          condition_vectors: [B, P, D].
          ids: int [B, A], A <= max_length. Padding on the right needs no mask: no earlier position sees it.
          deterministic: no dropout.

        Returns:
          Logits [B, A, V], float32; those at t depend on ids[:, :t+1] only.
        """
        return self.factors(condition_vectors, ids, deterministic=deterministic).whole()

    def factors(
        self,
        condition_vectors: jax.Array,
        ids: jax.Array,
        *,
        deterministic: bool,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> TokenLogits:
        """What `__call__` computes, with the projection on the vocabulary left to do.

        Args:
          condition_vectors, ids, deterministic: as of `__call__`; condition vectors of S samples, where several answers
            share a sequence.
          segments, positions: int [B, A] of packed answers: the sample that each token is of (-1: of none), and its
            place in that sample's answer.
        """
        length = ids.shape[1]
        mask = jnp.tri(length, dtype=bool)
        if segments is None:
            context = self._context(condition_vectors, length)
        else:
            context = self._packed_context(condition_vectors, segments, positions)
            mask = mask & same_segment(segments)
        x = self.embedding_dropout(self.wte[ids].astype(self.dtype) + context, deterministic=deterministic)
        x, _ = self.block(x, mask, deterministic=deterministic)
        return self._factors(x)

    def generate(
        self,
        condition_vectors: jax.Array,
        *,
        length: int,
        start_id: int,
        stop_id: int,
        pad_id: int,
        wanted: jax.Array | None = None,
    ) -> jax.Array:
        """Decodes greedily, one position of work per token, until every sequence has stopped.

        Args:
          condition_vectors: [B, P, D].
          length: most tokens to produce, <= max_length.
          start_id: token that opens the answer; it is not returned.
          stop_id: token that ends it; it is returned.
          pad_id: what follows the stop token.
          wanted: bool [B], the samples whose answers are; others end at once. None: all.

        Returns:
          ids [B, length], int32; a sequence that has not stopped by then is cut off.

        Raises:
          UserError: length is above max_length.
        """
        context = self._context(condition_vectors, length)
        batch = context.shape[0]
        empty = jnp.zeros((batch, length, self.heads, self.width // self.heads), self.dtype)
        slots = jnp.arange(length)

        def unfinished(_: nn.Module, carry: tuple) -> jax.Array:
            t, _, done, *_ = carry
            return (t < length) & ~_all_done(done)

        def step(head: "TextHead", carry: tuple) -> tuple:
            t, token, done, answer, cache = carry
            x = head.wte[token][:, None].astype(head.dtype) + lax.dynamic_slice_in_dim(context, t, 1, axis=1)
            x, cache = head.block(x, (slots <= t)[None], deterministic=True, cache=cache, position=t)
            token = jnp.argmax(head._factors(x).whole()[:, 0], axis=-1).astype(jnp.int32)
            token = jnp.where(done, jnp.int32(pad_id), token)
            answer = lax.dynamic_update_slice_in_dim(answer, token[:, None], t, axis=1)
            return t + 1, token, done | (token == stop_id), answer, cache

        start = (
            jnp.int32(0),
            jnp.full(batch, start_id, jnp.int32),
            jnp.zeros(batch, bool) if wanted is None else ~wanted,
            jnp.full((batch, length), pad_id, jnp.int32),
            (empty, empty),
        )
        return nn.while_loop(unfinished, step, self, start, broadcast_variables="params")[3]

    def _context(self, condition_vectors: jax.Array, length: int) -> jax.Array:
        """What is added to the token embeddings of the first `length` positions: [B, length, D]."""
        if length > self.max_length:
            raise UserError(
                f"model.max_answer: {self.max_length}, too few for answers of {length} tokens; shorten them or raise it"
            )
        position = self.position[:length]
        conditioning = self._conditioning(condition_vectors, position)
        return conditioning + (position + self.wpe[:length]).astype(self.dtype)[None]

    def _packed_context(self, condition_vectors: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        """The same for packed answers, token by token: [B, A, D]."""
        length = min(self.max_length, segments.shape[1])
        position = self.position[:length]
        conditioning = self._conditioning(condition_vectors, position)  # [S, length or 1, D]
        at = positions if conditioning.shape[1] > 1 else 0
        return conditioning[jnp.maximum(segments, 0), at] + (position + self.wpe[:length]).astype(self.dtype)[positions]

    def _conditioning(self, condition_vectors: jax.Array, position: jax.Array) -> jax.Array:
        """What each position reads of its sample's vectors [B, P, D]: [B, A, D], or [B, 1, D] for all positions."""
        if self.condition == "pooled":
            condition_vectors = condition_vectors.mean(axis=1, keepdims=True)
        return self.conditioning(position, condition_vectors)

    def _factors(self, x: jax.Array) -> TokenLogits:
        """Of the logits of hidden states [B, T, D]."""
        return TokenLogits(self.ln_f(x).astype(self.dtype), self.output)


@jax.custom_batching.custom_vmap
def _all_done(done: jax.Array) -> jax.Array:
    """True once every flag is set, across `jax.vmap` as well."""
    return jnp.all(done)


@_all_done.def_vmap
def _all_done_in_every_row(axis_size: int, in_batched: list[bool], done: jax.Array) -> tuple[jax.Array, bool]:
    # A condition that differs between vmapped clients would make JAX copy the whole cache at every step, to
    # select between its old and its new state. Rows that have stopped only write padding, so running them
    # until all have stopped changes nothing.
    del axis_size, in_batched
    return _all_done(done), False


def _linear(x: jax.Array, features: int, *, dtype: DTypeLike, name: str) -> jax.Array:
    """torch.nn.Linear with its initial distribution: x [..., D] -> [..., features]."""
    bias = _uniform(1 / x.shape[-1] ** 0.5)
    return nn.Dense(features, dtype=dtype, kernel_init=_linear_init, bias_init=bias, name=name)(x)


def _layer_norm(x: jax.Array, *, eps: float, dtype: DTypeLike, name: str) -> jax.Array:
    """LayerNorm in float32, result in `dtype`."""
    # Flax's fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    norm = _norm(dtype)(epsilon=eps, dtype=jnp.float32, use_fast_variance=False, name=name)
    return norm(x).astype(dtype)


class _LayerNorm(nn.LayerNorm):
    """Flax's, on inputs of any type."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.astype(jnp.float32))


def _norm(dtype: DTypeLike) -> type[nn.Module]:
    """`nn.LayerNorm`, of which the backward pass is given what `residuals.inputs_only` says."""
    return _LayerNorm if jnp.dtype(dtype) == jnp.float32 else nn.remat(_LayerNorm)


def _uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in [-bound, bound]."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Cuts [B, T, D] into [B, T, heads, D / heads]."""
    return x.reshape(*x.shape[:2], heads, -1)


def _scores(query: jax.Array, keys: jax.Array) -> jax.Array:
    """Scaled products of query [B, T, heads, d] and keys [B, S, heads, d]: [B, heads, T, S], float32."""
    scale = query.shape[-1] ** -0.5
    return scale * float32_product("bthd,bshd->bhts", query, keys)


def _read(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weighted sums of values [B, S, heads, d] by weights [B, heads, T, S], heads joined: [B, T, D]."""
    read = jnp.einsum("bhts,bshd->bthd", weights.astype(values.dtype), values)
    return read.reshape(*read.shape[:2], -1)
