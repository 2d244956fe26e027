"""Every page of lever: audit, training curves, evaluation and sweep, as one product.

In go figures (charts and tables of plain values); out comes one HTML file that needs no network:
style, scripts and the chart library (uPlot, MIT) are in it, and a content security policy lets
nothing else run or load. Texts from the data stay text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

# A selector has its colour on every page: those that are always there by name, others by a hash.
_COLOURS = {
    "zero_shot": "plain",
    "random": "c5",
    "nearest": "c1",
    "oracle": "c2",
    "sft": "c3",
    "vote": "c4",
}
_FREE = ("c0", "c6", "c7")
SCRIPTS, STYLES = ("uplot.js", "page.js"), ("uplot.css", "page.css")
_DASHES = ((), (7, 4), (2, 4), (9, 4, 2, 4))
Cell = str | int | float | None | tuple[str, float | None]  # a pair: what is read, what sorts


@dataclass(frozen=True)
class Line:
    """Values over a chart's x, one each; ``None`` or NaN: there is none. ``low`` and ``high``: an
    interval or a range around each. ``colour`` is a name of ``page.css``."""

    name: str
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    colour: str = "c0"
    dash: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over one x.

    Args:
        label: says in words what is drawn, for those who cannot see it.
        kind: ``line`` (ranges as shades), ``interval`` (a dot with its interval each, ``joined`` by
            a line or not), ``bars`` (each ``step`` wide).
        y: how values are written.
        ticks: texts in place of the numbers of x.
        whole: x are whole numbers.
        smooth: the reader may smooth it.
        dots: a line of at most so many values has a dot at each.
    """

    label: str
    x: Sequence[float]
    lines: Sequence[Line]
    x_label: str
    kind: Literal["line", "interval", "bars"] = "line"
    y: Literal["percent", "number"] = "number"
    ticks: Sequence[str] | None = None
    step: float = 1.0
    height: int = 220
    whole: bool = True
    joined: bool = True
    smooth: bool = False
    from_zero: bool = False
    dots: int = 40


@dataclass(frozen=True)
class Table:
    """Rows of cells under their columns; the first names the row. ``marked`` rows stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """A title, what has to be known, and a chart, a table or a folded ``text`` below it."""

    title: str
    note: str = ""
    chart: Chart | None = None
    table: Table | None = None
    text: str = ""
    text_title: str = ""


@dataclass(frozen=True)
class Section:
    """Figures that belong together; as a ``grid`` of small ones, or one below the other."""

    figures: Sequence[Figure]
    title: str = ""
    note: str = ""
    grid: bool = False

    @property
    def smooth(self) -> bool:
        """Whether one of its charts can be smoothed."""
        return any(one.chart is not None and one.chart.smooth for one in self.figures)


def render(
    title: str,
    facts: Mapping[str, str | None],
    made_by: str,
    sections: Sequence[Section] = (),
    template: str = "page.html",
    **more: Any,
) -> str:
    """The page as HTML.

    Args:
        title: of the page.
        facts: what the figures are of (dataset, split, checkpoint, run, date …), in order.
        made_by: the command.
        sections: the figures, where the page is made of them.
        template: a page with a body of its own; it extends ``page.html`` and takes ``more``.
    """
    scripts = [static(name) for name in SCRIPTS]
    style = "".join(static(name) for name in STYLES)
    digests = {"scripts": " ".join(map(_digest, scripts)), "style": _digest(style)}
    return (
        environment()
        .get_template(template)
        .render(
            base="page.html",
            title=title,
            facts=list(facts.items()),
            made_by=made_by,
            sections=sections,
            scripts=[Markup(script) for script in scripts],  # ours, as they lie in static/
            style=Markup(style),
            digests=digests,
            **{"findings": (), **more},
        )
    )


def selector_colours(names: Sequence[str]) -> dict[str, tuple[str, Sequence[int]]]:
    """The colour and dash of every selector: the same one on every page it appears on.

    Two that a hash gives the same look are told apart in the order of their names.
    """
    found: dict[str, tuple[str, Sequence[int]]] = {}
    looks = [(colour, dash) for dash in _DASHES for colour in _FREE]
    for name in sorted(set(names) - _COLOURS.keys()):
        at = hashlib.sha256(name.encode()).digest()[0]
        order = [looks[(at + k) % len(looks)] for k in range(len(looks))]
        found[name] = next((look for look in order if look not in found.values()), order[0])
    return {name: found.get(name) or (_COLOURS[name], ()) for name in names}


def percent(share: float | None) -> str:
    """A share as people read it: ``12.3 %``, or a dash where there is none."""
    if share is None:
        return "–"
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else "< 0.1 %"


def number(value: float | None, sign: str = "-") -> str:
    """A figure to three decimals, or a dash where there is none."""
    # 0.0 is added so that what rounds to nothing has no sign: "-0.000"
    return "–" if value is None else f"{round(value, 3) + 0.0:{sign}.3f}"


@cache
def environment(*packages: str) -> Environment:
    """The templates of pages, and those of other packages that extend them."""
    # 40 ms, which a command that writes no page does not pay
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in ("lever_data.report", *packages)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    made.filters |= {
        "count": lambda value: f"{value:,}",
        "number": number,
        "signed": lambda value: number(value, "+"),
        "percent": percent,
        "code": _code,
        "text": _text,
        "sort_key": _sort_key,
        "json": _json,
    }
    return made


@cache
def static(name: str) -> str:
    """A script or style of the pages."""
    return (resources.files("lever_data.report") / "static" / name).read_text("utf-8")


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _code(text: str) -> Markup:
    """Text with its `commands` set as code; everything in it is escaped."""
    parts = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>" if i % 2 else "{}").format(p) for i, p in parts)


def _text(cell: Cell) -> str:
    """What is read in a cell."""
    if isinstance(cell, tuple):
        return cell[0]
    if cell is None:
        return "–"
    return (
        f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}" if isinstance(cell, float) else cell
    )


def _sort_key(cell: Cell) -> Markup:
    """What a cell is sorted by, where that is not what is read."""
    value = cell[1] if isinstance(cell, tuple) else cell
    if isinstance(value, str):
        return Markup("")
    return Markup(' data-sort="{}"').format("" if value is None else repr(value))


def _json(chart: Chart) -> str:
    return json.dumps(_finite(asdict(chart)), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite has no value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    return [_finite(below) for below in value] if isinstance(value, list | tuple) else value
