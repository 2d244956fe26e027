"""Every page of the board by its name in an address."""

from __future__ import annotations

from importlib import resources

import duckdb

from lever_board.example_pages import demonstrations_page
from lever_board.figure_pages import (
    audit_page,
    compare_page,
    disagree_page,
    evaluation_page,
    sweep_page,
    training_page,
)
from lever_board.page import Asked, PageOf, html, refusal
from lever_board.query_pages import queries_page, query_page
from lever_board.store_pages import run_page, store_page
from lever_board.view_page import view_page
from lever_data.errors import LeverError

PAGES: dict[str, PageOf] = {
    "store": store_page,
    "run": run_page,
    "view": view_page,
    "queries": queries_page,
    "query": query_page,
    "audit": audit_page,
    "training": training_page,
    "evaluation": evaluation_page,
    "disagree": disagree_page,
    "sweep": sweep_page,
    "compare": compare_page,
    "demonstrations": demonstrations_page,
}


FINE, WORKING, REFUSED = 200, 202, 400


def show(name: str, asked: Asked) -> tuple[str, int]:
    """The page as HTML and its status: fine, still being worked on, or refused with the reason."""
    try:
        content = PAGES[name](asked)
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
