"""What `launch/pretrain.py` trains on: sentences and captioned pictures, unlimited, and in no task's train or test set.

They have the words, shapes, textures, garments and colours of the embedded suite, but never in a task's combination,
whatever the seed and the split:

  one object        always on a two-coloured pattern; the tasks draw a single shape or garment on one colour or grey
  two objects       on one colour; on grey or black one above the other, where vqa draws them side by side
  no object         a pattern of two of the eight colours, where cifar100 has one colour on near-black
  topics            two or four words of a topic, where a headline of ag_news has three
  facts             two cues, where a question of mmlu has four
  actions           two who act, where a sentence of common_gen has one
  questions         on pictures as above, in vqa's words

`tests/data/test_corpus.py` checks this against what the tasks draw.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from tap_jax.data import drawing, grammar
from tap_jax.tasks import find_task

PATTERNS = ("stripes", "checker", "dots", "zigzag", "bricks")  # in the order of `drawing.texture`
TONES = (*drawing.COLORS, "grey", "black")  # of grounds; objects have the first eight
_TONES = np.concatenate([drawing.PALETTE, np.array([[0.35] * 3, [0.06] * 3], np.float32)])
THINGS = (*drawing.SHAPES, *drawing.GARMENTS)
_PLACES = (("left", "right"), ("top", "bottom"))
STREAM = zlib.crc32(b"pretraining")  # beside the seed: random numbers that no task draws
_CHUNK = 500  # pictures drawn at once; bounds the memory


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object in a picture: its kind (of `THINGS`), colour (of `drawing.COLORS`), size and place in words."""

    kind: str
    color: str
    size: str
    place: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is in a picture.

    Attributes:
      things: none, one in the middle, or two: left and right, or top and bottom.
      pattern: of the ground, one of `PATTERNS`; "" for one colour.
      tones: the ground's two colours (of `TONES`), of which only the first is seen without a pattern.
    """

    things: tuple[Thing, ...]
    pattern: str
    tones: tuple[str, str]

    @property
    def ground(self) -> str:
        """The ground in words."""
        return f"{self.tones[0]} and {self.tones[1]} {self.pattern}" if self.pattern else self.tones[0]


def draw_pictures(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[Picture]]:
    """N pictures, uint8 [N, 64, 64, 3], and what is in them."""
    drawn = [_draw(rng, min(_CHUNK, n - start)) for start in range(0, n, _CHUNK)]
    return np.concatenate([images for images, _ in drawn]), [picture for _, found in drawn for picture in found]


def _draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[Picture]]:
    count = rng.choice(3, n, p=(0.2, 0.45, 0.35))
    across = rng.random(n) < 0.5  # two objects side by side, or one above the other
    pattern = np.where(count == 2, -1, rng.integers(0, len(PATTERNS), n))
    plain = np.where((count == 2) & ~across, len(TONES), len(drawing.PALETTE))
    first = rng.integers(0, np.where(count == 1, len(TONES), plain))
    step = rng.integers(1, len(drawing.PALETTE), n)
    white = TONES.index("white")
    # Two different tones, and never two of white, grey and black: those are tiny_imagenet's grounds.
    second = np.where(first < len(drawing.PALETTE), (first + step) % len(drawing.PALETTE), rng.integers(0, white, n))
    # How much the pattern stands out: behind an object often little, so that the object is seen.
    contrast = np.where(count == 1, rng.uniform(0.25, 0.9, n), rng.uniform(0.8, 1, n))
    kinds = rng.permuted(np.tile(np.arange(len(THINGS)), (n, 1)), axis=1)[:, :2]
    colors = rng.permuted(np.tile(np.arange(len(drawing.PALETTE)), (n, 1)), axis=1)[:, :3]
    # An object never has its ground's colour.
    colors = np.stack([np.where(colors[:, i] == first, colors[:, 2], colors[:, i]) for i in range(2)], axis=1)
    large = rng.random((n, 2)) < 0.5

    def shade(colors: np.ndarray) -> np.ndarray:
        return np.clip(colors + rng.uniform(-0.1, 0.1, colors.shape), 0, 1).astype(np.float32)

    angles = rng.uniform(-0.3, 0.3, n)
    u, v = drawing.grid(rng.uniform(0, drawing.SIDE, (n, 2)), rng.uniform(5.5, 9, n), angles)
    tones = shade(_TONES[first]) * np.where(pattern < 0, rng.uniform(0.6, 1, n), 1)[:, None].astype(np.float32)
    base = np.broadcast_to(tones[:, None, None, :], (n, drawing.SIDE, drawing.SIDE, 3))
    mask = drawing.texture(pattern, u, v) * contrast[:, None, None].astype(np.float32)
    picture = drawing.blend(base, mask, shade(_TONES[second]))
    for which in range(2):
        middle = drawing.SIDE / 2 - 0.5
        offset = np.where(count == 2, (-14.5, 14.5)[which], 0)[:, None] * np.stack([across, ~across], axis=1)
        spread = np.where(count == 2, 3, 8)[:, None]
        centers = middle + offset + rng.uniform(-1, 1, (n, 2)) * spread
        low, high = np.where(count == 2, 8, 14), np.where(count == 2, 15, 26)
        sizes = low + (high - low) * (np.where(large[:, which], 0.55, 0) + rng.uniform(0, 0.45, n))
        u, v = drawing.grid(centers, sizes, rng.uniform(-0.3, 0.3, n))
        functions = (*(lambda u, v, style, f=f: f(u, v) for f in drawing.SHAPES.values()), *drawing.GARMENTS.values())
        mask = drawing.coverage(functions, kinds[:, which], u, v, sizes, rng.uniform(0, 1, n))
        mask = mask * (count > which)[:, None, None]
        picture = drawing.blend(picture, mask, shade(drawing.PALETTE[colors[:, which]]))
    images = drawing.finish(rng, picture, noise=0.03, light=0.2)

    def thing(i: int, which: int) -> Thing:
        color = TONES[colors[i, which]]
        place = _PLACES[0 if across[i] else 1][which] if count[i] == 2 else ""
        return Thing(THINGS[kinds[i, which]], color, "big" if large[i, which] else "small", place)

    return images, [
        Picture(
            tuple(thing(i, which) for which in range(count[i])),
            PATTERNS[pattern[i]] if pattern[i] >= 0 else "",
            (TONES[first[i]], TONES[second[i]]),
        )
        for i in range(n)
    ]


def caption(rng: np.random.Generator, picture: Picture) -> str:
    """What a picture shows, or a question about it with its answer."""
    if picture.things and rng.random() < 0.5:
        question, answer = _question(rng, picture)
        return " ".join(find_task("vqa").source.written({"question": question, "multiple_choice_answer": answer}))
    names = [f"a {thing.size} {thing.color} {thing.kind}" for thing in picture.things]
    if not names:
        return f"{picture.ground}"
    if len(names) == 1:
        return f"{names[0]} on {picture.ground}"
    side_by_side = picture.things[0].place == "left"
    if rng.random() < 0.5:
        how = "on the left of" if side_by_side else "above"
        return f"{names[0]} {how} {names[1]} on {picture.ground}"
    how = "on the right of" if side_by_side else "below"
    return f"{names[1]} {how} {names[0]} on {picture.ground}"


def _question(rng: np.random.Generator, picture: Picture) -> tuple[str, str]:
    number = len(picture.things)
    thing = picture.things[rng.integers(number)]
    yes = rng.random() < 0.5
    kinds = {other.kind for other in picture.things}
    colors = {other.color for other in picture.things} | set(picture.tones)
    kind = thing.kind if yes else _pick(rng, [other for other in THINGS if other not in kinds])
    color = thing.color if yes else _pick(rng, [other for other in drawing.COLORS if other not in colors])
    asked = [
        (f"what color is the {thing.kind}?", thing.color),
        (f"what shape is {thing.color}?", thing.kind),
        (f"is there a {kind}?", "yes" if yes else "no"),
        (f"is anything {color}?", "yes" if yes else "no"),
        ("how many shapes are there?", ("one", "two")[number - 1]),
        (f"where is the {thing.kind}?", f"on the {thing.place}"),
    ]
    return asked[rng.choice(6, p=(0.3, 0.3, 0.1, 0.1, 0.05, 0.15)) if thing.place else rng.integers(5)]


def sentence(rng: np.random.Generator) -> str:
    """A sentence on a topic, a fact, or who does what."""
    draw = (grammar.topical, _fact, _action)[rng.choice(3, p=(0.35, 0.35, 0.3))]
    return draw(rng)


def _fact(rng: np.random.Generator) -> str:
    record = grammar.fact(rng)
    if rng.random() < 0.6:
        return record["text"]
    return " ".join(find_task("mmlu").source.written(record))


def _action(rng: np.random.Generator) -> str:
    record = grammar.joint_scene(rng)
    if rng.random() < 0.6:
        return record["target"]
    return " ".join(find_task("common_gen").source.written(record))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
