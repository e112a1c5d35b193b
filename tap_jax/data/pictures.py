"""The five picture tasks of the procedural suite, each a function (task, rng, n) -> Examples.

What a class means is fixed; position, size, tilt, light, colour shade and noise are chance, moderate in all five.
"""

import numpy as np

from tap_jax.data import drawing
from tap_jax.data.examples import Examples
from tap_jax.errors import UserError
from tap_jax.tasks import Task

# --- pictures to classify -------------------------------------------------------------------------------------


def class_factors(classes: int, limits: tuple[int, int, int]) -> np.ndarray:
    """Which values of three picture properties make up each class: int [classes, 3].

    Few classes still vary in at least two properties, so that none of them alone decides; properties that a class
    does not fix (-1) are left to chance.
    """
    if classes > np.prod(limits):
        raise UserError(f"classes: {classes} is more than the {np.prod(limits)} that can be drawn; lower it")
    first = min(limits[0], int(np.ceil(np.sqrt(classes))))
    second = min(limits[1], -(-classes // first))
    third = -(-classes // (first * second))
    index = np.arange(classes)
    factors = np.stack([index % first, index // first % second, index // (first * second)], axis=1)
    if third == 1:
        factors[:, 2] = -1
    return factors


def _balanced(rng: np.random.Generator, n: int, classes: int) -> np.ndarray:
    """Labels int32 [n]: each class equally often up to rounding, in random order."""
    return ((rng.permutation(n) + rng.integers(classes)) % classes).astype(np.int32)


def _placement(
    rng: np.random.Generator, n: int, *, shift: float, sizes: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    centers = drawing.SIDE / 2 - 0.5 + rng.uniform(-shift, shift, (n, 2))
    return centers, rng.uniform(*sizes, n)


def _jitter(rng: np.random.Generator, colors: np.ndarray, amount: float) -> np.ndarray:
    return np.clip(colors + rng.uniform(-amount, amount, colors.shape), 0, 1)


def _backdrop(rng: np.random.Generator, kinds: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Grey pictures [n, 64, 64, 3] with a faint pattern of the given kinds (-1 plain)."""
    n = len(kinds)
    u, v = drawing.grid(rng.uniform(0, drawing.SIDE, (n, 2)), rng.uniform(5, 7, n))
    pattern = drawing.texture(kinds, u, v) * 0.12
    return np.repeat((rng.uniform(low, high, (n, 1, 1)) + pattern).astype(np.float32)[..., None], 3, axis=-1)


def _shapes(task: Task, rng: np.random.Generator, n: int) -> Examples:
    """tiny_imagenet: one shape; shape x colour (x backdrop pattern, with many classes) is the class."""
    labels = _balanced(rng, n, task.classes)
    shape, color, pattern = class_factors(task.classes, (10, 5, 4))[labels].T
    pattern = np.where(pattern < 0, rng.integers(0, 4, n), pattern) - 1
    centers, sizes = _placement(rng, n, shift=6, sizes=(17, 22))
    u, v = drawing.grid(centers, sizes, rng.uniform(-0.2, 0.2, n))
    mask = drawing.coverage(tuple(drawing.SHAPES.values()), shape, u, v, sizes)
    picture = drawing.blend(
        _backdrop(rng, pattern, low=0.1, high=0.45), mask, _jitter(rng, drawing.PALETTE[color], 0.12)
    )
    return Examples(_zeros(n), images=drawing.finish(rng, picture, noise=0.04, light=0.2), labels=labels)


def _textures(task: Task, rng: np.random.Generator, n: int) -> Examples:
    """cifar100: two-tone textures; pattern x hue (x tilt) is the class, period and phase are chance."""
    labels = _balanced(rng, n, task.classes)
    pattern, color, tilt = class_factors(task.classes, (5, 8, 5))[labels].T
    angles = np.where(tilt < 0, rng.uniform(-0.3, 0.3, n), tilt * np.pi / 5 + rng.uniform(-0.12, 0.12, n))
    periods = rng.uniform(6, 8.5, n)
    u, v = drawing.grid(rng.uniform(0, drawing.SIDE, (n, 2)), periods, angles)
    dark = _jitter(rng, np.full((n, 3), 0.2), 0.15).astype(np.float32)
    base = np.broadcast_to(dark[:, None, None, :], (n, drawing.SIDE, drawing.SIDE, 3))
    picture = drawing.blend(base, drawing.texture(pattern, u, v), _jitter(rng, drawing.PALETTE[color], 0.15))
    return Examples(_zeros(n), images=drawing.finish(rng, picture, noise=0.04, light=0.25), labels=labels)


# --- pictures to reconstruct ----------------------------------------------------------------------------------


def _garments(task: Task, rng: np.random.Generator, n: int) -> Examples:
    """fashion_mnist: a grey silhouette on black, shaded from top to bottom, some with stripes."""
    kinds = rng.integers(0, len(drawing.GARMENTS), n)
    centers, sizes = _placement(rng, n, shift=3, sizes=(22, 29))
    u, v = drawing.grid(centers, sizes)
    u = u * rng.uniform(0.85, 1.15, (n, 1, 1))
    mask = drawing.coverage(tuple(drawing.GARMENTS.values()), kinds, u, v, sizes, rng.uniform(0, 1, n))
    shade = rng.uniform(0.35, 0.95, (n, 1, 1)) + rng.uniform(-0.25, 0.25, (n, 1, 1)) * v
    striped = rng.random((n, 1, 1)) < 0.3
    shade = shade * np.where(striped, 1 - 0.5 * (np.sin(12 * v) > 0), 1)
    picture = np.repeat((mask * shade)[..., None].astype(np.float32), 3, axis=-1)
    images = drawing.finish(rng, picture, noise=0.015)
    images[..., 1:] = images[..., :1]  # the noise, too, is grey
    return Examples(_zeros(n), images=images)


def _objects(task: Task, rng: np.random.Generator, n: int) -> Examples:
    """caltech256: one coloured shape on a coloured background that changes from top to bottom."""
    kinds = rng.integers(0, len(drawing.SHAPES), n)
    front, back = (rng.permuted(np.tile(np.arange(len(drawing.PALETTE)), (n, 1)), axis=1)[:, :2]).T
    centers, sizes = _placement(rng, n, shift=8, sizes=(14, 24))
    u, v = drawing.grid(centers, sizes, rng.uniform(-0.4, 0.4, n))
    mask = drawing.coverage(tuple(drawing.SHAPES.values()), kinds, u, v, sizes)
    ramp = np.linspace(1, 0.55, drawing.SIDE, dtype=np.float32)[None, :, None, None]
    ground = _jitter(rng, drawing.PALETTE[back] * 0.75, 0.1).astype(np.float32)[:, None, None, :]
    base = np.broadcast_to(ground * ramp, (n, drawing.SIDE, drawing.SIDE, 3))
    picture = drawing.blend(base, mask, _jitter(rng, drawing.PALETTE[front], 0.1))
    return Examples(_zeros(n), images=drawing.finish(rng, picture, noise=0.015, light=0.15))


# --- pictures with a question ---------------------------------------------------------------------------------

_VQA_SHAPES = tuple(drawing.SHAPES)[:5]
_VQA_COLORS = tuple(drawing.COLORS)[:5]


def _questions(task: Task, rng: np.random.Generator, n: int) -> Examples:
    """vqa: one or two shapes, left and right, and a question about one of them."""
    shapes = rng.permuted(np.tile(np.arange(len(_VQA_SHAPES)), (n, 1)), axis=1)[:, :3]
    colors = rng.permuted(np.tile(np.arange(len(_VQA_COLORS)), (n, 1)), axis=1)[:, :3]
    two = rng.random(n) < 0.25
    first_side = rng.integers(0, 2, n)
    picture = _backdrop(rng, np.full(n, -1), low=0.05, high=0.2)
    for which in range(2):
        side = first_side if which == 0 else 1 - first_side
        centers = np.stack([np.where(side == 0, 17, 46), np.full(n, 31.5)], axis=1) + rng.uniform(-3, 3, (n, 2))
        sizes = rng.uniform(12, 15, n)
        u, v = drawing.grid(centers, sizes)
        mask = drawing.coverage(tuple(drawing.SHAPES[s] for s in _VQA_SHAPES), shapes[:, which], u, v, sizes)
        if which == 1:
            mask = mask * two[:, None, None]
        picture = drawing.blend(picture, mask, _jitter(rng, drawing.PALETTE[colors[:, which]], 0.08))
    kinds = rng.choice(6, n, p=(0.38, 0.2, 0.12, 0.12, 0.06, 0.12))
    records = [_ask(rng, kinds[i], shapes[i], colors[i], bool(two[i]), first_side[i]) for i in range(n)]
    inputs, targets = zip(*map(task.source.written, records), strict=True)
    images = drawing.finish(rng, picture, noise=0.03, light=0.15)
    return Examples(_zeros(n), images=images, inputs=inputs, targets=targets, references=tuple((t,) for t in targets))


def _ask(rng: np.random.Generator, kind: int, shapes: np.ndarray, colors: np.ndarray, two: bool, side: int) -> dict:
    """One question about the first shape; shapes[2] and colors[2] are never in the picture."""
    shape, color = _VQA_SHAPES[shapes[0]], _VQA_COLORS[colors[0]]
    yes = rng.random() < 0.5
    question, answer = (
        (f"what color is the {shape}?", color),
        (f"what shape is {color}?", shape),
        (f"is there a {shape if yes else _VQA_SHAPES[shapes[2]]}?", "yes" if yes else "no"),
        (f"is anything {color if yes else _VQA_COLORS[colors[2]]}?", "yes" if yes else "no"),
        ("how many shapes are there?", "two" if two else "one"),
        (f"where is the {shape}?", ("on the left", "on the right")[side]),
    )[kind]
    return {"question": question, "multiple_choice_answer": answer}


def _zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.int32)


PICTURES = {
    "tiny_imagenet": _shapes,
    "cifar100": _textures,
    "fashion_mnist": _garments,
    "caltech256": _objects,
    "vqa": _questions,
}
