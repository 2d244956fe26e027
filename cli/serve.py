"""``lever serve``: a packed selector over HTTP."""

from __future__ import annotations

from lever_train.options.pack import ServeRequest

from .common import notice
from .flags import with_flags


@with_flags
def serve(request: ServeRequest) -> None:
    """Answer POST /select with the demonstrations a packed selector chooses; Ctrl-C ends it."""
    from lever_train.pack.serve import serve

    serve(request, lambda address: notice(f"serving {request.folder} at {address}"))
