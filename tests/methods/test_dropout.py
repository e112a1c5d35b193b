"""Who computes with dropout, and which forward passes of a minibatch share one mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax import assembly
from tap_jax import experiment as experiments
from tap_jax.config import default_config
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.objective import Where, _key_of, gradient, statistics
from tap_jax.methods import feddat
from tap_jax.methods.base import Row
from tap_jax.methods.losses import distillation_loss
from tap_jax.models.layers import ModelConfig
from tap_jax.models.lora import dropout
from tap_jax.models.server_model import ServerModel
from tap_jax.platforms import Platform
from tap_jax.tasks import find_task
from tests.models.reference import random_weights

NEWS = find_task("ag_news")
CONFIG = ModelConfig(
    width=8, heads=2, mlp=12, image_layers=1, text_layers=1, image_size=16, patch=8, upsample=0.25, vocab=30,
    max_text=8, max_answer=6, encoder_rank=3, attention_rank=2, expert_rank=2, lora_dropout=0.5, head_dropout=0.5,
    head_hidden=(6,), image_channels=(4, 3, 2), text_heads=2, text_cond_heads=2, text_inner=12,
)  # fmt: skip
BATCH = {
    "tokens": np.array([[2, 7, 9, 3, 0, 0], [2, 5, 3, 0, 0, 0], [2, 8, 8, 11, 4, 3]], np.int32),
    "labels": np.array([0, 3, 1], np.int32),
}
WEIGHTS = np.array([0.5, 0.25, 0], np.float32)  # the last sample is padding


def built(bottleneck: int = 0):
    """A model, Ŵ, and the parts of two clients' forward passes."""
    model = ServerModel(dataclasses.replace(CONFIG, bottleneck=bottleneck), (NEWS,))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    (frozen, first), (_, second) = (random_weights(shapes, np.random.default_rng(seed)) for seed in (1, 2))
    return model, frozen, *(model.collect(blocks, NEWS.streams[0]) for blocks in (first, second))


def row_of(frozen, key) -> Row:
    """One whose parameters are the parts themselves."""
    return Row(frozen, NEWS, BATCH, WEIGHTS, jnp.int32(0), lambda parts: parts, key)


def test_the_teacher_of_stage_2_has_no_dropout_and_the_student_has():
    model, frozen, student, teacher = built()
    config = default_config()
    config.distillation.weights.text_classification = 3.0

    @jax.jit
    def run(key):
        outputs, latents, _ = assembly.sample_loss(model)(frozen, student, NEWS, BATCH, key)
        extra = functools.partial(
            assembly.method_of(assembly.cut(config), model).rule.extra_loss, row_of(frozen, key), outputs, latents
        )
        teachers = [model.apply(frozen, teacher, NEWS, BATCH, key=used) for used in (None, key)]
        divergences = [distillation_loss(NEWS.kind, guide, outputs, BATCH) for guide in teachers]
        students = [model.apply(frozen, student, NEWS, BATCH, key=used) for used in (None, key)]
        return outputs, students, divergences, extra((True, teacher)), extra((False, teacher)), extra(None)

    outputs, (plain, dropped), divergences, found, alone, without = run(jax.random.key(5))
    np.testing.assert_allclose(outputs, dropped, rtol=1e-5)
    assert not np.allclose(outputs, plain, rtol=0.1)
    expected, wrong = (3.0 * float((WEIGHTS * kl).sum()) for kl in divergences)
    assert float(found) == pytest.approx(expected, rel=1e-5) and abs(wrong - expected) > 0.1 * expected > 0
    assert (alone, without) == (0, 0)


def test_feddat_s_passes_over_a_minibatch_have_one_mask():
    """½A1 + ½A1 is A1: then nothing is between the two outputs but the mask."""
    model, frozen, parts, _ = built(bottleneck=3)

    @jax.jit
    def run(key, other):
        divergence = functools.partial(
            feddat.adapter_divergence(model.forward, model.dual, weight=1.0, image_loss="kl"), row_of(frozen, key)
        )
        passes = [model.apply(frozen, parts, NEWS, BATCH, key=used) for used in (key, other, None)]
        return [divergence(outputs, None, (parts, parts)) for outputs in passes]

    same, other, none = map(float, run(jax.random.key(5), jax.random.key(6)))
    assert abs(same) < 1e-6 and other > 1e-3 and none > 1e-3


def test_a_row_has_a_mask_of_its_own(tiny):
    """With a loss that is what the mask is drawn from: DisentAFL's passes see the same; clients, steps, rows others."""
    rows = ({"ag_news": 0.3, "mmlu": 0.3}, {"ag_news": 0.3, "mmlu": 0.3}, {"ag_news": 0.2, "mmlu": 0.3})
    settings = {"method": "disentafl", "variants": ("disentafl",), "batch_size": 12, "engine.microbatch": 2}
    experiment = experiments.build(tiny(rows, settings))
    engine = experiment.engine
    server, kinds = engine.server_params(experiment.initial_blocks), [task.kind for task in engine.tasks]

    def sample_loss(frozen, parts, task, batch, key):
        drawn, size = jax.random.uniform(key), len(batch["tokens"])
        return None, jnp.full((1, size, 1), drawn), jnp.full(size, drawn)

    def measure(row, latents):
        drawn = latents[0, 0, 0]
        return {row.task.kind: row.weights.sum() * jnp.array([drawn, drawn**2])}

    rule = dataclasses.replace(engine.rule, statistics=measure, extra_loss=None)
    objective = dataclasses.replace(engine.objective, sample_loss=sample_loss, rule=rule)

    @jax.jit
    def run(layout, plan, step, key, params):
        where = Where(engine.frozen, engine.arrays, layout, plan, 0, step, key)
        return gradient(objective, where, params)[1].plain, statistics(objective, where, params)

    def means(clients, step) -> dict:
        """(client, task kind, step) -> the mean over the minibatch's samples of what is drawn for their rows."""
        cohort = Cohort.of(engine, clients, 0)
        (plan, _, key), params = cohort.inputs("federated"), cohort.broadcast(server)
        layout, key, params = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (cohort.layout, key, params))
        plan = jax.tree.map(lambda leaf: leaf[0, 0], plan)  # of one shard, which has one device
        losses, sums = jax.device_get(run(layout, plan, step, key, params))
        found = {}
        for at, client in enumerate(cohort.clients):
            for o, kind in enumerate(kinds):
                mean, square = sums[kind][at]
                assert losses[at, o] == pytest.approx(mean, rel=1e-5), "the two passes"
                assert square - mean**2 > 1e-5, "rows of one minibatch"
                found[int(client), kind, step] = float(mean)
        return found

    first, beside, later = means([0, 1], 0), means([1, 2], 0), means([0, 1], 1)
    for place in first.keys() & beside.keys():
        assert place[0] == 1 and first[place] == pytest.approx(beside[place], rel=1e-5)
    values = (first | beside | later).values()
    assert len({round(value, 4) for value in values}) == len(values) == 10


def test_masks_come_from_the_device_s_generator_on_tpus_alone():
    config = default_config()
    found = {kind: assembly.engine_settings(config, 2, Platform(kind, "")).generator for kind in ("cpu", "gpu", "tpu")}
    assert found == {"cpu": "threefry2x32", "gpu": "threefry2x32", "tpu": "rbg"}
    for chosen, generator in (("threefry", "threefry2x32"), ("rbg", "rbg")):
        config.engine.dropout_bits = chosen
        assert assembly.engine_settings(config, 2, Platform("tpu", "")).generator == generator


def test_a_run_notes_that_it_goes_on_with_other_masks(tiny):
    """A run of a TPU that is resumed elsewhere: `rounds.resume` compares these lines."""
    runs = [tiny(({"ag_news": 0.3},) * 2, {"engine.dropout_bits": bits}) for bits in ("auto", "rbg")]
    here, there = (experiments.build(run).engine.numerics for run in runs)
    assert there == f"{here}, dropout by rbg"


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_a_row_s_key_draws_the_same_mask_again_and_another_key_another(generator):
    key, other = (_key_of(generator, jax.random.key(seed)) for seed in (1, 2))
    x = jnp.ones(40_000)
    mask, again, another = (np.asarray(dropout(x, 0.3, used)) for used in (key, key, other))
    np.testing.assert_array_equal(mask, again)
    assert (mask != another).mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.02)
    assert (mask == 0).mean() == pytest.approx(0.3, abs=0.01) and mask.max() == pytest.approx(1 / 0.7)
    first, second = (np.asarray(dropout(x, 0.3, part)) for part in jax.random.split(key))
    assert (first != second).any() and (first != mask).any()
