"""The same pages as files that open from disk: `lever board --export FOLDER`.

In goes a board; out comes a folder of pages, scripts, styles and pictures. From the first page on,
every page that another one links to is written, queries and further pages of lists up to a limit.
What is in a file is what it shows: no query is answered later, so forms are left out.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lever_board.board import Board
from lever_board.page import OWN, PageRequest
from lever_board.pages import WORKING, own_static, show
from lever_board.pictures import thumbnail
from lever_board.query_pages import example_of
from lever_data.errors import LeverError, UsageError
from lever_data.report.page import SCRIPTS, STYLES, static

_START = "store"
_LISTS = 40  # pages of one name that are written, but of queries
_QUERY = ("dataset", "split", "id")  # what tells a query's page apart, wherever one comes from


@dataclass(frozen=True)
class ExportCounts:
    """What was written: pages, pictures, and how many linked pages were left out."""

    pages: int
    pictures: int
    left_out: int


class FileLinks:
    """Addresses of files in one folder; a page named for the first time is to be written."""

    is_live = False

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.waiting: list[tuple[str, dict[str, list[str]], str]] = []
        self.files: dict[str, str | None] = {}  # page and parameters → file, or none
        self.pictures: dict[str, tuple[str, str, int]] = {}
        self._counts: Counter[str] = Counter()

    def page(self, name: str, **parameters: object) -> str | None:
        """The file of a page; ``None`` once there are enough of its kind."""
        given = {
            key: [str(one) for one in (value if isinstance(value, list) else [value])]
            for key, value in parameters.items()
            if value not in (None, "", []) and (name != "query" or key in _QUERY)
        }
        key = f"{name} {sorted(given.items())}"
        if key not in self.files:
            self._counts[name] += 1
            limit = self.queries if name == "query" else _LISTS
            is_kept = self._counts[name] <= limit
            self.files[key] = _file(name, given) if is_kept else None
            if is_kept:
                self.waiting.append((name, given, _file(name, given)))
        return self.files[key]

    def image(self, dataset: str, split: str, example_id: int) -> str | None:
        """The file of a picture."""
        key = sha256(f"{dataset}\0{split}\0{example_id}".encode()).hexdigest()[:16]
        self.pictures[f"images/{key}.webp"] = (dataset, split, example_id)
        return f"images/{key}.webp"

    def static(self, name: str) -> str:
        """The file of a script or style."""
        return f"static/{name}"


def _file(name: str, given: dict[str, list[str]]) -> str:
    if name == _START and not given:
        return "index.html"
    words = "-".join(value for values in given.values() for value in values)
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[:60].strip("-")
    digest = sha256(repr(sorted(given.items())).encode()).hexdigest()[:6] if given else ""
    return "-".join(part for part in (name, slug, digest) if part) + ".html"


def export(board: Board, folder: Path, queries: int) -> ExportCounts:
    """Write every page into ``folder``, which must be new or empty.

    Raises:
        UsageError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "the folder of the export holds something", value=str(folder), hint="name a new one"
        )
    for name in ("static", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in (*SCRIPTS, *STYLES):
        (folder / "static" / name).write_text(static(name), "utf-8")
    for name in OWN:
        (folder / "static" / name).write_text(own_static(name), "utf-8")
    links, state, pages = FileLinks(queries), board.state(), 0
    links.page(_START)
    while links.waiting:
        name, given, file = links.waiting.pop(0)
        parameters = {key: values[-1] for key, values in given.items()}
        asked = PageRequest(board, state, links, parameters, given)
        text, status = show(name, asked)
        while status == WORKING:
            time.sleep(0.2)
            text, status = show(name, asked)
        (folder / file).write_text(text, "utf-8")
        pages += 1
    written = 0
    first = PageRequest(board, state, links, {})
    for file, (dataset, split, number) in links.pictures.items():
        try:
            found = thumbnail(example_of(first, dataset, split, number), board.images)
        except LeverError:
            found = None
        if found is not None:
            (folder / file).write_bytes(found)
            written += 1
    left_out = sum(file is None for file in links.files.values())
    return ExportCounts(pages, written, left_out)
