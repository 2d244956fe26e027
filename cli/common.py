"""What every command shares: output to stdout, notices and progress to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from lever_data.vocabulary import STDOUT

if TYPE_CHECKING:
    from rich.progress import Progress


class Advance(Protocol):
    """What long library calls report to: work done and work in all, in the call's own unit."""

    def __call__(self, done: float, total: float | None, note: str = "") -> None:
        """Report ``done`` of ``total`` units; ``note`` is shown behind the bar."""


def notice(message: str) -> None:
    """Tell the user something beside the result: one line on stderr."""
    print(message, file=sys.stderr, flush=True)


def emit(value: object, file: Path | None) -> bool:
    """The result as JSON where ``--json`` says; True where that is stdout, and no table follows."""
    if file is None:
        return False
    if file == STDOUT:
        print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
        return True
    from lever_data.store.files import write_json

    write_json(file, value)
    notice(f"wrote {file}")
    return False


def emit_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> None:
    """The result as a table on stdout: numbers right-aligned, null as a dash.

    In a terminal it takes the width there is: texts wrap at spaces, ids stay whole, and where that
    is not enough columns are left out of the middle. Elsewhere nothing wraps.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    texts = [[name, *(shown(row[i]) for row in rows)] for i, name in enumerate(columns)]
    console = Console(width=None if sys.stdout.isatty() else _natural_width(texts), markup=False)
    chosen = _fitting(texts, console.width)
    columns_shown = [[_GAP] if place is None else texts[place] for place in chosen]
    widths = _widths(columns_shown, console.width)
    for place, column, width in zip(chosen, columns_shown, widths, strict=True):
        values = [] if place is None else [row[place] for row in rows if row[place] is not None]
        is_numeric = bool(values) and all(isinstance(v, int | float) for v in values)
        table.add_column(
            column[0],
            justify="right" if is_numeric else "left",
            overflow="fold",
            width=width,
        )
    for number in range(1, len(rows) + 1):
        table.add_row(*(Text(_GAP if i is None else texts[i][number]) for i in chosen))
    try:
        console.print(table)
    except SystemExit:  # rich's answer to a closed pipe; ours is that the reader has had enough
        raise BrokenPipeError from None
    if None in chosen:
        left_out = len(columns) - len(chosen) + 1
        notice(f"{left_out} of {len(columns)} columns do not fit in {console.width}")


_GAP = "…"  # stands for the columns that are left out
_WHOLE = 48  # an id of so many characters stays on one line, a longer text may be broken
_SHORT = 12  # a cell of so many is not broken at a space: "62.4 %"


def _longest(texts: Iterable[str], separator: str | None) -> int:
    """Of the longest word, or of the longest text where ``separator`` is None."""
    parts = texts if separator is None else (w for text in texts for w in text.split(separator))
    return max(map(len, parts), default=0)


def _least(column: Sequence[str]) -> int:
    """The width below which words, or short cells, would be broken."""
    whole = max((len(cell) for cell in column[1:] if len(cell) <= _SHORT), default=0)
    return min(max(_longest(column, " "), whole), _WHOLE)


def _natural_width(columns: Sequence[Sequence[str]]) -> int:
    return sum(_longest(column, None) + 2 for column in columns) + 1


def _widths(columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """Each column has room for its longest word, and its share of what is left."""
    least = [min(_least(column), width) for column in columns]
    wanted = [_longest(column, None) - n for column, n in zip(columns, least, strict=True)]
    spare = max(0, width - sum(least) - 2 * (len(columns) - 1))
    share = min(1.0, spare / max(1, sum(wanted)))
    return [n + int(more * share) for n, more in zip(least, wanted, strict=True)]


def _fitting(columns: Sequence[Sequence[str]], width: int) -> list[int | None]:
    """The columns that fit when texts wrap; None stands where others are left out."""
    least = [_least(column) + 2 for column in columns]
    left, right = list(range(len(columns))), list[int]()
    while left and sum(least[i] for i in left + right) + 3 * bool(right) > width + 2:
        if not right:  # cut in the middle
            half = (len(left) + 1) // 2
            left, right = left[:half], left[half:]
        elif len(left) > len(right) or len(right) == 1:
            if len(left) == 1:
                break
            left.pop()
        else:
            right.pop(0)
    hidden = len(columns) - len(left) - len(right)
    return [*left, *([None] if hidden else []), *right]


def say(text: str) -> None:
    """A sentence of the result on stdout; in a terminal it wraps at spaces, indented as it is."""
    if sys.stdout.isatty():
        from textwrap import fill

        from rich.console import Console

        begin = " " * (len(text) - len(text.lstrip()))
        width = Console().width
        text = fill(text, width, subsequent_indent=begin, break_on_hyphens=False)
    print(text)


def emit_vertical(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The result with a line for every value, for rows that are too wide for a table."""
    width = max(map(len, columns), default=0)
    for number, row in enumerate(rows, 1):
        print(f"-- row {number}")
        for name, value in zip(columns, row, strict=True):
            print(f"{name:<{width}}  {shown(value)}")


def progress_bar(label: str, unit: str = "") -> AbstractContextManager[Advance]:
    """A progress bar on stderr with rate and time left; a line every 30 seconds where stderr is
    not a terminal."""
    return _Bar(label, unit) if sys.stderr.isatty() else nullcontext(_Lines(label, unit))


class _Lines:
    """Progress as lines of a log."""

    EVERY = 30.0  # seconds

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.told = time.monotonic()

    def __call__(self, done: float, total: float | None, note: str = "") -> None:
        now = time.monotonic()
        if now - self.told < self.EVERY:
            return
        self.told = now
        of = "" if total is None else f" of {total:,.0f}"
        notice(f"{self.label}: {done:,.0f}{of} {self.unit} {note}".rstrip())


class _Bar(AbstractContextManager[Advance]):
    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.bar: Progress | None = None

    def __enter__(self) -> Advance:
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[amount]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.bar.start()
        task = self.bar.add_task(self.label, total=None, note="", amount="")

        def advance(done: float, total: float | None, note: str = "") -> None:
            bar = cast(Any, self.bar)
            speed = bar.tasks[0].speed
            rate = f", {self._said(speed)}/s" if speed else ""
            of = "" if total is None else f" of {self._said(total)}"
            amount = f"{self._said(done)}{of}{rate}"
            bar.update(task, completed=done, total=total, note=note, amount=amount)

        return advance

    def _said(self, amount: float) -> str:
        from rich.filesize import decimal

        return decimal(int(amount)) if self.unit == "B" else f"{amount:,.0f} {self.unit}".rstrip()

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()


# What would move the cursor or change the terminal if it came out of the data.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS |= {9: "\\t", 10: "\\n", 13: "\\r", 27: "\\e"}


def shown(value: object) -> str:
    """A value as tables and sentences show it: null as a dash, no control character."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).translate(_CONTROLS)
