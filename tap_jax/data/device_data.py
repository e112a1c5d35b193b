"""Training and test sets on the device: uint8 images, int32 tokens; standardised only when a batch is cut.

Letters: N samples of a task, S samples of a row, B packed sequences of a row and T their tokens.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.data.images import MEAN, STD
from tap_jax.data.packing import RowShape, Sequences
from tap_jax.data.task_groups import TaskGroup, fields
from tap_jax.data.text import PAD, TaskArrays


def stored(task_groups: Sequence[TaskGroup], arrays: Mapping[str, TaskArrays]) -> dict[str, dict[str, np.ndarray]]:
    """Task group -> field -> the group's samples, task after task, to be put on the devices."""
    out = {}
    for group in task_groups:
        parts = [fields(arrays[task.name]) for task in group.tasks]
        # A task alone in its group keeps its arrays: pictures may be a file that is mapped.
        out[group.name] = {
            field: parts[0][field] if len(parts) == 1 else np.concatenate([part[field] for part in parts])
            for field in parts[0]
        }
    return out


def cut(
    fields: Mapping[str, Array],
    ids: Array,
    shape: RowShape | None = None,
    text_at: Array | None = None,
    answer_at: Array | None = None,
) -> dict[str, Array]:
    """The samples `ids` [S] of a task group; images as float32 [S, 64, 64, 3] in standardised units.

    In a packed row "samples" is `ids`. Texts are "tokens" [B, T] with "text_segments", the sample that each token is of
    (-1: of none), and "text_positions", its place in that sample's text. Of answers, "answers" [B, T] are the tokens
    that are read and "targets" [B, T] those to be predicted, with "answer_segments", "answer_positions", and
    "answer_lengths" [S].

    Args:
      shape: of the row; None: padded.
      text_at, answer_at: see `packing.Filled`.
    """
    batch = {name: field.at[ids].get(mode="promise_in_bounds") for name, field in fields.items()}
    if "images" in batch:
        batch["images"] = standardise(batch["images"])
    if shape is not None and shape.texts and text_at is not None:
        tokens = batch["tokens"]
        sample, position = _lay_out((tokens != PAD).sum(1), text_at, shape.texts)
        batch["tokens"] = jnp.where(sample < 0, PAD, tokens[sample, position])
        batch |= {"text_segments": sample, "text_positions": position, "samples": ids}
    if shape is not None and shape.answers and answer_at is not None:
        answers = batch["answers"]
        lengths = (answers != PAD).sum(1) - 1
        sample, position = _lay_out(lengths, answer_at, shape.answers)
        batch["answers"] = jnp.where(sample < 0, PAD, answers[sample, position])
        batch["targets"] = jnp.where(sample < 0, PAD, answers[sample, position + 1])
        batch |= {"answer_segments": sample, "answer_positions": position, "answer_lengths": lengths}
    return batch


def _lay_out(lengths: Array, at: Array, sequences: Sequences) -> tuple[Array, Array]:
    """Which sample's token is where: (sample, its place in that sample), int32 [B, T] each; (-1, 0) where none is.

    Args:
      lengths: tokens of each sample, int32 [S]. at: where they begin, int32 [S].
    """
    place, order = jnp.arange(sequences.total, dtype=jnp.int32), jnp.argsort(at)
    before = jnp.searchsorted(at[order], place, side="right", method="compare_all").astype(jnp.int32) - 1
    sample = order[jnp.maximum(before, 0)].astype(jnp.int32)
    position = place - at[sample]
    real = (before >= 0) & (position < lengths[sample])
    shape = sequences.number, sequences.tokens
    return jnp.where(real, sample, -1).reshape(shape), jnp.where(real, position, 0).reshape(shape)


def standardise(images: Array) -> Array:
    """uint8 [..., 3] -> float32 with per-channel mean 0 and std 1 over CIFAR-100 (`images.MEAN`, `STD`)."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
