"""Rows: every sample once, nothing overlaps, room is enough, and no row of the largest size is nearly empty."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax.data import packing
from tap_jax.data.packing import RowShape, Sequences, Widths, pack

SHAPES = (
    RowShape(9, Sequences(4, 32), Sequences(3, 16), cost=128),
    RowShape(3, Sequences(1, 32), Sequences(1, 16), cost=32),
)
lengths = st.lists(st.tuples(st.integers(1, 32), st.integers(1, 16)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths)
def test_every_sample_has_a_place_of_its_own(found):
    texts, answers = np.array(found, int).reshape(-1, 2).T
    rows = pack(SHAPES, len(found), texts, answers)
    assert sorted(np.concatenate([row.samples for row in rows]) if rows else []) == list(range(len(found)))
    for row in rows:
        shape = SHAPES[row.size]
        assert 0 < len(row.samples) <= shape.samples
        for sequences, at, length in (
            (shape.texts, row.text_at, texts[row.samples]),
            (shape.answers, row.answer_at, answers[row.samples]),
        ):
            taken = np.zeros(sequences.total, int)
            for first, tokens in zip(at, length, strict=True):
                assert first // sequences.tokens == (first + tokens - 1) // sequences.tokens  # in one sequence
                taken[first : first + tokens] += 1
            assert taken.max() == 1
    large = [row for row in rows if row.size == 0]
    assert all(len(row.samples) >= SHAPES[0].always for row in large[:-1])


@settings(max_examples=200, deadline=None)
@given(lengths, st.sampled_from([SHAPES, SHAPES[:1], packing.padded(5)]))
def test_rows_needed_are_never_fewer_than_rows_made(found, shapes):
    texts, answers = np.array(found, int).reshape(-1, 2).T
    half = len(found) // 2
    made = np.zeros(len(shapes), int)
    for part in (slice(0, half), slice(half, None)):  # two streams
        for row in pack(shapes, len(texts[part]), texts[part], answers[part]):
            made[row.size] += 1
    assert (made <= packing.rows_needed(shapes, (half, len(found) - half), batch=60)).all()


def test_what_is_left_goes_into_the_cheapest_rows():
    full = np.full(6, 32), np.ones(6, int)
    assert [row.size for row in pack(SHAPES, 6, *full)] == [0, 1, 1]  # 4 sequences, and twice one
    assert [row.size for row in pack(SHAPES, 3, *full)] == [1, 1, 1]
    assert [row.size for row in pack(SHAPES, 4, *full)] == [0]
    images = (RowShape(8, cost=8), RowShape(1, cost=1))
    assert [row.size for row in pack(images, 19, None, None)] == [0, 0, 1, 1, 1]
    assert [row.samples.tolist() for row in pack(packing.padded(4), 6, None, None)] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("texts", [Widths(256, 53.0), Widths(27, 18.9), Widths(256, 190.0)])
@pytest.mark.parametrize("answers", [Widths(), Widths(196, 22.0), Widths(5, 4.0)])
@pytest.mark.parametrize("image_tokens", [0, 197])
def test_shapes_follow_the_lengths(texts, answers, image_tokens):
    large, small = packing.packed(texts, answers, microbatch=32, batch=128, image_tokens=image_tokens)
    assert large.cost > small.cost and large.samples >= small.samples
    assert large.texts.tokens % math.ceil(texts.longest / 8) == 0 and large.texts.tokens >= 128 - 32
    assert (large.answers is None) == (answers.longest == 0)
    if image_tokens:
        assert large.samples == 32 and large.texts.total >= 32 * texts.mean
    else:
        assert large.texts.total <= 32 * packing.SEQUENCE + large.texts.tokens
        assert large.texts.total <= packing.DENSE * 128 * texts.mean + large.texts.tokens


def test_widths():
    assert packing.widths([np.array([3, 5]), np.array([1])]) == (5, 3.0) and packing.widths([]) == (0, 0.0)
