"""Equations 2 and 5 against PyTorch's losses."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tap_jax.assembly import cut, method_of
from tap_jax.config import default_config
from tap_jax.methods.base import Row
from tap_jax.methods.losses import distillation_loss, task_loss
from tap_jax.tasks import find_task

pytestmark = pytest.mark.usefixtures("strict")

rng = np.random.default_rng(0)
SHAPES = {
    "text_classification": (5, 4),
    "image_classification": (5, 7),
    "image_generation": (2, 64, 64, 3),
    "text_generation": (3, 6, 11),
}
ANSWERS = np.array([[1, 5, 6, 2, 0, 0, 0], [1, 9, 2, 0, 0, 0, 0], [1, 3, 4, 5, 6, 10, 2]], np.int32)
BATCH = {
    "labels": np.array([0, 3, 2, 2, 1], np.int32),
    "images": rng.standard_normal((2, 64, 64, 3)).astype(np.float32),
    "answers": ANSWERS,
}


def drawn(kind) -> tuple[np.ndarray, np.ndarray]:
    """Teacher and student; the teacher is surer."""
    return tuple(scale * rng.standard_normal(SHAPES[kind]).astype(np.float32) for scale in (3, 1))


def over_batch(kind, losses) -> float:
    """What the objective makes of the samples' losses: their mean, for text weighted by tokens."""
    weights = (ANSWERS[:, 1:] != 0).sum(1) if kind == "text_generation" else np.ones(len(losses))
    return float((np.asarray(losses) * weights).sum() / weights.sum())


def distributions(kind, z) -> torch.Tensor:
    """Rows of logits over classes, over V at every real token, over the pixels of a row of a channel."""
    if kind == "text_generation":
        return torch.stack([z[b, t] for b, t in np.argwhere(ANSWERS[:, 1:] != 0)])
    if kind == "image_generation":
        return torch.stack([z[b, h, :, c] for b in range(2) for h in range(64) for c in range(3)])
    return z


@pytest.mark.parametrize(("temperature", "power"), [(1.0, -2.0), (2.0, -2.0), (2.0, 2.0)])
@pytest.mark.parametrize("kind", SHAPES)
def test_distillation_loss_is_torch_kl_div(kind, temperature, power):
    teacher, student = drawn(kind)
    log_t, log_s = (
        torch.log_softmax(distributions(kind, torch.tensor(z)) / temperature, -1) for z in (teacher, student)
    )
    expected = float(F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)) * temperature**power
    found = distillation_loss(kind, teacher, student, BATCH, temperature=temperature, power=power)
    assert found.shape == (len(teacher),) and found.dtype == np.float32
    assert over_batch(kind, found) == pytest.approx(expected, rel=1e-5)
    other = distillation_loss(kind, student, teacher, BATCH, temperature=temperature, power=power)
    assert over_batch(kind, other) != pytest.approx(expected, rel=1e-3), "the divergence has a direction"


def test_images_may_be_compared_by_mean_squares():
    teacher, student = drawn("image_generation")
    found = distillation_loss("image_generation", teacher, student, BATCH, image_loss="mse")
    assert np.mean(found) == pytest.approx(float(F.mse_loss(torch.tensor(student), torch.tensor(teacher))), rel=1e-5)


def test_the_configuration_says_how_a_teacher_teaches():
    """Equation 6's second term: each field of `distillation` reaches it. The teacher's blocks are its outputs here."""
    model = types.SimpleNamespace(forward=lambda frozen, blocks, task, batch: (blocks, None), tasks=())
    config = default_config()
    config.distillation.update(temperature=2.0, temperature_power=1.0, image_loss="mse")
    config.distillation.weights.update(text_classification=3.0, image_generation=5.0)

    extra_loss = method_of(cut(config), model).rule.extra_loss

    def kl(teacher, student):
        log_t, log_s = (torch.log_softmax(z / 2, -1) for z in (teacher, student))
        return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)

    for name, expected in (
        ("ag_news", lambda t, s: 3 * 2 * kl(t, s)),  # β τ̃^power KL
        ("fashion_mnist", lambda t, s: 5 * torch.square(t - s).mean((1, 2, 3))),
    ):
        task = find_task(name)
        teacher, student = drawn(task.kind)
        weights = np.linspace(1, 0, len(student), dtype=np.float32)
        row = Row(None, task, BATCH, weights, 0, lambda blocks: blocks, None)
        found = extra_loss(row, student, None, (True, teacher))
        each = expected(torch.tensor(teacher), torch.tensor(student))
        assert float(found) == pytest.approx(float(each @ torch.tensor(weights)), rel=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_task_loss_is_torch_s(kind):
    z, _ = drawn(kind)
    if kind.endswith("classification"):
        expected = F.cross_entropy(torch.tensor(z), torch.tensor(BATCH["labels"]).long())
    elif kind == "image_generation":
        expected = F.mse_loss(torch.tensor(z), torch.tensor(BATCH["images"]))
    else:
        expected = F.cross_entropy(
            torch.tensor(z).flatten(0, 1), torch.tensor(ANSWERS[:, 1:]).long().flatten(), ignore_index=0
        )
    assert over_batch(kind, task_loss(kind, z, BATCH)) == pytest.approx(float(expected), rel=1e-5)
