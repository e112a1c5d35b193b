"""Bottleneck adapters (Houlsby et al., 2019), and FedDAT's pairs of them (Chen et al., 2024).

An adapter turns the output f of a frozen feed-forward network into f + A(f), A(f) = up · ReLU(down · f + b) + b'.

Letters: D width, r bottleneck.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.models.lora import Tree


def init_bottleneck(key: Array, width: int, size: int, lead: tuple[int, ...] = ()) -> Tree:
    """Adapters with A(f) = 0, so that training starts at the frozen map; `down` as torch's Linear starts.

    Args:
      width: D. size: r. lead: leading axes (layers, and two for query and value).

    Returns:
      {"down": [*lead, D, r], "down_bias": [*lead, r], "up": [*lead, r, D], "up_bias": [*lead, D]}, float32.
    """
    bound = 1 / math.sqrt(width)
    return {
        "down": jax.random.uniform(key, (*lead, width, size), jnp.float32, -bound, bound),
        "down_bias": jnp.zeros((*lead, size), jnp.float32),
        "up": jnp.zeros((*lead, size, width), jnp.float32),
        "up_bias": jnp.zeros((*lead, width), jnp.float32),
    }


def with_bottleneck(f: Array, adapter: Tree) -> Array:
    """f + A(f), f [..., D]; the adapter without leading axes, of any r."""
    down, down_bias, up, up_bias = (adapter[name].astype(f.dtype) for name in ("down", "down_bias", "up", "up_bias"))
    return f + jax.nn.relu(f @ down + down_bias) @ up + up_bias


def dual(first: Tree, second: Tree) -> Tree:
    """The one adapter that computes ½·A_first + ½·A_second, FedDAT's dual-adapter teacher; its bottleneck is r1 + r2.

    Args:
      first, second: adapters as `init_bottleneck` shapes them, with the same leading axes, of any r1 and r2.

    Returns:
      As `init_bottleneck` shapes adapters of r1 + r2.
    """
    return {
        "down": jnp.concatenate([first["down"], second["down"]], -1),
        "down_bias": jnp.concatenate([first["down_bias"], second["down_bias"]], -1),
        "up": jnp.concatenate([first["up"], second["up"]], -2) / 2,
        "up_bias": (first["up_bias"] + second["up_bias"]) / 2,
    }
