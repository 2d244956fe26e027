"""An image file as every model is shown it: upright, in eight-bit RGB.

In goes a path; out comes a picture, or the bytes that are sent to a server. Whatever a file holds
instead of an image is an ``OSError`` with its reason (``strerror``) and ``filename``, so that one
bad file is one failed item. Nothing else of the project opens an image.
"""

from __future__ import annotations

import errno
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own bound: a quarter of a GiB as RGB
_WHITE = (255, 255, 255, 255)
# What Pillow's readers let out on damaged files
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(OverflowError, MemoryError, struct.error, zlib.error),
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What servers read as it is; anything else is sent as a PNG of what we would look at
_SENT_AS_IT_IS = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png"}
_SENT_AS_IT_IS |= {"WEBP": "image/webp"}
# our bound is the one that is told; as an error of the file, not as a warning beside it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(path: Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says. Sixteen-bit grey keeps its
    brightness (the high byte, rounded), what is transparent shows white.

    Raises:
        OSError: no such file, or no whole image in it.
    """
    try:
        with Image.open(path) as image:
            _require_small(image)
            return _rgb(ImageOps.exif_transpose(image))
    except (*_BOMB, *_DAMAGE) as error:
        raise _reason(path, error) from None


def shown_bytes(path: Path) -> tuple[bytes, str]:
    """What is sent of an image, and its media type: the file itself where every server would show
    its model what :func:`open_image` gives, else that as a PNG. The pixels of a file that is sent
    as it is are not looked at.

    Raises:
        OSError: as for :func:`open_image`.
    """
    try:
        with Image.open(path) as image:
            _require_small(image)
            kind = _SENT_AS_IT_IS.get(image.format or "")
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            is_plain = image.mode in ("RGB", "L") and not image.has_transparency_data
            if kind is not None and is_plain and not turned:
                return path.read_bytes(), kind
            picture = _rgb(ImageOps.exif_transpose(image))
    except (*_BOMB, *_DAMAGE) as error:
        raise _reason(path, error) from None
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are fractions of no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its grey values go beyond sixteen bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, _WHITE), shown).convert("RGB")
    return image.convert("RGB")


def _require_small(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError


def _reason(path: Path, error: BaseException) -> OSError:
    if isinstance(error, OSError) and error.strerror is not None:  # the system's own
        return error
    if isinstance(error, _BOMB):
        return OSError(errno.EFBIG, f"it has more than {MAX_PIXELS:,} pixels", str(path))
    said = str(error)
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(512).lstrip()
        said = "it is a web page, not an image" if start.startswith(b"<") else "it is not an image"
        said = said if start else "it is empty"
    return OSError(errno.EINVAL, said or type(error).__name__, str(path))
