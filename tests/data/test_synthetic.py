"""The procedural suite: deterministic, disjoint, small in words, and learnable with enough samples only."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax.data import pictures, synthetic
from tap_jax.data.text import load_tokenizer
from tap_jax.errors import UserError
from tap_jax.tasks import TASKS, Task, find_task

NAMES = tuple(TASKS)
EIGHT = ("tiny_imagenet", "cifar100", "fashion_mnist", "caltech256", "ag_news", "mmlu", "vqa", "common_gen")


def small(name: str) -> Task:
    task = find_task(name)
    return dataclasses.replace(task, classes=10) if task.classes > 10 else task


def keys(examples) -> list:
    """What makes a sample the same sample: its picture and its text."""
    images = [None] * len(examples) if examples.images is None else [image.tobytes() for image in examples.images]
    texts = examples.inputs or [None] * len(examples)
    return list(zip(images, texts, strict=True))


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("name", EIGHT)
def test_split_has_the_fields_of_its_task(name):
    task = small(name)
    examples = synthetic.load(task, "train", size=60, seed=3)
    assert len(examples) == 60
    assert (examples.images is not None) == ("image" in task.modalities)
    assert (examples.inputs is not None) == ("text" in task.modalities)
    assert (examples.labels is not None) == (task.classes > 0)
    assert (examples.targets is not None) == (task.kind == "text_generation")
    assert set(examples.domains) == set(range(len(task.domains)))
    if task.classes:
        assert np.bincount(examples.labels, minlength=task.classes).min() >= 60 // task.classes - 1


@pytest.mark.parametrize("name", EIGHT)
def test_train_and_test_share_no_sample(name):
    task = small(name)
    train = synthetic.load(task, "train", size=300, seed=0)
    test = synthetic.load(task, "test", size=150, seed=0)
    assert not set(keys(train)) & set(keys(test))


@pytest.mark.parametrize("name", EIGHT)
def test_same_seed_same_split(name):
    task = small(name)
    first, again, other = (synthetic.load(task, "train", size=40, seed=seed) for seed in (7, 7, 8))
    assert equal(first, again)
    assert not equal(first, other)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_texts_stay_disjoint_across_seeds(seed, other_seed):
    # A hash of the text decides, so even splits of different seeds do not overlap.
    for name in ("ag_news", "mmlu"):
        train = synthetic.load(small(name), "train", size=60, seed=seed)
        test = synthetic.load(small(name), "test", size=30, seed=other_seed)
        assert not set(train.inputs) & set(test.inputs)


def test_concept_sets_are_not_divided():
    task = small("common_gen")
    sets = [
        {
            frozenset(text.split("Concepts: ")[1].split(", "))
            for text in synthetic.load(task, s, size=400, seed=0).inputs
        }
        for s in ("train", "test")
    ]
    assert not sets[0] & sets[1]


def test_common_gen_groups_references_in_test_only():
    train = synthetic.load(small("common_gen"), "train", size=50, seed=0)
    test = synthetic.load(small("common_gen"), "test", size=50, seed=0)
    assert {len(group) for group in train.references} == {1}
    assert min(len(group) for group in test.references) >= 2
    assert all(group[0] == target for group, target in zip(test.references, test.targets, strict=True))
    assert len(set(test.inputs)) == len(test)


def test_the_suite_is_small():
    texts, longest = [], {}
    for name in ("ag_news", "mmlu", "vqa", "common_gen"):
        examples = synthetic.load(small(name), "train", size=600, seed=0)
        texts += [*examples.inputs, *(examples.targets or ())]
        longest[name] = (examples.inputs, examples.targets)
    tokenizer = load_tokenizer("train", texts, vocab_size=1000)
    assert len({word for text in texts for word in tokenizer.normalise(text).split()}) < 300
    for name, (inputs, targets) in longest.items():
        ids = tokenizer.encode(inputs, 256)
        assert (ids != tokenizer.pad_id).sum(1).max() <= (64 if name == "mmlu" else 40)
        if targets:
            assert (tokenizer.encode(targets, 256) != tokenizer.pad_id).sum(1).max() <= 16


def test_the_answer_is_among_the_options():
    examples = synthetic.load(small("mmlu"), "train", size=200, seed=0)
    for source, target in zip(examples.inputs, examples.targets, strict=True):
        assert target.split(": ", 1)[1] in source.splitlines()[1:]


@pytest.mark.parametrize("classes", [2, 8, 12, 37, 200])
def test_every_class_looks_different(classes):
    factors = pictures.class_factors(classes, (10, 5, 4))
    assert factors.shape == (classes, 3)
    assert len({tuple(row) for row in factors}) == classes
    if 4 < classes < 200:
        # No single property tells the classes apart.
        assert max(len(set(column)) for column in factors.T) < classes


def test_more_data_means_better_predictions():
    # The point of learning together: few samples do not suffice, several clients' samples do much better.
    def one_nearest(train, test):
        a, b = (x.images.reshape(-1, 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(x), -1) for x in (train, test))
        distance = (a**2).sum(1)[None] - 2 * b @ a.T
        return float((train.labels[distance.argmin(1)] == test.labels).mean())

    task = small("tiny_imagenet")
    train = synthetic.load(task, "train", size=600, seed=0)
    test = synthetic.load(task, "test", size=200, seed=0)
    few, many = one_nearest(train.take(range(60)), test), one_nearest(train, test)
    assert few < many - 0.1
    assert many > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthetic.load(small("vqa"), "dev", size=1, seed=0), "use one of train, test"),
        (lambda: synthetic.load(small("vqa"), "train", size=0, seed=0), "at least 1"),
        (lambda: synthetic.load(dataclasses.replace(small("vqa"), name="gqa"), "train", size=1, seed=0), "gqa"),
        (
            lambda: synthetic.load(dataclasses.replace(small("cifar100"), classes=201), "train", size=1, seed=0),
            "201 is more than the 200",
        ),
        (
            lambda: synthetic.load(small("common_gen"), "test", size=5000, seed=0),
            "data.test_size: 5000 of common_gen, but the rules give about .*; use fewer",
        ),
    ],
)
def test_user_errors_name_the_remedy(call, message):
    with pytest.raises(UserError, match=message):
        call()
