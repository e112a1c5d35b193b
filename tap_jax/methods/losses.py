"""Task losses and the distillation loss (equations 2, 5 and 6), per sample and in float32.

Letters: B samples, C classes, A answer length with [CLS], V vocabulary.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

PAD = 0


def task_loss(kind: str, outputs: Array, batch: Mapping[str, Array]) -> Array:
    """ℓ of every sample, float32 [B].

    Args:
      kind: task kind. Classification: cross-entropy of logits [B, C] with labels. Image generation: mean squared
        error of [B, 64, 64, 3] in standardised units. Text generation: mean cross-entropy of logits [B, A-1, V]
        over the answer's tokens, padding ignored.
      outputs: as `ServerModel.apply` returns them.
      batch: holds "labels" [B], "images" [B, 64, 64, 3] or "answers" [B, A].
    """
    if kind.endswith("classification"):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
    if kind == "image_generation":
        return jnp.square(outputs - batch["images"]).mean((1, 2, 3))
    targets = batch["answers"][:, 1:]
    return _token_mean(optax.softmax_cross_entropy_with_integer_labels(outputs, targets), targets)


def distillation_loss(
    kind: str,
    teacher: Array,
    student: Array,
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
    chex.assert_equal_shape([teacher, student])
    if kind == "image_generation":
        if image_loss == "mse":
            return jnp.square(teacher - student).mean((1, 2, 3))
        teacher, student = teacher.swapaxes(-1, -2), student.swapaxes(-1, -2)  # [B, H, C, W]
    log_t = jax.nn.log_softmax(teacher / temperature)
    log_s = jax.nn.log_softmax(student / temperature)
    kl = (jnp.exp(log_t) * (log_t - log_s)).sum(-1) * temperature**power
    if kind == "text_generation":
        return _token_mean(kl, batch["answers"][:, 1:])
    return kl.reshape(kl.shape[0], -1).mean(-1)


def _token_mean(values: Array, targets: Array) -> Array:
    real = (targets != PAD).astype(values.dtype)
    return (values * real).sum(-1) / jnp.maximum(real.sum(-1), 1)
