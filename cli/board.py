"""``lever board``: look at a store in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lever_data.options import words
from lever_data.vocabulary import DEFAULT_STORE, StorePath

from .common import notice
from .flags import with_flags


@with_flags
def board(
    store: StorePath = DEFAULT_STORE,
    port: Annotated[
        int, words("Port on 127.0.0.1; 0 takes a free one.", everyday=True, ge=0, le=65535)
    ] = 0,
    no_browser: Annotated[bool, words("Do not open a browser.", everyday=True)] = False,
    export: Annotated[
        Path | None,
        words(
            "Write the pages into this new folder, and serve none.", metavar="DIR", everyday=True
        ),
    ] = None,
    export_queries: Annotated[
        int, words("Queries that --export writes a page of, at most.", metavar="N", ge=0)
    ] = 500,
    image_root: Annotated[
        Path | None, words("Folder of the images, as `lever generate` takes it.", metavar="DIR")
    ] = None,
    training: Annotated[
        tuple[Path, ...],
        words("Folder that a running `lever train` writes; may be repeated.", metavar="DIR"),
    ] = (),
) -> None:
    """Look at a store in a browser, down to one query.

    The server answers on this machine alone, to whoever has the address it prints, and changes
    nothing in the store.
    """
    from lever_board.board import Board
    from lever_data.store.store import Store

    shown = Board(Store.open(store), image_root, training)
    if export is not None:
        from lever_board.export import export as write

        done = write(shown, export, export_queries)
        shown.close()
        notice(f"wrote {done.pages:,} pages and {done.pictures:,} pictures to {export}")
        if done.left_out:
            notice(f"{done.left_out:,} linked pages are left out; --export-queries N writes more")
        return
    from lever_board.server import Serving

    serving = Serving(shown, port)
    print(serving.address, flush=True)
    if not no_browser:
        import webbrowser

        webbrowser.open(serving.address)
    notice("Ctrl-C ends it")
    serving.serve()
