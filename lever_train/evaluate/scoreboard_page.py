"""A scoreboard as one self-contained HTML page: accuracy by shots with intervals, and the tables.

In goes a :class:`Scoreboard`; out comes a page that needs no network, fits a phone and follows the
reader's light or dark mode. Every line carries its name at its end and differs in dash as well as
in colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lever_data.store.files import writing
from lever_train.evaluate.scoreboard import Row, Scoreboard

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 52, 150, 16, 40
_COLOURS = 8  # classes c0…c7 of the style
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)  # between grid lines
_MOST_TICKS = 6
_ORACLE = "oracle"
_LABEL_GAP = 15  # pixels between the names at the line ends
_BOUND_NOTE = (
    "≥: from 2 shots on the oracle is a lower bound. It adds the best demonstration to those it "
    "has and does not try all sets, so the best set of the pool may do better than it shows."
)

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#68707a;--grid:#d9dee4;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#98a1ac;--grid:#343b43;--page:#14171a}}
body{margin:0 auto;max-width:52rem;padding:1.5rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
svg{width:100%;min-width:34rem;height:auto}svg text{fill:var(--soft);font:13px system-ui,sans-serif}
.grid{stroke:var(--grid)}.line{fill:none;stroke-width:2}.bar{stroke-width:1.5;opacity:.55}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem .25rem 0;text-align:right;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left}
"""
_HUES = (211, 24, 140, 280, 340, 60, 180, 0)


def write_page(board: Scoreboard, path: Path) -> None:
    """Write the page."""
    with writing(path) as file:
        file.write(page(board).encode())


def page(board: Scoreboard) -> str:
    """The page as HTML."""
    sizes = sorted({row.n + row.failed for row in board.rows})
    most = sizes[-1]
    rows = [row for row in board.rows if row.n + row.failed == most]
    hues = "".join(
        f".c{i}{{stroke:hsl({hue} 70% 48%)}}text.c{i}{{stroke:none;fill:hsl({hue} 65% 48%)}}"
        for i, hue in enumerate(_HUES)
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>lever eval</title><style>{_STYLE}{hues}</style>",
        f"<h1>VQA accuracy on {most:,} questions</h1>",
        f'<div class="scroll">{chart(rows)}</div>',
        *_notes(rows, sizes),
        "<h2>Accuracy, with 95 % bootstrap intervals</h2>",
        _table(
            ("selector", "shots", "accuracy", "low", "high", "n", "failed"), _score_cells(board)
        ),
    ]
    if board.paired:
        names = ("difference", "shots", "points", "low", "high", "McNemar p", "n")
        parts += ["<h2>Paired by question</h2>", _table(names, _paired_cells(board))]
    return "".join(parts)


def _notes(rows: Sequence[Row], sizes: Sequence[int]) -> Iterable[str]:
    """What has to be known to read the chart and the tables."""
    if len(sizes) > 1:
        *others, most = (f"{size:,}" for size in sizes)
        yield (
            f"<p>The chart shows the first {most} questions; the tables also hold the first "
            f"{' and the first '.join(others)}.</p>"
        )
    if any(map(_is_lower_bound, rows)):
        yield f"<p>{_BOUND_NOTE}</p>"


def _is_lower_bound(row: Row) -> bool:
    """Whether the best of the pool is at least this: the oracle is exact at one shot alone."""
    return row.selector == _ORACLE and row.shots > 1


def _at_least(row: Row) -> str:
    return "≥ " if _is_lower_bound(row) else ""


def chart(rows: Sequence[Row]) -> str:
    """Accuracy against the number of demonstrations, one line a selector, as inline SVG."""
    scale = _Scale(rows)
    selectors = list(dict.fromkeys(row.selector for row in rows))
    ends = {
        name: scale.y(max((r for r in rows if r.selector == name), key=lambda r: r.shots).accuracy)
        for name in selectors
    }
    labels = _apart(ends)
    drawn = [scale.axes()]
    for index, name in enumerate(selectors):
        points = sorted((r for r in rows if r.selector == name), key=lambda r: r.shots)
        colour, dash = f"c{index % _COLOURS}", _DASHES[index % len(_DASHES)]
        path = " ".join(f"{scale.x(r.shots):.1f},{scale.y(r.accuracy):.1f}" for r in points)
        drawn.append(f'<polyline class="line {colour}" stroke-dasharray="{dash}" points="{path}"/>')
        drawn += [scale.interval(r, colour) for r in points]
        drawn.append(
            f'<text class="{colour}" x="{WIDTH - RIGHT + 10}" y="{labels[name] + 4:.1f}">'
            f"{escape(name)}{' (≥)' if _is_lower_bound(points[-1]) else ''}</text>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Accuracy by number of demonstrations">{"".join(drawn)}</svg>'
    )


class _Scale:
    """From (shots, accuracy) to pixels."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.shots = sorted({row.shots for row in rows})
        highest = max(row.high for row in rows)
        self.step = next(step for step in _STEPS if step * _MOST_TICKS >= highest)
        self.top = self.step * max(1, math.ceil(highest / self.step))

    def x(self, shots: int) -> float:
        low, high = self.shots[0], self.shots[-1]
        return LEFT + (shots - low) / max(high - low, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, accuracy: float) -> float:
        return TOP + (1 - accuracy / self.top) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        """Grid lines at round accuracies, the shot numbers, and what the axes are."""
        parts = []
        for tick in range(round(self.top / self.step) + 1):
            value = self.step * tick
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(value):.1f}" '
                f'y2="{self.y(value):.1f}"/><text text-anchor="end" x="{LEFT - 8}" '
                f'y="{self.y(value) + 4:.1f}">{value:.0%}</text>'
            )
        for shots in self.shots:
            parts.append(
                f'<text text-anchor="middle" x="{self.x(shots):.1f}" y="{HEIGHT - 20}">'
                f"{shots}</text>"
            )
        parts.append(
            f'<text text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}">'
            "demonstrations shown</text>"
        )
        return "".join(parts)

    def interval(self, row: Row, colour: str) -> str:
        """The interval as a whisker and the mean as a dot."""
        x, y = self.x(row.shots), self.y(row.accuracy)
        return (
            f'<line class="bar {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{self.y(row.low):.1f}" '
            f'y2="{self.y(row.high):.1f}"/><circle class="{colour}" fill="var(--page)" '
            f'stroke-width="2" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(row.selector)}, '
            f"{row.shots} shots: {_at_least(row)}{row.accuracy:.2%}</title></circle>"
        )


def _apart(ends: dict[str, float]) -> dict[str, float]:
    """The heights of the names, moved down until no two touch."""
    placed: dict[str, float] = {}
    last = float("-inf")
    for name, height in sorted(ends.items(), key=lambda item: item[1]):
        last = max(height, last + _LABEL_GAP)
        placed[name] = last
    return placed


def _score_cells(board: Scoreboard) -> Iterable[Sequence[str]]:
    for r in board.rows:
        yield (
            r.selector,
            str(r.shots),
            f"{_at_least(r)}{r.accuracy:.2%}",
            f"{r.low:.2%}",
            f"{r.high:.2%}",
            f"{r.n:,}",
            f"{r.failed:,}",
        )


def _paired_cells(board: Scoreboard) -> Iterable[Sequence[str]]:
    for p in board.paired:
        points = (f"{100 * value:+.2f}" for value in (p.difference, p.low, p.high))
        yield (f"{p.a} − {p.b}", str(p.shots), *points, f"{p.p:.2g}", f"{p.n:,}")


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return f'<div class="scroll"><table><tr>{head}{body}</table></div>'
