"""Pictures of any format and size -> RGB uint8 [64, 64, 3]; and the constants that standardise them.

Images stay uint8 until they are on the device: a quarter of the memory and of the transfer.
"""

import io
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tap_jax.data.examples import IMAGE_SIDE
from tap_jax.data.values import bad

if TYPE_CHECKING:
    from PIL import Image

# Per RGB channel, of pixel values in [0, 1]: CIFAR-100's statistics, which the paper's runs use for every task.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)

_ORIENTATION = 0x0112  # EXIF's tag


def to_rgb64(image: Any, *, where: str, column: str = "image") -> np.ndarray:
    """One picture as RGB uint8 [64, 64, 3].

    - It is turned as its EXIF orientation says (as `datasets.Image` does); damaged EXIF is as good as none.
    - 16 bits a pixel become 8 by the whole range: 65535 is white. 32-bit integers and floats have no white of their
      own and are refused.
    - Transparent pixels are laid on white. Of several frames the first is taken.
    - Palette, grey, CMYK and other pictures are converted to RGB.
    - Other sizes are resized with PIL's bilinear filter (which averages over the source pixels when it shrinks),
      without keeping the aspect ratio and without cropping.

    Args:
      image: encoded bytes, a PIL image, or {"bytes": ..., "path": ...} as parquet files of the hub hold it.
      where: task, split and row; column: both for the error message.

    Raises:
      BadRow: null, or a picture that cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    name = ""
    try:
        if isinstance(image, Mapping):
            name = pathlib.Path(image.get("path") or "").name
            image = image["bytes"] or (image["path"] and pathlib.Path(image["path"]).read_bytes())
        if image is None:
            raise ValueError("null")
        if isinstance(image, str):
            raise ValueError("a path where a picture is expected; see metadata.csv in launch/docs/data.md")
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        image.load()
        if not all(image.size):
            raise ValueError("no pixels")
        image = _turned(image)
        image = _in_rgb(image)
        if image.size != (IMAGE_SIDE, IMAGE_SIDE):
            image = image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8)
    except Exception as error:  # a damaged file can make a decoder raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose text is an address in memory
            reason = "no format of pictures"
        raise bad(where, column, f"unreadable image{name and f' {name}'} ({reason})") from error


def _turned(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # of many types; the pixels are there all the same
        return image
    how = Image.Transpose
    turns = {
        2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE,
        6: how.ROTATE_270, 7: how.TRANSVERSE, 8: how.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


def _in_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I;16"):
        # Its own conversion clips at 255. Values come in the file's order of bytes.
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, 32 bits a pixel, does not say what is white; store 8 or 16 bits")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
