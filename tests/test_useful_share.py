"""The measure of useful arithmetic: against a count by hand, and its costs against counts of other shapes."""

import re

import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.assembly import engine_settings
from tap_jax.cli.main import main
from tap_jax.data.packing import RowShape, Sequences, padded
from tap_jax.data.sampling import Rows, Table
from tap_jax.data.task_groups import TaskGroup
from tap_jax.data.text import TaskArrays
from tap_jax.planning.step_cost import padded_batch
from tap_jax.planning.useful_share import Costs, Measure, TaskCost, measure, report
from tap_jax.tasks import find_task

GEN = find_task("common_gen")
GROUP = TaskGroup((GEN,))


class HandMade:
    """A sample costs 100, a text of T tokens 10·T + T², an answer of A tokens 5·A; a row as much as its room."""

    def task(self, task):
        return TaskCost(100.0, (10.0, 1.0), (5.0, 0.0))

    def row(self, task, shape, widths):
        if shape.texts is None:
            return shape.samples * (100 + 10 * widths[0] + widths[0] ** 2 + 5 * widths[1])
        text = shape.texts.number * (10 * shape.texts.tokens + shape.texts.tokens**2)
        return shape.samples * 100 + text + 5 * shape.answers.total

    def generates(self, task):
        return False


def arrays(texts, answers):
    """A split with texts and answers of these lengths, padded to 8 and 6 + 1."""
    tokens = (np.arange(8) < np.array(texts)[:, None]).astype(np.int32)
    found = (np.arange(7) < 1 + np.array(answers)[:, None]).astype(np.int32)
    return TaskArrays(
        domains=np.zeros(len(texts), np.int32), tokens=tokens, answers=found, answer_lengths=np.array(answers)
    )


def one_row(shape, samples):
    """A plan's rows of one step: one row with these samples."""
    ids, weights = np.zeros((1, 2, shape.samples), np.int32), np.zeros((1, 2, shape.samples), np.float32)
    ids[0, 0, : len(samples)], weights[0, 0, : len(samples)] = samples, 1 / len(samples)
    zeros = np.zeros((1, 2), np.int32)
    return Rows(Table(zeros, zeros, ids, weights, zeros.astype(np.float32), zeros), np.array([1]), np.array([0]))


def test_a_padded_row_counted_by_hand():
    (shape,) = padded(3)
    found = Measure(HandMade(), [GROUP], {GROUP.name: (shape,)}, {"common_gen": arrays([4, 8, 2], [6, 1, 3])})
    ((name, share),) = found._rows(GROUP, shape, one_row(shape, [0, 2]))
    assert name == "common_gen"
    # Two of three places are taken, by texts of 4 and 2 of 8 tokens and answers of 6 and 3 of 6.
    assert share.useful == 2 * 100 + (40 + 16) + (20 + 4) + 5 * 9
    assert share.computed == 3 * (100 + 80 + 64 + 30)
    assert share.lost == {"rows": 100 + 144 + 30, "texts": 2 * 144 - 80, "answers": 2 * 30 - 45}
    assert share.useful + sum(share.lost.values()) == share.computed


def test_a_packed_row_counted_by_hand():
    shape = RowShape(4, Sequences(1, 16), Sequences(2, 6), cost=16)
    found = Measure(HandMade(), [GROUP], {GROUP.name: (shape,)}, {"common_gen": arrays([4, 8, 2], [6, 1, 3])})
    ((_, share),) = found._rows(GROUP, shape, one_row(shape, [0, 1, 2]))
    assert share.useful == 3 * 100 + (40 + 16) + (80 + 64) + (20 + 4) + 5 * 10
    assert share.computed == 4 * 100 + 160 + 256 + 60
    assert share.lost == {"rows": 100, "texts": 416 - 224, "answers": 60 - 50}


@pytest.fixture(scope="module")
def built(tiny):
    rows = ({"ag_news": 0.3}, {"common_gen": 0.4, "vqa": 0.4}, {"cifar100": 0.5})
    config = tiny(rows, {"engine.packing": "on", "engine.microbatch": 4, "batch_size": 12, "cohort_size": 2})
    return config, experiments.build(config)


@pytest.fixture(scope="module")
def gradient(built):
    return Costs(built[1].model, "gradient")


def test_costs_of_any_length_follow_from_three(built, gradient):
    _, run = built
    for costs in (gradient, Costs(run.model, "forward", beside=gradient)):
        for task in run.model.tasks:
            cost = costs.task(task)
            text, answer = 7 if "text" in task.modalities else 0, 5 if task.kind == "text_generation" else 0
            direct = costs._count(task, padded_batch(task, 1, text=text, answer=answer))
            assert cost.sample + cost.texts(text) + cost.answers(answer) == pytest.approx(direct, rel=1e-9)


def test_a_packed_row_costs_what_its_sequences_cost(built, gradient):
    _, run = built
    for group in run.engine.task_groups:
        task = group.tasks[0]
        cost = gradient.task(task)
        for shape in run.engine.shapes[group.name]:
            expected = shape.samples * cost.sample
            for sequences, one in ((shape.texts, cost.texts), (shape.answers, cost.answers)):
                if sequences:
                    expected += sequences.number * float(one(np.array(sequences.tokens)))
            # The mean over a sample's tokens is a product with all tokens of the row.
            assert expected <= gradient.row(task, shape, (8, 8)) * 1.001
            assert gradient.row(task, shape, (8, 8)) <= 1.15 * expected


def test_shares_of_a_run(built):
    config, run = built
    settings = engine_settings(config, 3)
    shares = measure(run.model, run.federation, run.data, run.data.clients, settings, personal=True, plans=2)
    for by_task in (shares.rounds, shares.stage2, shares.evaluation):
        for share in by_task.values():
            assert 0 < share.share <= 1 and share.useful + sum(share.lost.values()) == pytest.approx(share.computed)
    assert set(shares.stage2) == set(shares.evaluation) == {task.name for task in run.model.tasks}
    lines = report(shares, rounds=30)
    assert lines[0].startswith("useful share, rounds: 0.") and lines[1].startswith("useful share, stage 2: 0.")
    in_all, *others = (float(number.replace(",", "")) for number in re.findall(r"[\d.e+,-]+(?= in )", lines[3]))
    computed = [sum(s.computed for s in by_task.values()) / 1e12 for by_task in (shares.rounds, shares.stage2)]
    assert in_all == pytest.approx(30 * computed[0], rel=0.01) and others[0] == pytest.approx(computed[1], rel=0.01)
    assert len(others) == 2


def test_the_command_prints_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    rows = "({'cifar100':0.5,'common_gen':0.5},)"
    config = f"demo:cohort_size=1,federation.table=custom,federation.groups=1,federation.rows={rows}"
    flags = [f"--config={config},data.train_size=64,data.test_size=8", "--plans=1"]
    assert main(["describe", *flags]) == 0
    out = capsys.readouterr().out
    assert "\nuseful share, rounds: 0." in out and "\nuseful share, stage 2: 0." in out
    for phase in ("rounds", "stage 2", "evaluation"):
        assert re.findall(rf"^  {phase} +(\w+)", out, re.MULTILINE) == ["cifar100", "common_gen", "all"]
    for flag, message in (("--plans=-1", "plans: -1"), (f"--config.data.root={tmp_path}", "data.root")):
        assert main(["describe", *flags, flag]) == 2
        assert message in capsys.readouterr().err
