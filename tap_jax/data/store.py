"""Training and test sets on the device: uint8 images, int32 tokens; standardised only when a batch is cut.

Letters: N samples of a task, B samples of a batch, T and A lengths of text and answer.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.data.images import MEAN, STD

FIELDS = ("images", "tokens", "labels", "answers")


def device_arrays(arrays: Mapping[str, object], sharding=None) -> dict[str, dict[str, Array]]:
    """Task name -> the fields it has, on the device (replicated where `sharding` says so).

    Args:
      arrays: task name -> `TaskArrays`.
    """
    return {
        task: {
            field: jax.device_put(np.asarray(getattr(split, field)), sharding)
            for field in FIELDS
            if getattr(split, field) is not None
        }
        for task, split in arrays.items()
    }


def cut(fields: Mapping[str, Array], ids: Array) -> dict[str, Array]:
    """The samples `ids` [B] of a task; images as float32 [B, 64, 64, 3] in standardised units."""
    batch = {name: field.at[ids].get(mode="promise_in_bounds") for name, field in fields.items()}
    if "images" in batch:
        batch["images"] = standardise(batch["images"])
    return batch


def standardise(images: Array) -> Array:
    """uint8 [..., 3] -> float32 with per-channel mean 0 and std 1 over CIFAR-100 (the constants of spec 6)."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
