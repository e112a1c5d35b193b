"""What averaging A and B each misses of averaging BA, against loops over clients, blocks and adapters."""

import jax
import numpy as np
import pytest

from tap_jax import blocks
from tap_jax.blocks import Partition
from tap_jax.engine.lora_gap import lora_gap
from tests.engine.lora_gap_oracle import literal

SHAPES = {
    "encoder": {
        "query": {"lora": {"a": (4, 5, 2), "b": (4, 2, 3)}},
        "bias": (3,),
        "value": {"a": (2, 6, 1), "b": (2, 1, 4)},
    },
    "head": {"kernel": (3, 2), "bias": (2,)},
}
NAMES, GROUPS = ("encoder/text", "encoder/image", "head/a"), ("encoder", "encoder", "head")
TREES = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, is_leaf=lambda found: isinstance(found, tuple)
)
LIKE = {name: TREES[group] for name, group in zip(NAMES, GROUPS, strict=True)}


def drawn(rng, names):
    like = {name: LIKE[name] for name in names}
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_loops_give(seed):
    """With clients who do not own all blocks, and one that is not heard and holds what is no number."""
    rng = np.random.default_rng(seed)
    owned = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1]], bool)
    partition = Partition(NAMES, GROUPS, np.eye(3, dtype=bool), owned)
    seats = blocks.seat(partition, owned, {"encoder": 12, "head": 6})  # some slots are idle
    clients = [drawn(rng, partition.blocks_of(k)) for k in range(5)]
    clients[4] = jax.tree.map(lambda leaf: leaf * np.nan, clients[4])
    weights = owned * rng.integers(1, 9, (5, 1)).astype(np.float32)
    weights[4] = 0
    stack = blocks.pack(partition, seats, clients, LIKE)
    found = jax.jit(lambda stack, weights: lora_gap(stack, seats, weights, TREES))(stack, weights)
    by_name = {k: {name: weights[k, r] for r, name in enumerate(NAMES) if weights[k, r]} for k in range(5)}
    expected = literal(dict(enumerate(clients)), by_name)
    assert 0.3 < expected == pytest.approx(float(found), rel=1e-5)


def test_one_sender_or_equal_ones_have_none():
    partition = Partition(NAMES, GROUPS, np.eye(3, dtype=bool), np.ones((2, 3), bool))
    seats = blocks.seat(partition, partition.owned)
    same = drawn(np.random.default_rng(0), NAMES)
    for weights, clients in (
        (np.array([[1, 1, 1], [2, 2, 2]]), [same, same]),
        (np.array([[1, 0, 1], [0, 2, 2]]), [same, drawn(np.random.default_rng(1), NAMES)]),
    ):
        stack = blocks.pack(partition, seats, clients, LIKE)
        assert lora_gap(stack, seats, weights.astype(np.float32), TREES) < 1e-6
    nothing = lora_gap(stack, seats, np.zeros((2, 3), np.float32), TREES)
    assert nothing == 0, "nobody sent anything"
    assert lora_gap(stack, seats, weights, {"head": TREES["head"]}) is None
