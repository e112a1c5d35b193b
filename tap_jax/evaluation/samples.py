"""A handful of what a run's models generate: reconstructed images beside their targets, texts beside references.

Kept in DIR/samples/ as images.npz (no pickles) and texts.json, each with variant, client, task and example.
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tap_jax.data.images import MEAN, STD
from tap_jax.errors import UserError
from tap_jax.whole_files import write_file

EXAMPLES = 6  # test samples per client and task
OWNERS = 2  # of a task, the first ones


@dataclasses.dataclass(frozen=True)
class TextSample:
    """One generated text; `example` is its number in the task's test set, `given` the input's text."""

    variant: str
    client: int | str
    task: str
    example: int
    given: str
    generated: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ImageSample:
    """One reconstructed image, both uint8 [64, 64, 3]; `example` is its number in the task's test set."""

    variant: str
    client: int | str
    task: str
    example: int
    target: np.ndarray
    reconstruction: np.ndarray


Sample = TextSample | ImageSample


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Standardised float [..., 3] -> pixels uint8, clipped; what is no number becomes black."""
    pixels = 255 * (np.nan_to_num(images, nan=-np.inf) * np.array(STD) + np.array(MEAN))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Writes them into `folder`, each file whole or not at all; no samples, no folder."""
    texts = [sample for sample in samples if isinstance(sample, TextSample)]
    images = [sample for sample in samples if isinstance(sample, ImageSample)]
    if samples:
        folder.mkdir(parents=True, exist_ok=True)
    if texts:
        listed = json.dumps([dataclasses.asdict(sample) for sample in texts], indent=1, ensure_ascii=False)
        write_file(folder / "texts.json", listed + "\n")
    if images:
        buffer = io.BytesIO()
        names = [field.name for field in dataclasses.fields(ImageSample)]
        columns: dict[str, Any] = {name: np.array([getattr(image, name) for image in images]) for name in names}
        np.savez_compressed(buffer, **columns)
        write_file(folder / "images.npz", buffer.getvalue())


def read_samples(folder: Path) -> list[Sample]:
    """What `write_samples` left; empty where there is nothing.

    Raises:
      UserError: a file that cannot be read.
    """
    found: list[Sample] = []
    path = folder / "texts.json"
    try:
        if path.exists():
            listed = json.loads(path.read_text(encoding="utf-8"))
            found += [TextSample(**{**entry, "references": tuple(entry["references"])}) for entry in listed]
        path = folder / "images.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                columns = {field.name: stored[field.name] for field in dataclasses.fields(ImageSample)}
            for values in zip(*columns.values(), strict=True):
                variant, client, task, example, target, reconstruction = values
                found.append(ImageSample(str(variant), client.item(), str(task), int(example), target, reconstruction))
    except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"report: {path} is broken ({error}); remove it") from None
    return found
