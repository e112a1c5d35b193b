"""Pictures of any format and size -> RGB uint8 [64, 64, 3]; and the constants that standardise them.

Images stay uint8 until they are on the device: a quarter of the memory and of the transfer.
"""

import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tap_jax.data.examples import IMAGE_SIDE
from tap_jax.errors import UserError

# Per RGB channel, of pixel values in [0, 1]: CIFAR-100's statistics, which the paper's runs use for every task.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)


def to_rgb64(image: Any, *, where: str) -> np.ndarray:
    """One picture as RGB uint8 [64, 64, 3].

    Palette, grey and alpha pictures are converted to RGB; other sizes are resized with PIL's bilinear filter (which
    averages over the source pixels when it shrinks), without keeping the aspect ratio and without cropping.

    Args:
      image: encoded bytes, a PIL image, or {"bytes": ..., "path": ...} as parquet files of the hub hold it.
      where: task, split and row, for the error message.

    Raises:
      UserError: the picture cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image, Mapping):
            image = image["bytes"] or pathlib.Path(image["path"]).read_bytes()
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        image = image.convert("RGB")
        if image.size != (IMAGE_SIDE, IMAGE_SIDE):
            image = image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{where}: unreadable image ({error}); replace or remove that row") from error
