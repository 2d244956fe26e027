"""Small pictures of items. In goes an item and the folder of images; out come WebP bytes."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from lever_data.items.prompts import Item

SIZE = 320  # pixels, of the longer side


def thumbnail(item: Item, root: Path | None) -> bytes | None:
    """The item's picture; ``None`` where it has none, or none that can be read.

    A path of the data that leads out of ``root`` is not followed.
    """
    if item.image is None or root is None:
        return None
    file = item.image.resolve()
    if not file.is_relative_to(root.resolve()) or not file.is_file():
        return None
    out = io.BytesIO()
    try:
        with Image.open(file) as picture:
            picture.draft("RGB", (SIZE, SIZE))
            small = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIZE, SIZE))
    small.save(out, "WEBP", quality=80)
    return out.getvalue()
