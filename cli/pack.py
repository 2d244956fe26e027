"""``lever pack``: a selector with its examples, as a folder for other programs."""

from __future__ import annotations

from lever_train.options.pack import PackRequest

from .common import notice
from .flags import with_flags


@with_flags
def pack(request: PackRequest) -> None:
    """Pack a selector, its examples and its figures into a folder that needs no store."""
    from lever_train.pack.pack import pack

    folder = pack(request)
    notice(f"packed into {folder}: lever_train.load({str(folder)!r}).select(vectors, k=2)")
