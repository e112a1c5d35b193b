"""Sequence packing: which samples of a stream share a row, and where their texts and answers lie in it.

A *row* is what the program differentiates at a time: some samples of one client and one stream. Its shape is fixed, its
contents are data. In a padded row every sample has a sequence of its own for its text and one for its answer, each as
long as the longest of the task. In a packed row several texts share a sequence, and several answers another (Krell et
al. 2021, arXiv:2107.02027); attention is masked between them. Rows come in a few sizes, so that what is left of a
minibatch does not fill a large one with padding.

Letters: S samples of a row, B sequences of a row, T their tokens.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SEQUENCE = 128  # tokens that a packed sequence has at least, as far as whole texts fit into it
SIZES = (1.0, 1 / 4)  # of rows, as parts of the largest
ROOM = 1.1  # for answers, and for texts beside images, above what so many samples need on average
DENSE = 1.05  # tokens of packed sequences over those of the texts in them, about


class Sequences(NamedTuple):
    """B sequences of T tokens each."""

    number: int
    tokens: int

    @property
    def total(self) -> int:
        """B·T."""
        return self.number * self.tokens


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What a row has room for.

    Attributes:
      samples: S.
      texts, answers: the sequences of a packed row that hold all its texts and the tokens that its answers predict;
        None in a padded row, and where the task has none.
      cost: tokens that the row computes on, whatever is in it; what sizes are chosen by.
    """

    samples: int
    texts: Sequences | None = None
    answers: Sequences | None = None
    cost: float = 1.0

    @property
    def always(self) -> int:
        """Samples that fit into an empty row whatever their lengths."""
        return min([self.samples, *(room.number for room in (self.texts, self.answers) if room)])


class Filled(NamedTuple):
    """One row: which of the shapes it has, its samples int [k], and the place of each one's text and answer.

    Places are of the first token, counted through all sequences of the row, int [k]; None in a padded row.
    """

    size: int
    samples: np.ndarray
    text_at: np.ndarray | None = None
    answer_at: np.ndarray | None = None


class Widths(NamedTuple):
    """Tokens of the samples of some tasks: the longest text or answer and the mean one; of what is absent 0."""

    longest: int = 0
    mean: float = 0.0


def padded(microbatch: int) -> tuple[RowShape]:
    """The one shape of padded rows of S = microbatch samples."""
    return (RowShape(microbatch),)


def packed(
    texts: Widths, answers: Widths, *, microbatch: int, batch: int, image_tokens: int = 0
) -> tuple[RowShape, ...]:
    """The shapes of packed rows, largest first.

    The largest has room for `microbatch` images, for more where that is less than microbatch · 128 tokens, or of texts
    alone for so many tokens; but for no more than the samples of a minibatch need.

    Args:
      texts, answers: of the group's training samples.
      microbatch: samples of a row, as it is configured.
      batch: samples of a client's minibatch, at most.
      image_tokens: T of an image; 0 where the tasks have none.
    """
    width, answer_width = _width(texts.longest), _width(answers.longest)

    if image_tokens:
        room = max(microbatch, microbatch * SEQUENCE // image_tokens)
        samples = batch / math.ceil(batch / room)  # a whole minibatch fills its rows evenly
    else:
        tokens = DENSE * batch * texts.mean
        tokens /= math.ceil(tokens / (microbatch * SEQUENCE))
        samples = tokens / texts.mean

    def shape(part: float) -> RowShape:
        expected = max(1.0, part * samples)
        if image_tokens:
            room = math.ceil(expected)
            count = math.ceil(ROOM * expected * texts.mean / width) if width else 0
        else:
            count = max(1, round(expected * texts.mean / width))
            # Twice as many as of mean length: a stream of the task group may have shorter ones.
            room = min(batch, math.ceil(2 * count * width / texts.mean))
            expected = min(batch, count * width / texts.mean)
        answer_count = max(1, math.ceil(ROOM * expected * answers.mean / answer_width)) if answer_width else 0
        return RowShape(
            room,
            Sequences(count, width) if width else None,
            Sequences(answer_count, answer_width) if answer_width else None,
            cost=room * image_tokens + count * width,
        )

    return tuple(dict.fromkeys(shape(part) for part in SIZES))


def _width(longest: int) -> int:
    """Tokens of a packed sequence: as many of the longest texts as `SEQUENCE` holds, and at least one."""
    longest = -(-longest // 8) * 8
    return longest * max(1, SEQUENCE // longest) if longest else 0


def pack(
    shapes: Sequence[RowShape], samples: int, texts: np.ndarray | None, answers: np.ndarray | None
) -> list[Filled]:
    """Deals the samples of one stream out to rows.

    Rows of the largest shape are filled first, longest texts first, each sample into the sequence that it fills best
    (best-fit decreasing); what is left goes into rows of the size that costs least. Every row of the largest shape but
    the last has at least `RowShape.always` samples.

    Args:
      shapes: largest first.
      samples: how many there are, numbered from 0.
      texts, answers: tokens of each, int [samples]; read where the shapes are packed and have room for such.
    """
    largest = shapes[0]
    if not (largest.texts or largest.answers):
        return _pack_in_order(shapes, samples)
    sizes = [
        [0] * samples if tokens is None or not room else tokens.tolist()
        for tokens, room in ((texts, largest.texts), (answers, largest.answers))
    ]
    rest = sorted(range(samples), key=lambda n: -sizes[0][n])
    rows: list[Filled] = []
    while rest:
        row, left = _fill(0, largest, rest, *sizes)
        if not left:  # the last one, if no smaller ones are cheaper
            return rows + _cheapest(shapes, row, rest, *sizes)
        rows.append(row)
        rest = left
    return rows


def _pack_in_order(shapes: Sequence[RowShape], samples: int) -> list[Filled]:
    """Rows of samples that all take the same room."""
    whole, left = divmod(samples, shapes[0].samples)
    needed = [-(-left // shape.samples) for shape in shapes]
    last = min(range(len(shapes)), key=lambda size: needed[size] * shapes[size].cost)
    rows: list[Filled] = []
    start = 0
    for size in [0] * whole + [last] * needed[last]:
        stop = min(samples, start + shapes[size].samples)
        rows.append(Filled(size, np.arange(start, stop)))
        start = stop
    return rows


def _cheapest(
    shapes: Sequence[RowShape], large: Filled, rest: list[int], texts: list[int], answers: list[int]
) -> list[Filled]:
    """The samples that one large row holds, in rows of the size that computes on the fewest tokens."""
    best, least = [large], shapes[0].cost
    for size, shape in enumerate(shapes[1:], 1):
        rows: list[Filled] = []
        left = rest
        while left and (len(rows) + 1) * shape.cost < least:
            row, left = _fill(size, shape, left, texts, answers)
            rows.append(row)
        if not left:
            best, least = rows, len(rows) * shape.cost
    return best


def _fill(
    size: int, shape: RowShape, order: Sequence[int], texts: list[int], answers: list[int]
) -> tuple[Filled, list[int]]:
    """A row of as many of the samples as fit, in their order, and those that do not."""
    text_room, answer_room = _Room(shape.texts), _Room(shape.answers)
    placed: list[tuple[int, int, int]] = []
    left: list[int] = []
    for place, sample in enumerate(order):
        if len(placed) == shape.samples:
            left.extend(order[place:])
            break
        if text_room.fits(texts[sample]) and answer_room.fits(answers[sample]):
            placed.append((text_room.take(texts[sample]), answer_room.take(answers[sample]), sample))
        else:
            left.append(sample)
    text_at, answer_at, samples = (np.array(column, np.int64) for column in zip(*placed, strict=True))
    return Filled(size, samples, text_at if shape.texts else None, answer_at if shape.answers else None), left


class _Room:
    """What is free in the sequences of a row; without sequences everything fits, at place 0."""

    def __init__(self, sequences: Sequences | None):
        self._sequences = sequences
        self._free = [(sequences.tokens, number) for number in range(sequences.number)] if sequences else []

    def fits(self, tokens: int) -> bool:
        return self._sequences is None or bool(self._free) and self._free[-1][0] >= tokens

    def take(self, tokens: int) -> int:
        if self._sequences is None:
            return 0
        free, number = self._free.pop(bisect.bisect_left(self._free, (tokens, -1)))
        bisect.insort(self._free, (free - tokens, number))
        return (number + 1) * self._sequences.tokens - free


def rows_needed(shapes: Sequence[RowShape], sizes: Sequence[int], batch: int) -> tuple[int, ...]:
    """Rows of each shape that one minibatch of a client can need.

    Args:
      shapes: of one task group.
      sizes: samples that the client has of each of the group's streams.
      batch: samples of the minibatch.
    """
    room = shapes[0].always
    full = sum(-(-min(batch, size) // room) for size in sizes)
    # However the minibatch falls, each stream leaves at most one row unfilled.
    needed = [min(full, batch // room + len(sizes))]
    for shape in shapes[1:]:
        most = max(1, math.ceil(shapes[0].cost / shape.cost) - 1)  # more would cost as much as a large one
        needed.append(min(len(sizes) * most, sum(min(batch, size) for size in sizes)))
    return tuple(needed)


def capacities(
    clients: Sequence[Sequence[int]],
    shapes: Sequence[RowShape],
    *,
    positions: int,
    batch: int,
    multiple: int = 1,
) -> tuple[int, ...]:
    """Rows of each shape that one step of any `positions` clients can need: a `multiple`, and at least that.

    Args:
      clients: per client the samples that it has of each of the group's streams.
      shapes: of the task group.
      batch: samples of a client's minibatch.
    """
    needed = np.sort([rows_needed(shapes, sizes, batch) for sizes in clients], axis=0)[-positions:].sum(0)
    return tuple(max(1, -(-int(rows) // multiple)) * multiple for rows in needed)


def widths(lengths: Sequence[np.ndarray]) -> Widths:
    """Of token counts, int [N] each."""
    together = np.concatenate(lengths) if lengths else np.zeros(0)
    return Widths(int(together.max()), float(together.mean())) if len(together) else Widths()
