"""Floating-point operations of a task's loss on a batch, and of its gradient, from shapes alone."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax import assembly
from tap_jax.blocks import Tree
from tap_jax.models.accounting import shapes
from tap_jax.models.server_model import ServerModel
from tap_jax.planning.flops import Flops, count
from tap_jax.tasks import Task


def padded_batch(task: Task, samples: int, *, text: int, answer: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of so many samples with texts of `text` tokens, and answers of which `answer` tokens are predicted."""
    found = {"images": ((64, 64, 3), jnp.float32)} if "image" in task.modalities else {}
    found |= {"tokens": ((text,), jnp.int32)} if "text" in task.modalities else {}
    found |= {"answers": ((answer + 1,), jnp.int32)} if task.kind == "text_generation" else {}
    found |= {"labels": ((), jnp.int32)} if task.classes else {}
    return {name: jax.ShapeDtypeStruct((samples, *axes), dtype) for name, (axes, dtype) in found.items()}


def task_flops(model: ServerModel, task: Task, batch: Mapping[str, Array], *, decoded: bool = True) -> Flops:
    """Of the loss on a batch, and of its gradient; without `decoded` of the path vectors that the decoder is given.

    Args:
      batch: arrays or their shapes. Padded positions are counted, as they are computed.
    """
    frozen, blocks = shapes(model)
    # Every implementation of attention does the same products; this one shows them.
    model = ServerModel(dataclasses.replace(model.config, attention="einsum"), model.tasks)
    parts = jax.eval_shape(functools.partial(model.collect, stream=task.streams[0]), blocks)

    def outcome(parts: Tree, frozen: Tree, batch: Mapping[str, Array]) -> Array:
        if not decoded:
            return model.represent(frozen, parts, task, batch).sum()
        return assembly.sample_loss(model)(frozen, parts, task, batch, None)[2].sum()

    return count(outcome, parts, frozen, batch)
