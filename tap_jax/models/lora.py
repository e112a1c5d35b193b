"""Low-rank adapters on frozen linear maps (Hu et al., 2022), and how frozen weights are declared.

Frozen weights live in Flax's `frozen` collection and are never differentiated; adapters live in `params`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.models.residuals import DROPOUT, LOW_RANK, inputs_only, kept

Tree = dict


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; `key=None` (evaluation) or a rate of 0, or next to it, returns `x` itself.

    Sixteen random bits per element: half the generator's work, and the rate, in [0, 1), is met to 2**-17.
    """
    limit = round((1 - rate) * 2**16)
    if key is None or limit == 2**16:
        return x
    keep = kept(jax.random.bits(key, x.shape, jnp.uint16) < jnp.uint16(limit), DROPOUT)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def init_lora(key: Array, inputs: int, outputs: int, rank: int) -> Tree:
    """Adapter with B = 0, so that training starts at the frozen map.

    A is uniform on ±1/√inputs, PEFT's default. Returns {"a": [inputs, rank], "b": [rank, outputs]}, float32.
    """
    bound = 1 / math.sqrt(inputs)
    return {
        "a": jax.random.uniform(key, (inputs, rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((rank, outputs), jnp.float32),
    }


def lora(x: Array, adapter: Tree, *, scale: float, rate: float = 0.0, key: Array | None = None) -> Array:
    """scale · dropout(x) A B: x [..., inputs] -> [..., outputs], in x's type, with scale = alpha / rank.

    Args:
      adapter: as `init_lora` shapes it; leading axes of A and B broadcast with x's as in a matrix product.
      rate, key: of `dropout`.
    """

    def product(x: Array, adapter: Tree, key: Array | None) -> Array:
        a, b = (adapter[name].astype(x.dtype) for name in ("a", "b"))
        return kept(dropout(x, rate, key) @ a, LOW_RANK) @ b * scale

    return inputs_only(product, x.dtype)(x, adapter, key)


def stand_in(width: int) -> nn.initializers.Initializer:
    """Random matrices in place of pre-trained ones: N(0, 0.02²) at width 768, as BERT's, and as strong at any other.

    A product sums over about `width` entries, so the deviation grows with 1/√width; at a fixed 0.02 a narrow model's
    frozen layers would hardly change their input.
    """
    return nn.initializers.normal(0.02 * math.sqrt(768 / width))


# Of positions and types: a quarter of the words', since in a trained model words outweigh them.
stand_in_positions = nn.initializers.normal(0.005)


def frozen(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Array:
    """A frozen weight of `module`, float32: declared like a parameter, stored in the `frozen` collection."""
    return module.variable("frozen", name, lambda: init(module.make_rng("params"), shape, jnp.float32)).value


class FrozenDense(nn.Module):
    """x W + b with frozen W [inputs, features] and b [features], plus a LoRA adapter where rank > 0.

    Attributes:
      features: outputs.
      rank, alpha: of LoRA, which is multiplied by alpha / rank; rank 0 for none.
      lora_dropout: rate on its input, unless `deterministic`.
    """

    features: int
    rank: int = 0
    alpha: float = 0.0
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
        shape = (x.shape[-1], self.features)
        kernel = frozen(self, "kernel", stand_in(min(shape)), shape)
        bias = frozen(self, "bias", nn.initializers.zeros, (self.features,))
        y = x @ kernel.astype(x.dtype) + bias.astype(x.dtype)
        if self.rank:
            adapter = self.param("lora", init_lora, x.shape[-1], self.features, self.rank)
            key = None if deterministic or self.lora_dropout == 0 else self.make_rng("dropout")
            y = y + lora(x, adapter, scale=self.alpha / self.rank, rate=self.lora_dropout, key=key)
        return y
