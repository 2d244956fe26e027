"""Images as models are shown them: what the file means, whatever its mode; no image, a reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from lever_train.inputs.images import open_image, shown_bytes


def picture() -> Image.Image:
    """Red above, blue on the left, white else: no two of its eight orientations are equal."""
    pixels = np.full((48, 64, 3), 255, np.uint8)
    pixels[:12], pixels[12:, :20] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def ramp(depth: type[np.generic], scale: int) -> np.ndarray:
    return (np.arange(256).reshape(16, 16) * scale).astype(depth)


def seen(path: Path) -> np.ndarray:
    """What :func:`open_image` gives, which is also what a server decodes."""
    found = np.asarray(open_image(path))
    data, kind = shown_bytes(path)
    with Image.open(io.BytesIO(data)) as sent:
        assert sent.get_format_mimetype() == kind
        assert "exif" not in sent.info or sent.getexif().get(0x0112, 1) == 1
        assert (np.asarray(sent.convert("RGB")) == found).all()
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.webp"):
        picture().save(tmp_path / name, exif=exif, quality=95)
        with Image.open(tmp_path / name) as stored:
            upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
        assert (seen(tmp_path / name) == upright).all()
        assert upright.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))


def test_grey_of_sixteen_bits_keeps_its_brightness(tmp_path: Path) -> None:
    """Pillow's own conversion makes it white."""
    eight = np.repeat(ramp(np.uint8, 1)[..., None], 3, axis=2)
    for name, depth in (("a.png", np.uint16), ("b.tiff", np.uint16), ("c.tiff", np.int32)):
        Image.fromarray(ramp(depth, 257)).save(tmp_path / name)
        assert (seen(tmp_path / name) == eight).all()


def test_other_modes_are_converted_by_their_values(tmp_path: Path) -> None:
    def stored(name: str, image: Image.Image, **more: Any) -> list[int]:
        image.save(tmp_path / name, **more)
        first: list[int] = seen(tmp_path / name)[0, 0].tolist()
        return first

    assert stored("cmyk.tiff", Image.new("CMYK", (4, 4), (0, 255, 255, 0))) == [255, 0, 0]
    palette = picture().quantize(8)
    assert stored("palette.png", palette) == [255, 0, 0]
    assert stored("bits.png", Image.new("1", (4, 4), 1)) == [255, 255, 255]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert stored("clear.png", clear) == [255, 255, 255]
    half = Image.new("LA", (4, 4), (0, 128))
    assert stored("half.png", half) == [127, 127, 127]
    hole = Image.new("P", (4, 4))
    hole.putpalette([0, 0, 0] * 256)
    assert stored("hole.png", hole, transparency=0) == [255, 255, 255]


def test_a_plain_file_is_sent_as_it_is_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "really-a-png.jpg"
    picture().save(path, "PNG")
    assert shown_bytes(path) == (path.read_bytes(), "image/png")
    picture().save(path, "JPEG")
    assert shown_bytes(path) == (path.read_bytes(), "image/jpeg")
    picture().save(path, "BMP")
    assert shown_bytes(path)[1] == "image/png"


def huge() -> bytes:
    """A PNG of 400 million pixels in a few kilobytes."""
    side = 20_000
    raw = zlib.compress(bytes(side // 8 + 1) * side, 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return size + kind + data + check

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", raw)


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG")
    return buffer.getvalue()


def _fractions() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "it is empty"),
        (lambda: b"\n<!DOCTYPE html><p>404", "it is a web page, not an image"),
        (lambda: b"x" * 100, "it is not an image"),
        (lambda: _jpeg()[:-200], "truncated"),
        (lambda: _jpeg()[:10], ""),
        (huge, "it has more than 89,478,485 pixels"),
        (_fractions, "fractions of no known range"),
    ],
)
def test_what_is_no_image_is_an_error_with_its_reason(
    tmp_path: Path, content: Callable[[], bytes], reason: str
) -> None:
    path = tmp_path / "i.jpg"
    path.write_bytes(content())
    with pytest.raises(OSError) as error:
        open_image(path)
    assert reason in str(error.value.strerror) and error.value.filename == str(path)


def test_a_file_that_is_not_there_is_the_systems_own_error(tmp_path: Path) -> None:
    for look in (open_image, shown_bytes):
        with pytest.raises(FileNotFoundError):
            look(tmp_path / "none.png")
