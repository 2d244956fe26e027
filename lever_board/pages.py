"""Every page of the board by its name in an address."""

from __future__ import annotations

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


def show(name: str, asked: Asked) -> tuple[str, bool]:
    """The page as HTML, and whether it is what was asked for: else it says what is wrong."""
    try:
        content, is_right = PAGES[name](asked), True
    except LeverError as error:
        content, is_right = refusal(error), False
    except duckdb.Error as error:  # a relation that takes more than the board may
        said = LeverError(str(error).strip().splitlines()[0], hint="`lever query` has more memory")
        content, is_right = refusal(said), False
    return html(name, asked, content), is_right
