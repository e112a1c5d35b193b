"""The record of one split checks itself."""

import numpy as np
import pytest

from tap_jax.data.examples import Examples


def test_take_keeps_all_fields_together():
    examples = Examples(
        np.array([0, 1, 2], np.int32),
        images=np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8),
        inputs=("a", "b", "c"),
        targets=("x", "y", "z"),
        references=(("x",), ("y", "yy"), ("z",)),
    )
    taken = examples.take([2, 1, 1])
    assert len(taken) == 3
    assert taken.inputs == ("c", "b", "b")
    assert taken.references == (("z",), ("y", "yy"), ("y", "yy"))
    assert taken.domains.tolist() == taken.images[:, 0, 0, 0].tolist() == [2, 1, 1]
    assert taken.labels is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": ("a",)}, "inputs has 1"),
        ({"labels": np.zeros(2, np.int64)}, "int32"),
        ({"images": np.zeros((2, 32, 32, 3), np.uint8)}, "64, 64, 3"),
        ({"images": np.zeros((2, 64, 64, 3), np.float32)}, "uint8"),
        ({"targets": ("a", "b")}, "come together"),
        ({"targets": ("a", "b"), "references": (("a",), ())}, "at least one"),
    ],
)
def test_disagreeing_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Examples(np.zeros(2, np.int32), **fields)
