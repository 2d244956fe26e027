"""A scoreboard as a page: accuracy by shots with intervals, and the tables.

In goes a :class:`Scoreboard`; out comes HTML. A selector has its own colour and dash on every page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lever_data.report.page import (
    Cell,
    Chart,
    Figure,
    Line,
    Section,
    Table,
    render,
    selector_colours,
)
from lever_train.evaluate.scores import Row, Scoreboard

_ORACLE = "oracle"
_BOUND_NOTE = (
    "≥: from 2 shots on the oracle is a lower bound. It adds the best demonstration to those it "
    "has and does not try all sets, so the best set of the pool may do better than it shows."
)
_PAIRED_NOTE = (
    "The difference of accuracies, its 95 % bootstrap interval and the two-sided p of a sign-flip "
    "test of that same difference. Beside them, whether answers are right at all: questions only "
    "one of the two gets right, with McNemar's exact p."
)


def scoreboard_page(board: Scoreboard) -> str:
    """The page as HTML."""
    return render(scoreboard_title(board), board.about, "lever eval", [scoreboard_figures(board)])


def scoreboard_title(board: Scoreboard) -> str:
    """Of how many questions it is."""
    return f"{board.metric} on {max(row.n + row.failed for row in board.rows):,} questions"


def scoreboard_figures(board: Scoreboard) -> Section:
    """Accuracy by shots as a chart, and the tables."""
    sizes = sorted({row.n + row.failed for row in board.rows})
    rows = [row for row in board.rows if row.n + row.failed == sizes[-1]]
    figures = [
        Figure("Accuracy by number of demonstrations", " ".join(_notes(rows, sizes)), _chart(rows)),
        Figure("Accuracy, with 95 % bootstrap intervals", table=_scores(board)),
    ]
    if board.paired:
        figures.append(Figure("Paired by question", _PAIRED_NOTE, table=_paired(board)))
    return Section(figures)


def _notes(rows: Sequence[Row], sizes: Sequence[int]) -> Iterable[str]:
    """What has to be known to read the chart and the tables."""
    if len(sizes) > 1:
        *others, most = (f"{size:,}" for size in sizes)
        yield (
            f"The chart shows the first {most} questions; the tables also hold the first "
            f"{' and the first '.join(others)}."
        )
    if any(map(_is_lower_bound, rows)):
        yield _BOUND_NOTE


def _is_lower_bound(row: Row) -> bool:
    """Whether the best of the pool is at least this: the oracle is exact at one shot alone."""
    return row.selector == _ORACLE and row.shots > 1


def _chart(rows: Sequence[Row]) -> Chart:
    """Accuracy against the number of demonstrations, one line per selector."""
    shots = sorted({row.shots for row in rows})
    selectors = list(dict.fromkeys(row.selector for row in rows))
    looks = selector_colours(selectors)
    lines = []
    for name in selectors:
        own = {row.shots: row for row in rows if row.selector == name}
        bound = " (≥)" if any(map(_is_lower_bound, own.values())) else ""
        there = [own.get(k) for k in shots]
        lines.append(
            Line(
                f"{name}{bound}",
                [None if r is None else r.accuracy for r in there],
                [None if r is None else r.low for r in there],
                [None if r is None else r.high for r in there],
                *looks[name],
            )
        )
    label = "Accuracy by number of demonstrations, one line per selector"
    return Chart(
        label,
        shots,
        lines,
        "demonstrations shown",
        kind="interval",
        y="percent",
        ticks=[str(k) for k in shots],
        height=380,
        from_zero=True,
    )


def _scores(board: Scoreboard) -> Table:
    rows: list[Sequence[Cell]] = [
        (
            r.selector,
            r.shots if r.shown is None else (f"{r.shots} ({r.shown:.2f} shown)", r.shots),
            (f"{'≥ ' if _is_lower_bound(r) else ''}{r.accuracy:.2%}", r.accuracy),
            (f"{r.low:.2%}", r.low),
            (f"{r.high:.2%}", r.high),
            r.n,
            r.failed,
            "" if r.copied is None else (f"{r.copied:.1%}", r.copied),
        )
        for r in board.rows
    ]
    columns = ("selector", "shots", "accuracy", "low", "high", "questions", "failed")
    return Table((*columns, "wrong answers copied from a demonstration"), rows)


def _paired(board: Scoreboard) -> Table:
    columns = ("difference", "shots", "points", "low", "high", "p", "questions")
    rights = ("right only in the first", "right only in the second", "McNemar's p")
    rows: list[Sequence[Cell]] = [
        (
            f"{p.a} − {p.b}",
            p.shots,
            *((f"{100 * value:+.2f}", value) for value in (p.difference, p.low, p.high)),
            (f"{p.p:.2g}", p.p),
            p.n,
            p.only_a,
            p.only_b,
            (f"{p.mcnemar_p:.2g}", p.mcnemar_p),
        )
        for p in board.paired
    ]
    return Table((*columns, *rights), rows)
