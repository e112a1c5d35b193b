"""Training and test sets on the device: uint8 images, int32 tokens; standardised only when a batch is cut.

Letters: N samples of a task, B samples of a batch, T and A lengths of text and answer.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.data.families import Family, fields
from tap_jax.data.images import MEAN, STD
from tap_jax.data.text import TaskArrays


def stored(families: Sequence[Family], arrays: Mapping[str, TaskArrays]) -> dict[str, dict[str, np.ndarray]]:
    """Family name -> field -> the family's samples, task after task, to be put on the devices."""
    out = {}
    for family in families:
        parts = [fields(arrays[task.name]) for task in family.tasks]
        out[family.name] = {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}
    return out


def cut(fields: Mapping[str, Array], ids: Array) -> dict[str, Array]:
    """The samples `ids` [B] of a family; images as float32 [B, 64, 64, 3] in standardised units."""
    batch = {name: field.at[ids].get(mode="promise_in_bounds") for name, field in fields.items()}
    if "images" in batch:
        batch["images"] = standardise(batch["images"])
    return batch


def standardise(images: Array) -> Array:
    """uint8 [..., 3] -> float32 with per-channel mean 0 and std 1 over CIFAR-100 (`images.MEAN`, `STD`)."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
