"""A page of the board: what it is given, and how it becomes HTML.

In go a page's function and its parameters; out comes HTML. Pages name each other by
(page, parameters) and never by address: a server and a folder of files lay them out differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lever_board.board import Board, State
from lever_data.errors import LeverError
from lever_data.paths import store_name
from lever_data.report.page import SCRIPTS, STYLES, Section, environment

OWN = ("board.css", "board.js", "icon.svg")  # beside what all pages of lever have
PAGES_SHOWN = {  # in the navigation
    "store": "Store",
    "view": "View",
    "queries": "Queries",
    "audit": "Audit",
    "training": "Training",
    "evaluation": "Evaluation",
    "sweep": "Sweep",
    "compare": "Compare",
    "demonstrations": "Demonstrations",
}


class Links(Protocol):
    """Where things are; ``None``: there is no such page, as in a folder that holds some queries."""

    is_live: bool  # a server answers: forms work, pages follow the store

    def page(self, name: str, **parameters: object) -> str | None:
        """The address of a page."""

    def image(self, dataset: str, split: str, example_id: int) -> str | None:
        """The address of an item's picture, small."""

    def static(self, name: str) -> str:
        """The address of a script or style."""


@dataclass(frozen=True)
class PageRequest:
    """A page's parameters, and the store it is asked of."""

    board: Board
    state: State
    links: Links
    parameters: Mapping[str, str]
    many: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def text(self, name: str, default: str = "") -> str:
        """A parameter as text."""
        return self.parameters.get(name) or default

    def number(self, name: str, default: int = 0) -> int:
        """A parameter as a whole number; what is none counts as not given."""
        text = self.parameters.get(name, "")
        return int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() else default

    def all(self, name: str) -> list[str]:
        """Every value of a parameter that may be given more than once."""
        return [value for value in self.many.get(name, ()) if value]


@dataclass(frozen=True)
class Content:
    """What a page shows: a template and what it takes, or sections of figures.

    ``refresh``: seconds after which the page is asked for again.
    """

    title: str
    facts: Mapping[str, str | None] = field(default_factory=dict)
    template: str = "board.html"
    sections: Sequence[Section] = ()
    refresh: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


PageOf = Callable[[PageRequest], Content]


def html(name: str, asked: PageRequest, content: Content) -> str:
    """The page as HTML."""
    return (
        environment("lever_board")
        .get_template(content.template)
        .render(
            base="board.html",
            page_name=name,
            title=content.title,
            facts=list(content.facts.items()),
            sections=content.sections,
            refresh=content.refresh,
            made_by="lever board",
            navigation=PAGES_SHOWN,
            links=asked.links,
            link=asked.links.page,
            damaged=asked.state.damaged,
            store=store_name(asked.board.store.path),
            styles=[*STYLES, OWN[0]],
            scripts=[*SCRIPTS, OWN[1]],
            **{"findings": (), **content.more},
        )
    )


def refusal(error: LeverError, title: str = "This page cannot be shown") -> Content:
    """The page that says what is wrong and what to do."""
    return Content(title, template="refusal.html", more={"error": error})


def working(title: str) -> Content:
    """The page that waits for a survey."""
    return Content(title, template="working.html", refresh=2)
