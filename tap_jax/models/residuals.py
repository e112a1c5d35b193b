"""What is kept of the forward pass for the backward pass.

Differentiated as it stands, an elementwise function that computes in float32 keeps several float32 arrays of its
input's shape. Such functions are computed again instead, from an input in the compute type. It costs no product of
matrices but small ones, and the gradient is the same.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

P, R = ParamSpec("P"), TypeVar("R")
DROPOUT, LOW_RANK = "dropout", "low_rank"
_policy = jax.checkpoint_policies.save_only_these_names(DROPOUT, LOW_RANK)


def inputs_only(function: Callable[P, R], dtype: DTypeLike) -> Callable[P, R]:
    """`function`, of which the backward pass is given the inputs and what `kept` marks; the rest is computed again.

    Args:
      function: pure; arrays that it is not given as arguments count as inputs.
      dtype: in which the model computes. In float32 it is `function` itself: inputs are no smaller than what they lead
        to, and on CPUs, where that is the type, time counts for more.
    """
    return function if jnp.dtype(dtype) == jnp.float32 else jax.checkpoint(function, policy=_policy)


def kept(x: Array, name: str) -> Array:
    """`x`, which `inputs_only` keeps: small or dear to compute. `name`: `DROPOUT` (random masks) or `LOW_RANK`."""
    return checkpoint_name(x, name)
