"""Drawn pictures for the procedural suite: coloured shapes, textures and garment silhouettes on 64x64 pixels.

Everything is an implicit function of pixel coordinates, evaluated for many samples at once: negative inside,
positive outside, in units of the shape's own size. A soft step over one pixel turns it into a coverage mask.
"""

from collections.abc import Callable, Sequence

import numpy as np

SIDE = 64
COLORS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.68, 0.24),
    "blue": (0.18, 0.32, 0.88),
    "yellow": (0.92, 0.84, 0.18),
    "purple": (0.60, 0.22, 0.74),
    "orange": (0.94, 0.52, 0.12),
    "cyan": (0.20, 0.78, 0.84),
    "white": (0.95, 0.95, 0.95),
}
PALETTE = np.array(list(COLORS.values()), np.float32)


# The first few differ most: a task with few classes, and vqa, draw these only.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1.0,
    "cross": lambda u, v: np.minimum(np.maximum(abs(u) - 0.3, abs(v) - 1), np.maximum(abs(v) - 0.3, abs(u) - 1)),
    "triangle": lambda u, v: np.maximum(abs(u) * 0.87 - v * 0.5, v) - 0.55,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.75) - 0.2,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.85,
    "bar": lambda u, v: np.maximum(abs(u) - 1.05, abs(v) - 0.32),
    "star": lambda u, v: np.hypot(u, v) - (0.65 + 0.35 * np.cos(5 * np.arctan2(u, -v))),
    "diamond": lambda u, v: (1.5 * abs(u) + 0.75 * abs(v) - 0.85) / 1.6,
    "frame": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.7) - 0.18,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1.0, 0.8 - np.hypot(u - 0.5, v)),
}


def _box(u: np.ndarray, v: np.ndarray, left: float, right: float, top: float | np.ndarray, bottom: float) -> np.ndarray:
    return np.maximum(np.maximum(left - u, u - right), np.maximum(top - v, v - bottom))


def _shirt(u: np.ndarray, v: np.ndarray, style: np.ndarray) -> np.ndarray:
    sleeve = np.maximum(abs(v + 0.62 - 0.5 * (abs(u) - 0.45)) - 0.2, abs(u) - 0.55 - 0.5 * style)
    body = np.minimum(_box(u, v, -0.5, 0.5, -0.85, 0.9), sleeve)
    return np.maximum(body, 0.25 - np.hypot(u, v + 0.95))


def _trouser(u: np.ndarray, v: np.ndarray, style: np.ndarray) -> np.ndarray:
    gap = np.maximum(abs(u) - 0.06 - 0.12 * style, -0.45 - v)
    return np.maximum(_box(u, v, -0.48, 0.48, -0.95, 0.95), -gap)


def _shoe(u: np.ndarray, v: np.ndarray, style: np.ndarray) -> np.ndarray:
    sole = _box(u, v, -0.95, 0.95, 0.35, 0.55)
    upper = np.maximum(_box(u, v, -0.95, 0.9, -0.1 - 0.7 * style, 0.45), 0.75 * u - v - 0.25)
    return np.minimum(sole, upper)


def _bag(u: np.ndarray, v: np.ndarray, style: np.ndarray) -> np.ndarray:
    handle = np.maximum(abs(np.hypot(u, v + 0.25) - 0.45 - 0.2 * style) - 0.07, v + 0.2)
    return np.minimum(_box(u, v, -0.85, 0.85, -0.3, 0.7), handle)


def _dress(u: np.ndarray, v: np.ndarray, style: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u) - 0.28 - (0.1 + 0.3 * style) * np.maximum(v + 0.3, 0), abs(v) - 0.95)


GARMENTS = {"shirt": _shirt, "trouser": _trouser, "shoe": _shoe, "bag": _bag, "dress": _dress}


def grid(centers: np.ndarray, sizes: np.ndarray, angles: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Local coordinates of every pixel: float32 u (right), v (down), each [N, 64, 64].

    Args:
      centers: [N, 2] pixels, (x, y).
      sizes: [N] pixels; 1 in u, v is this long.
      angles: [N] radians, clockwise; None for upright.
    """
    pixel = np.arange(SIDE, dtype=np.float32)
    x = (pixel[None, None, :] - centers[:, 0, None, None].astype(np.float32)) / sizes[:, None, None].astype(np.float32)
    y = (pixel[None, :, None] - centers[:, 1, None, None].astype(np.float32)) / sizes[:, None, None].astype(np.float32)
    if angles is None:
        return np.broadcast_to(x, (len(sizes), SIDE, SIDE)), np.broadcast_to(y, (len(sizes), SIDE, SIDE))
    cos, sin = (f(angles).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    return cos * x + sin * y, cos * y - sin * x


def coverage(
    functions: Sequence[Callable[..., np.ndarray]],
    kinds: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    sizes: np.ndarray,
    *extra: np.ndarray,
) -> np.ndarray:
    """Mask float32 [N, 64, 64] in [0, 1] of `functions[kinds[n]]`; edges are one pixel soft.

    `extra` are further per-sample parameters [N] that the functions take.
    """
    mask = np.zeros(u.shape, np.float32)
    for kind, function in enumerate(functions):
        at = np.flatnonzero(kinds == kind)
        if len(at):
            inside = function(u[at], v[at], *(e[at][:, None, None] for e in extra))
            mask[at] = np.clip(0.5 - inside * sizes[at][:, None, None], 0, 1)
    return mask


def texture(kinds: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two-tone patterns float32 [N, 64, 64] in [0, 1] with period 2 in u and v.

    Kinds: 0 stripes, 1 checker, 2 dots, 3 zigzag, 4 bricks; -1 plain (all 0).
    """
    wave_u, wave_v = np.sin(np.pi * u), np.sin(np.pi * v)
    out = np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)
    patterns = (
        lambda at: wave_u[at],
        lambda at: 3 * wave_u[at] * wave_v[at],
        lambda at: wave_u[at] + wave_v[at] - 0.9,
        lambda at: np.sin(np.pi * (u[at] + abs(np.mod(v[at], 2) - 1))),
        lambda at: np.maximum(abs(wave_v[at]), abs(np.sin(np.pi * (u[at] / 2 + 0.5 * (np.mod(v[at], 2) > 1))))) - 0.9,
    )
    for kind, pattern in enumerate(patterns):
        at = np.flatnonzero(kinds == kind)
        if len(at):
            out[at] = np.clip(0.5 + 2 * pattern(at), 0, 1)
    return out


def blend(base: np.ndarray, mask: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Paints `colors` [N, 3] over `base` [N, 64, 64, 3] where `mask` [N, 64, 64] is 1."""
    return base + mask[..., None] * (colors[:, None, None, :].astype(np.float32) - base)


def finish(rng: np.random.Generator, picture: np.ndarray, *, noise: float, light: float = 0.0) -> np.ndarray:
    """Pictures [N, 64, 64, 3] in [0, 1] -> uint8: random brightness (1 ± light) per sample, noise (std) per pixel."""
    if light:
        picture = picture * rng.uniform(1 - light, 1 + light, (len(picture), 1, 1, 1)).astype(np.float32)
    picture = picture + noise * rng.standard_normal(picture.shape, dtype=np.float32)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
