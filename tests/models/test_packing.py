"""Packed rows against padded ones: the same outputs, losses and gradients of every sample, whatever shares its row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax.assembly import sample_loss
from tap_jax.data.device_data import cut
from tap_jax.data.packing import RowShape, Sequences, pack
from tap_jax.methods.losses import distillation_loss
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tests.models import reference

CONFIG = ModelConfig(
    width=24, heads=3, mlp=40, image_layers=1, text_layers=2, image_size=32, patch=8, upsample=0.5, vocab=50,
    max_text=24, max_answer=16, encoder_rank=3, attention_rank=2, expert_rank=2, lora_dropout=0.0, head_hidden=(20,),
    head_dropout=0.0, image_channels=(4, 3, 2), text_heads=2, text_cond_heads=2, text_inner=12, text_dropout=0.0,
    layer_norm_eps=1e-6,
)  # fmt: skip
SAMPLES = 11


def stored(task, rng):
    """Device arrays of some samples whose texts and answers have all lengths."""

    def tokens(low, high):
        found = np.zeros((SAMPLES, high), np.int32)
        for row, length in zip(found, rng.integers(low, high + 1, SAMPLES), strict=True):
            row[:length] = rng.integers(1, CONFIG.vocab, length)
        found[0, :] = rng.integers(1, CONFIG.vocab, high)  # one is as long as they may be
        return found

    fields = {"tokens": tokens(2, CONFIG.max_text)}
    if "image" in task.modalities:
        fields["images"] = rng.integers(0, 256, (SAMPLES, 64, 64, 3)).astype(np.uint8)
    if task.kind == "text_generation":
        fields["answers"] = tokens(3, CONFIG.max_answer)
    if task.classes:
        fields["labels"] = rng.integers(0, task.classes, SAMPLES).astype(np.int32)
    return {name: jnp.asarray(values) for name, values in fields.items()}


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("ag_news", {}),
        ("vqa", {}),
        ("common_gen", {"condition": "paths"}),
        ("common_gen", {"backbone": "standard"}),
        ("vqa", {"name": "vilt", "position_grid": 4}),
    ],
)
def test_packed_and_padded_are_the_same(task, change):
    task, rng = find_task(task), np.random.default_rng(0)
    model = ServerModel(dataclasses.replace(CONFIG, **change), (task,))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    frozen, blocks = jax.tree.map(jnp.asarray, reference.random_weights(shapes, np.random.default_rng(1)))
    parts, fields = model.collect(blocks, task.streams[0]), stored(task, rng)
    shape = RowShape(9, Sequences(5, 48), Sequences(4, 32) if "answers" in fields else None, cost=1)
    texts = np.asarray((fields["tokens"] != 0).sum(1))
    answers = np.asarray((fields["answers"] != 0).sum(1) - 1) if "answers" in fields else np.zeros(SAMPLES, int)
    rows = pack([shape], SAMPLES, texts, answers)
    assert len(rows) > 1 and max(len(row.samples) for row in rows) > shape.always
    loss = sample_loss(model)

    @jax.jit
    def losses(parts, batch):
        outputs, _, found = loss(frozen, parts, task, batch, None)
        teacher = jax.tree.map(lambda x: x * 1.1, parts)
        guide, _, _ = loss(frozen, teacher, task, batch, None)
        return found + distillation_loss(task.kind, jax.lax.stop_gradient(guide), outputs, batch)

    weights = jnp.asarray(rng.random(SAMPLES), jnp.float32)
    expected = losses(parts, cut(fields, np.arange(SAMPLES)))
    gradient = jax.jit(jax.grad(lambda p: (weights * losses(p, cut(fields, np.arange(SAMPLES)))).sum()))(parts)
    total = jax.tree.map(jnp.zeros_like, gradient)

    @jax.jit
    def row_gradient(parts, batch, mine):
        def row_loss(parts):
            found = losses(parts, batch)
            return jnp.where(mine > 0, mine * found, 0).sum(), found

        return jax.grad(row_loss, has_aux=True)(parts)

    for row in rows:
        n, room = len(row.samples), shape.samples - len(row.samples)
        ids = np.pad(row.samples, (0, room))
        places = [np.pad(row.text_at, (0, room), constant_values=shape.texts.total)]
        if shape.answers:
            places.append(np.pad(row.answer_at, (0, room), constant_values=shape.answers.total))
        batch = cut(fields, ids, shape, *places)
        mine = jnp.pad(weights[row.samples], (0, room))
        grads, found = row_gradient(parts, batch, mine)
        np.testing.assert_allclose(found[:n], expected[row.samples], rtol=2e-5, atol=1e-6)
        total = jax.tree.map(jnp.add, total, grads)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), total, gradient)


def test_a_row_holds_its_samples_tokens_and_no_others():
    fields = stored(find_task("common_gen"), np.random.default_rng(1))
    shape = RowShape(3, Sequences(2, 48), Sequences(2, 32), cost=1)
    batch = cut(fields, np.array([4, 0, 7]), shape, np.array([48, 0, 96]), np.array([0, 32, 64]))
    length = int((fields["tokens"][4] != 0).sum())
    assert np.array_equal(batch["tokens"][1, :length], fields["tokens"][4, :length])
    assert np.array_equal(batch["tokens"][0, :24], fields["tokens"][0])
    assert batch["text_segments"].tolist() == [[1] * 24 + [-1] * 24, [0] * length + [-1] * (48 - length)]
    assert batch["text_positions"][0].tolist() == [*range(24), *[0] * 24]
    answer = int((fields["answers"][4] != 0).sum()) - 1
    assert np.array_equal(batch["answers"][0, :answer], fields["answers"][4, :answer])
    assert np.array_equal(batch["targets"][0, :answer], fields["answers"][4, 1 : answer + 1])
    assert not batch["tokens"][0, 24:].any() and not batch["targets"][0, answer:].any()
    assert batch["answer_lengths"][:2].tolist() == [answer, CONFIG.max_answer - 1]
