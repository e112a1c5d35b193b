"""Any picture becomes RGB uint8 [64, 64, 3]."""

import io

import numpy as np
import pytest
from PIL import Image

from tap_jax.data.images import to_rgb64
from tap_jax.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_and_size(mode):
    image = to_rgb64(Image.new("RGB", (28, 90), "white").convert(mode), where="t/train row 0")
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert image.min() == 255


def test_bytes_records_and_pictures_agree(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (tmp_path / "a.png").write_bytes(encoded(picture))
    forms = (
        picture,
        encoded(picture),
        {"bytes": encoded(picture), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    )
    for form in forms:
        assert np.array_equal(to_rgb64(form, where=""), np.asarray(picture))


@pytest.mark.parametrize("broken", [b"", b"not a picture", {"bytes": b"\x89PNG\r\n\x1a\n", "path": "x"}, None])
def test_unreadable_names_task_split_and_row(broken):
    with pytest.raises(UserError, match="caltech256/test row 7, column 'image': unreadable image"):
        to_rgb64(broken, where="caltech256/test row 7")
