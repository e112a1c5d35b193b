"""Samples are what the scored models generate, and taking them changes no score."""

import jax
import numpy as np
import pytest

from tap_jax.blocks import select
from tap_jax.data.device_data import cut
from tap_jax.engine.cohort import client_batches
from tap_jax.evaluation.samples import EXAMPLES, ImageSample, TextSample, to_uint8
from tap_jax.experiment import build


@pytest.fixture(scope="module")
def evaluated(tiny):
    """(experiment, rows without samples, rows with, samples) of models as they start."""
    rows = ({"fashion_mnist": 0.5}, {"fashion_mnist": 0.5, "common_gen": 1.0})
    experiment = build(tiny(rows, {"federation.groups": 2, "data.test_size": 9}))
    evaluator, partition = experiment.evaluator, experiment.partition

    def scores():
        return [
            row
            for cohort in client_batches(experiment.engine, 0)
            for row in evaluator.evaluate(
                "tap",
                cohort,
                {int(k): select(experiment.initial_blocks, partition.blocks_of(k)) for k in cohort.clients if k >= 0},
            )
        ]

    before = scores()
    evaluator.keep_samples("tap")
    return experiment, before, scores(), evaluator.sampler.samples


def test_no_score_changes(evaluated):
    _, before, after, _ = evaluated
    assert before == after


def test_the_first_owners_first_test_samples_are_kept(evaluated):
    experiment, _, _, samples = evaluated
    kept = {(type(s), s.task, s.client) for s in samples}
    assert kept == {
        (ImageSample, "fashion_mnist", 0),
        (ImageSample, "fashion_mnist", 1),
        (TextSample, "common_gen", 1),
        (TextSample, "common_gen", 3),
    }
    assert len(samples) == 4 * EXAMPLES and {s.variant for s in samples} == {"tap"}
    for sample in samples:
        test = experiment.data.test[sample.task]
        if isinstance(sample, ImageSample):
            np.testing.assert_array_equal(sample.target, test.images[sample.example])
        else:
            assert sample.references == tuple(test.references[sample.example])
            assert sample.given in experiment.data.tokenizer.decode(test.tokens)


def test_reconstructions_are_the_models_own(evaluated):
    experiment, _, _, samples = evaluated
    model, task = experiment.model, next(t for t in experiment.model.tasks if t.name == "fashion_mnist")
    parts = model.collect(experiment.initial_blocks, task.streams[0])
    test = {"images": jax.numpy.asarray(experiment.data.test["fashion_mnist"].images)}
    batch = cut(test, jax.numpy.arange(EXAMPLES))
    forward = jax.jit(lambda batch: model.apply(experiment.engine.frozen, parts, task, batch))
    wanted = to_uint8(np.asarray(forward(batch)))
    mine = [s for s in samples if isinstance(s, ImageSample) and s.client == 1]
    assert [s.example for s in mine] == list(range(EXAMPLES))
    difference = np.stack([s.reconstruction for s in mine]).astype(int) - wanted
    assert abs(difference).max() <= 1
    assert np.stack([s.reconstruction for s in mine]).std() > 0
