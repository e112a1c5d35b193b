"""Multi-head attention with padding masked, in several implementations, and whether cuDNN's works here.

Letters: B samples, T tokens, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax import platforms
from tap_jax.models.residuals import inputs_only


def attention(q: Array, k: Array, v: Array, mask: Array | None, *, heads: int, implementation: str = "auto") -> Array:
    """Multi-head attention with padding masked.

    Args:
      q, k, v: [..., T, D] (any leading axes), of equal shapes.
      mask: bool. With one axis less than q, broadcastable to [..., T]: true where a key is real, padding last.
        With as many axes as q, [..., T, T]: true where a query may look at a key, of which each has one at least.
        None where all are real. What a sample without any real key gets is finite and means nothing.
      heads: number of heads; D must be divisible by it.
      implementation: "einsum" (float32 softmax), or one that `jax.nn.dot_product_attention` knows ("xla", "cudnn");
        "auto" is einsum on CPU, where it is about twice as fast, and "xla" elsewhere. "cudnn" needs an NVIDIA GPU, and
        in float32, which cuDNN's attention does not have, it is "xla".

    Returns:
      [..., T, D], in q's type.
    """
    if implementation == "auto":
        implementation = "xla" if platforms.here().accelerated else "einsum"
    if implementation == "cudnn" and q.dtype == jnp.float32:
        implementation = "xla"  # a model is initialised in float32, which cuDNN's attention does not have
    *batch, length, width = q.shape
    split = (*batch, length, heads, width // heads)
    pairs = mask is not None and mask.ndim == len(batch) + 2
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*batch, length, length) if pairs else (*batch, length))
    if implementation == "einsum":
        return inputs_only(functools.partial(_einsum, heads=heads), q.dtype)(q, k, v, mask)
    q, k, v = (x.reshape(-1, *split[-3:]) for x in (q, k, v))
    if implementation == "cudnn" and not pairs:  # it keeps no scores
        out = _cudnn(q, k, v, None if mask is None else mask.reshape(-1, length))
    else:
        mask = None if mask is None else mask.reshape(-1, 1, length if pairs else 1, length)
        one = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        if implementation == "cudnn":
            out = one(q, k, v, mask=mask)
        else:
            out = inputs_only(lambda q, k, v, mask: one(q, k, v, mask=mask), q.dtype)(q, k, v, mask)
    return out.reshape(*batch, length, width)


def _einsum(q: Array, k: Array, v: Array, mask: Array | None, *, heads: int) -> Array:
    """[..., T, D], mask [..., T] or [..., T, T]; softmax in float32."""
    split = (*q.shape[:-1], heads, q.shape[-1] // heads)
    q, k, v = q.reshape(split), k.reshape(split), v.reshape(split)
    scores = jnp.einsum("...qhd,...khd->...hqk", q * split[-1] ** -0.5, k)
    scores = scores.astype(jnp.float32)
    if mask is not None:
        seen = mask[..., None, :, :] if mask.ndim == len(split) - 1 else mask[..., None, None, :]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(*split[:-2], -1)


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """[B, T, heads, D / heads], mask [B, T]; with lengths in the mask's place, from which JAX would make a bias.

    JAX has the gradient for even T only, and under vmap it takes every argument to have the mapped axis.
    """
    length = q.shape[1]
    odd = length % 2
    if odd:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = {}
    if mask is not None or odd:
        nought = ((q[:, 0, 0, 0] > 0) & False).astype(jnp.int32)  # mapped wherever q is
        # At least one key: a softmax over none is no number, even where it is not looked at.
        real = length if mask is None else jnp.maximum(mask.sum(-1, dtype=jnp.int32), 1)
        lengths = {"query_seq_lengths": nought + length + odd, "key_value_seq_lengths": nought + real}
    out = jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")
    return out[:, :length]


@functools.cache
def why_not_cudnn(heads: int, width: int, lengths: tuple[int, ...], dtype: str) -> str:
    """Why cuDNN's attention is of no use on the first device of this process; empty where it is.

    It is tried as training uses it, once per process and arguments: value and gradient of two rows side by side, with
    padding and without, and of packed sequences. They must be those of XLA's attention to 5% of the largest entry, as
    bfloat16 rounds.

    Args:
      heads, width: of the model. lengths: T of its inputs. dtype: in which it computes; of use in "bfloat16" alone.

    Returns:
      The reason in one line, at most 200 characters of what the driver or compiler says; nothing is raised.
    """
    if dtype != "bfloat16":
        return f"it does not compute in {dtype}"

    def both(implementation: str, mask: Array | None, x: Array):
        def total(x):
            def one(row):
                return attention(row, 2 * row, 3 * row, mask, heads=heads, implementation=implementation)

            packed = mask is not None and mask.ndim == 3  # the masks of packed sequences are not used under vmap
            out = one(x[0]) if packed else jax.vmap(one)(x)
            return jnp.square(out.astype(jnp.float32)).sum(), out

        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return out, gradient

    # From NumPy, and on one device: several processes may try at different moments.
    device = jax.local_devices()[0]
    try:
        for length in lengths:
            x = np.random.default_rng(0).standard_normal((2, 2, length, width)).astype(jnp.dtype(dtype))
            segments = np.array([np.arange(length) // 3, np.arange(length) // 5])
            pairs = segments[:, :, None] == segments[:, None, :]
            padded = np.arange(length) < np.array([[length], [1 + length // 2]])
            for real in (None, padded, pairs) if length % 2 == 0 else (None, padded):  # packed lengths are even
                given = jax.device_put((real, x), device)
                found, expected = (
                    jax.device_get(jax.jit(functools.partial(both, name))(*given)) for name in ("cudnn", "xla")
                )
                for one, other in zip(found, expected, strict=True):
                    gap = np.abs(one.astype(np.float32) - other.astype(np.float32)).max()
                    if not gap <= 0.05 * np.abs(other.astype(np.float32)).max():
                        return f"its results are off by {gap:.3g} for {length} tokens"
    except Exception as error:  # whatever driver, library or compiler object to
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return ""
