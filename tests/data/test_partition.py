"""Dealing samples to clients: disjoint, complete, deterministic, and never a client without a sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax.data.partition import assign
from tap_jax.errors import UserError
from tap_jax.federation import PAPER_ROWS, client_table


def pooled(dealt, task):
    return np.concatenate([mine[task] for mine in dealt if task in mine])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(60, 400),
    groups=st.integers(1, 4),
    split=st.sampled_from(["share", "iid", "dirichlet", "pathological"]),
)
def test_no_sample_twice_and_none_lost(seed, size, groups, split):
    federation = client_table([{"ag_news": 0.25, "vqa": 1.0}, {"ag_news": 0.5}, {"ag_news": 0.25}], groups=groups)
    labels = {"ag_news": np.arange(size) % 4}
    dealt = assign(federation, {"ag_news": size, "vqa": size + 1}, seed=seed, labels=labels, split=split)
    for task, n in (("ag_news", size), ("vqa", size + 1)):
        assert np.array_equal(np.sort(pooled(dealt, task)), np.arange(n))
    for client, mine in zip(federation.clients, dealt, strict=True):
        assert set(mine) == set(client.shares)
        assert all(len(ids) and ids.dtype == np.int64 for ids in mine.values())


def test_paper_shares():
    federation = client_table(PAPER_ROWS["flava"], groups=3)
    dealt = assign(federation, {task.name: 3000 for task in federation.tasks}, seed=41)
    for client, mine in zip(federation.clients, dealt, strict=True):
        for task, ids in mine.items():
            assert len(ids) == round(1000 * client.shares[task])
    ids = pooled(dealt, "ag_news")
    assert len(np.unique(ids)) == len(ids) == 3000


def test_unshared_remainder_stays_unused():
    dealt = assign(client_table([{"vqa": 0.5}], groups=2), {"vqa": 101}, seed=0)
    assert [len(mine["vqa"]) for mine in dealt] == [26, 25]


def test_groups_can_share_parts_in_turn():
    """Six groups on three parts: as three groups, twice; clients of one group are disjoint."""
    rows = [{"vqa": 0.5}, {"vqa": 0.5}]
    three = assign(client_table(rows, groups=3), {"vqa": 30}, seed=0)
    six = assign(client_table(rows, groups=6), {"vqa": 30}, seed=0, parts=3)
    assert [mine["vqa"].tolist() for mine in six] == 2 * [mine["vqa"].tolist() for mine in three]


def test_one_group_has_all_parts():
    """As a centralised run's, whatever its clients would have shared."""
    (alone,) = assign(client_table([{"vqa": 1.0}]), {"vqa": 30}, seed=0, parts=3)
    assert sorted(alone["vqa"]) == list(range(30))


@pytest.mark.parametrize("split", ["share", "iid", "dirichlet", "pathological"])
def test_the_seed_decides(split):
    federation = client_table([{"vqa": 0.5}, {"vqa": 0.5}])
    first, again, other = (assign(federation, {"vqa": 50}, seed=seed, split=split) for seed in (1, 1, 2))
    assert np.array_equal(first[0]["vqa"], again[0]["vqa"])
    assert not np.array_equal(first[0]["vqa"], other[0]["vqa"])


def test_another_task_changes_nothing():
    alone = assign(client_table([{"vqa": 1.0}]), {"vqa": 50}, seed=1)
    beside = assign(client_table([{"vqa": 1.0, "mmlu": 1.0}]), {"vqa": 50, "mmlu": 9}, seed=1)
    assert np.array_equal(alone[0]["vqa"], beside[0]["vqa"])


def test_iid_is_even_whatever_the_shares():
    federation = client_table([{"vqa": 0.1}, {"vqa": 0.9}])
    assert [len(mine["vqa"]) for mine in assign(federation, {"vqa": 100}, seed=0, split="iid")] == [50, 50]


def test_small_alpha_skews_labels_more():
    federation = client_table([{"ag_news": 0.2}] * 5)
    labels = np.arange(2000) % 4

    def largest_class(alpha):
        dealt = assign(
            federation, {"ag_news": 2000}, seed=0, labels={"ag_news": labels}, split="dirichlet", alpha=alpha
        )
        return np.mean([np.bincount(labels[mine["ag_news"]]).max() / len(mine["ag_news"]) for mine in dealt])

    assert largest_class(1000.0) < 0.3 < 0.5 < largest_class(0.05)


def test_a_test_set_is_skewed_like_its_training_set():
    """Of another size, in another order, and even without one of the classes."""
    federation = client_table([{"ag_news": 0.2}] * 5)
    mixes = []
    for labels in (np.arange(8000) % 4, np.sort(np.arange(2000) % 4), 1 + np.arange(1500) % 3):
        dealt = assign(
            federation, {"ag_news": len(labels)}, seed=7, labels={"ag_news": labels}, split="dirichlet", alpha=0.3
        )
        mixes.append(np.stack([np.bincount(labels[mine["ag_news"]], minlength=4) for mine in dealt]))
    mixes = [mix / np.maximum(1, mix.sum(0)) for mix in mixes]  # [client, class], parts of each class
    np.testing.assert_allclose(mixes[1], mixes[0], atol=0.005)
    np.testing.assert_allclose(mixes[2][:, 1:], mixes[0][:, 1:], atol=0.005)
    assert np.ptp(mixes[0], 1).max() > 0.2, "the classes are dealt alike"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    owners=st.integers(1, 12),
    most=st.integers(1, 6),
    classes=st.integers(1, 10),
    extra=st.integers(0, 200),
)
def test_pathological_clients_have_so_many_classes(seed, owners, most, classes, extra):
    """Each client has that many, all classes have equally many clients, and those of a class equal parts of it."""
    labels = np.random.default_rng(seed).permutation(np.arange(owners * classes + extra) % classes)
    federation = client_table([{"ag_news": 1 / owners}] * owners)
    given = {"seed": seed, "split": "pathological", "classes_per_client": most}
    dealt = assign(federation, {"ag_news": len(labels)}, labels={"ag_news": labels}, **given)
    mixes = np.array([np.bincount(labels[mine["ag_news"]], minlength=classes) for mine in dealt])  # [client, class]
    assert ((mixes > 0).sum(1) == min(most, classes)).all()
    users = (mixes > 0).sum(0)
    assert np.ptp(users) <= 1
    for c in np.flatnonzero(users):
        mine = mixes[mixes[:, c] > 0, c]
        assert np.ptp(mine) <= 1 and mine.sum() == (labels == c).sum()
    ids = pooled(dealt, "ag_news")
    assert len(np.unique(ids)) == len(ids)

    # A test set of another size and order, without the first class, goes to clients of the same classes.
    test = np.random.default_rng(seed + 1).permutation(np.arange(owners * classes) % classes)
    test = test[test > 0] if most > 1 and classes > 1 else test
    again = assign(federation, {"ag_news": len(test)}, labels={"ag_news": test}, classes={"ag_news": labels}, **given)
    for mine, mix in zip(again, mixes, strict=True):
        assert set(test[mine["ag_news"]]) == set(np.flatnonzero(mix)) & set(test)


def test_a_pathological_split_of_one_kind_is_even():
    dealt = assign(client_table([{"vqa": 0.1}] * 4), {"vqa": 42}, seed=0, split="pathological")
    assert sorted(len(mine["vqa"]) for mine in dealt) == [10, 10, 11, 11]


def test_tiny_alpha_leaves_nobody_empty():
    dealt = assign(client_table([{"vqa": 0.1}] * 10), {"vqa": 12}, seed=0, split="dirichlet", alpha=1e-8)
    assert sorted(len(mine["vqa"]) for mine in dealt) == [1] * 9 + [3]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sizes": {"vqa": 1}}, "client1 is left with no sample of vqa.*larger share"),
        ({"sizes": {"vqa": 1}, "split": "iid"}, "client1 is left with no sample"),
        ({"sizes": {"vqa": 1}, "split": "dirichlet"}, "left with no sample"),
        ({"sizes": {}}, "no training set for task vqa"),
        ({"sizes": {"vqa": 9}, "split": "fair"}, "federation.split: unknown 'fair'"),
        ({"sizes": {"vqa": 9}, "split": "dirichlet", "alpha": 0.0}, "federation.alpha: 0.0; use more than 0"),
        (
            {"sizes": {"vqa": 9}, "split": "pathological", "classes_per_client": 0},
            "federation.classes_per_client: 0; use at least 1",
        ),
    ],
)
def test_user_errors(kwargs, message):
    federation = client_table([{"vqa": 0.9}, {"vqa": 0.1}])
    with pytest.raises(UserError, match=message):
        assign(federation, kwargs.pop("sizes"), seed=0, **kwargs)
