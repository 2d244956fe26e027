"""Every page of the board by its name in an address."""

from __future__ import annotations

from importlib import import_module, resources

import duckdb

from lever_board.page import PageOf, PageRequest, html, refusal
from lever_data.errors import LeverError

# Name → module of `<name>_page`, imported when it is first asked for: the first page of a board
# waits for neither polars nor numpy.
PAGES = {
    "store": "store_pages",
    "run": "store_pages",
    "view": "view_page",
    "queries": "query_pages",
    "query": "query_pages",
    "audit": "figure_pages",
    "training": "figure_pages",
    "evaluation": "figure_pages",
    "disagree": "figure_pages",
    "sweep": "figure_pages",
    "compare": "figure_pages",
    "demonstrations": "example_pages",
}
FINE, WORKING, REFUSED = 200, 202, 400


def show(name: str, asked: PageRequest) -> tuple[str, int]:
    """The page as HTML and its status: fine, still being worked on, or refused with the reason."""
    try:
        page: PageOf = getattr(import_module(f"lever_board.{PAGES[name]}"), f"{name}_page")
        content = page(asked)
        status = WORKING if content.refresh else FINE
    except LeverError as error:
        content, status = refusal(error), REFUSED
    except duckdb.Error as error:  # a relation that takes more than the board may
        said = LeverError(str(error).strip().splitlines()[0], hint="`lever query` has more memory")
        content, status = refusal(said), REFUSED
    return html(name, asked, content), status


def own_static(name: str) -> str:
    """A script or style of the board."""
    return (resources.files("lever_board") / "static" / name).read_text("utf-8")
