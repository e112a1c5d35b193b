"""Rows of test samples are as large as the tests need, and the evaluator says what it is at."""

import numpy as np
import pytest

from tap_jax.blocks import select
from tap_jax.engine.cohort import client_batches
from tap_jax.evaluation.evaluate import Evaluator
from tap_jax.experiment import build

ROWS = ({"fashion_mnist": 0.5}, {"fashion_mnist": 0.5, "common_gen": 1.0})


@pytest.fixture(scope="module")
def experiment(tiny):
    return build(tiny(ROWS, {"data.test_size": 9}))


def evaluator(experiment, most):
    data = experiment.data
    return Evaluator(
        experiment.engine,
        data.test,
        tokenizer=data.tokenizer,
        scorer=experiment.scorer,
        personal=data.personal_tests,
        microbatch=most,
    )


@pytest.fixture(scope="module")
def wide(experiment):
    return evaluator(experiment, 50)


def scores(experiment, found):
    blocks, partition = experiment.initial_blocks, experiment.partition
    return [
        row
        for cohort in client_batches(experiment.engine, 0)
        for row in found.evaluate(
            "tap", cohort, {int(k): select(blocks, partition.blocks_of(k)) for k in cohort.clients if k >= 0}
        )
    ]


@pytest.mark.parametrize(("most", "size"), [(50, 9), (9, 9), (8, 5), (4, 3), (1, 1)])
def test_a_row_is_as_large_as_the_tests_need(experiment, most, size):
    assert {shape.samples for (shape,) in evaluator(experiment, most).shapes.values()} == {size}


def test_scores_do_not_depend_on_the_rows(experiment, wide):
    wide, narrow = (scores(experiment, found) for found in (wide, evaluator(experiment, 4)))
    assert [row | {"value": 0} for row in wide] == [row | {"value": 0} for row in narrow]
    values = [[row["value"] for row in rows] for rows in (wide, narrow)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_scores_do_not_depend_on_packing(tiny, experiment):
    packed = build(tiny(ROWS, {"data.test_size": 9, "engine.packing": "on", "engine.microbatch": 1}))
    assert any(len(shapes) > 1 for shapes in packed.evaluator.shapes.values())
    values = [[row["value"] for row in scores(run, run.evaluator)] for run in (experiment, packed)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_with_personal_tests_the_largest_share_decides(tiny):
    experiment = build(tiny(ROWS, {"data.test_size": 20, "data.test_split": "personal"}))
    found = evaluator(experiment, 50)
    shares = [mine["fashion_mnist"] for mine in experiment.data.personal_tests]
    group = next(f.name for f in experiment.engine.task_groups if f.tasks[0].name == "fashion_mnist")
    assert found.shapes[group][0].samples == max(map(len, shares)) < 20
    assert all(np.isfinite(row["value"]) for row in scores(experiment, found))


def test_what_may_take_long_is_told(experiment, wide, monkeypatch):
    told = []
    monkeypatch.setattr(wide, "tell", told.append)
    scores(experiment, wide)
    assert "tap: predictions for fashion_mnist, clients 0, 1" in told
    assert told[-1] == "tap: scores of 9 texts of common_gen, client 1"
