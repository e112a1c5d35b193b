"""Task losses and the distillation loss (equations 2, 5 and 6), per sample and in float32.

Losses of text are taken token by token, a block of tokens at a time, so that neither they nor their gradients ever
hold the logits of more than one block. What is averaged over which tokens is a step of its own (`mean_over_tokens`).

Letters: B samples, C classes, A answer length with [CLS], V vocabulary, N tokens.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

from tap_jax.token_logits import TokenLogits, whole

PAD = 0
TOKENS_PER_BLOCK = 1024  # 125 MB of float32 logits over BERT's vocabulary


def task_loss(kind: str, outputs: Array | TokenLogits, batch: Mapping[str, Array]) -> Array:
    """ℓ of every sample, float32 [B].

    Args:
      kind: task kind. Classification: cross-entropy of logits [B, C] with labels. Image generation: mean squared
        error of [B, 64, 64, 3] in standardised units. Text generation: mean cross-entropy of logits [B, A-1, V]
        over the answer's tokens, padding ignored.
      outputs: as `ServerModel.forward` or `ServerModel.apply` returns them.
      batch: holds "labels" [B], "images" [B, 64, 64, 3] or "answers" [B, A]; of packed answers also what
        `mean_over_answers` reads, and "targets" for the logits of their sequences.
    """
    if kind.endswith("classification"):
        return optax.softmax_cross_entropy_with_integer_labels(whole(outputs), batch["labels"])
    if kind == "image_generation":
        return jnp.square(whole(outputs) - batch["images"]).mean((1, 2, 3))
    targets = batch["targets"] if "targets" in batch else batch["answers"][:, 1:]
    return mean_over_answers(token_cross_entropy(outputs, targets), batch)


def distillation_loss(
    kind: str,
    teacher: Array | TokenLogits,
    student: Array | TokenLogits,
    batch: Mapping[str, Array],
    *,
    temperature: float = 1.0,
    power: float = -2.0,
    image_loss: str = "kl",
) -> Array:
    """τ̃^power · KL(softmax(z_T/τ̃) ‖ softmax(z_S/τ̃)) of every sample (eq. 5), float32 [B].

    The distribution is over classes; over V at every answer token, averaged over tokens; for images over the pixels
    of each row of a channel (the width axis), averaged over rows and channels, or, with image_loss="mse", the mean
    squared difference. Equation 5 has power -2; Hinton's is +2; at temperature 1 they agree.

    Args:
      kind: task kind; it decides the shapes, as in `task_loss`.
      teacher, student: z_T, z_S: logits [B, C] or [B, A-1, V], or images [B, 64, 64, 3].
      batch: holds "answers" [B, A] for text generation, whose padding is ignored; else nothing is read.
      temperature: τ̃ > 0.
      power: of the factor in front.
      image_loss: "kl" or "mse", for image generation.

    Raises:
      AssertionError: teacher and student have different shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import tap_jax as tap
      >>> teacher, student = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> tap.distillation_loss("text_classification", teacher, teacher, {}).tolist()
      [0.0]
      >>> round(float(tap.distillation_loss("text_classification", teacher, student, {})[0]), 4)
      0.1201
    """
    if kind == "text_generation":
        kl = token_divergence(teacher, student, temperature=temperature) * temperature**power
        return mean_over_answers(kl, batch)
    chex.assert_equal_shape([teacher, student])
    teacher, student = whole(teacher), whole(student)
    if kind == "image_generation":
        if image_loss == "mse":
            return jnp.square(teacher - student).mean((1, 2, 3))
        teacher, student = teacher.swapaxes(-1, -2), student.swapaxes(-1, -2)  # [B, H, C, W]
    kl = _divergence(teacher, student, temperature) * temperature**power
    return kl.reshape(kl.shape[0], -1).mean(-1)


def token_cross_entropy(logits: Array | TokenLogits, targets: Array) -> Array:
    """Cross-entropy of every token, float32 [...], padding as well.

    Args:
      logits: of shape [..., V].
      targets: int [...].
    """
    return _by_blocks(lambda z, ids: optax.softmax_cross_entropy_with_integer_labels(whole(z), ids), logits, targets)


def token_divergence(teacher: Array | TokenLogits, student: Array | TokenLogits, *, temperature: float = 1.0) -> Array:
    """KL(softmax(z_T/τ̃) ‖ softmax(z_S/τ̃)) of every token, float32 [...], padding as well.

    Args:
      teacher, student: z_T, z_S, of shape [..., V].
      temperature: τ̃ > 0.

    Raises:
      AssertionError: they have different shapes.
    """
    chex.assert_equal_shape([teacher, student])
    return _by_blocks(lambda t, s: _divergence(whole(t), whole(s), temperature), teacher, student)


def mean_over_tokens(values: Array, targets: Array) -> Array:
    """The mean over a sample's real tokens, [..., N] -> [...]; 0 where there is none.

    Args:
      values: float32 [..., N]. targets: int [..., N], 0-padded.
    """
    real = (targets != PAD).astype(values.dtype)
    return (values * real).sum(-1) / jnp.maximum(real.sum(-1), 1)


def mean_over_answers(values: Array, batch: Mapping[str, Array]) -> Array:
    """The mean over each sample's answer, float32 [B]: of padded answers, or of packed ones.

    Args:
      values: of every token, float32 [B, A-1]; of packed answers in their sequences' shape.
      batch: holds "answers" [B, A], or of packed ones "answer_segments" and "answer_lengths"; see `device_data.cut`.
    """
    if "answer_segments" not in batch:
        return mean_over_tokens(values, batch["answers"][:, 1:])
    lengths = batch["answer_lengths"]
    owner = batch["answer_segments"].reshape(-1) == jnp.arange(len(lengths))[:, None]
    # Not a product: that could run in less than float32.
    return jnp.where(owner, values.reshape(-1), 0).sum(-1) / jnp.maximum(lengths, 1)


def _divergence(teacher: Array, student: Array, temperature: float) -> Array:
    log_t = jax.nn.log_softmax(teacher / temperature)
    log_s = jax.nn.log_softmax(student / temperature)
    return (jnp.exp(log_t) * (log_t - log_s)).sum(-1)


def _by_blocks(function: Callable[..., Array], first: Array | TokenLogits, *rest: Any) -> Array:
    """`function` of tokens, a block of them at a time where there are factors of logits and more than one block.

    The blocks are equal and as few as can be. Their logits are computed again in the backward pass.

    Args:
      function: (one or more of what is below, for tokens [n]) -> float32 [n].
      first, rest: arrays with leading axes of tokens, and logits, whole or as factors.

    Returns:
      float32, of the shape of `first` without V.
    """
    shape = first.shape[:-1]
    count, given = math.prod(shape), (first, *rest)
    if count <= TOKENS_PER_BLOCK or not any(isinstance(one, TokenLogits) for one in given):
        return function(*given)
    blocks = -(-count // TOKENS_PER_BLOCK)
    size = -(-count // (8 * blocks)) * 8  # rows of a matrix lie by eights on a TPU

    def cut(one: Array) -> Array:
        flat = one.reshape(count, *one.shape[len(shape) :])
        flat = jnp.pad(flat, [(0, blocks * size - count)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(blocks, size, *flat.shape[1:])

    projections = [one.projection if isinstance(one, TokenLogits) else None for one in given]
    tokens = [cut(one.hidden if isinstance(one, TokenLogits) else one) for one in given]

    @jax.checkpoint
    def block(projections: list, tokens: list) -> Array:
        pairs = zip(tokens, projections, strict=True)
        return function(*(one if p is None else TokenLogits(one, p) for one, p in pairs))

    found = jax.lax.map(lambda tokens: block(projections, tokens), tokens)
    return found.reshape(blocks * size)[:count].reshape(shape)
