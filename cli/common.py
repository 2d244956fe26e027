"""What every command shares: output to stdout, notices and progress to stderr."""

from __future__ import annotations

import json
import sys
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
    """The result as a table on stdout: numbers right-aligned, null as a dash."""
    from rich.console import Console
    from rich.table import Table

    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        values = [row[index] for row in rows if row[index] is not None]
        numeric = bool(values) and all(isinstance(v, int | float) for v in values)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(shown(value) for value in row))
    width = None if sys.stdout.isatty() else 160
    try:
        Console(width=width).print(table)
    except SystemExit:  # rich's answer to a closed pipe; ours is that the reader has had enough
        raise BrokenPipeError from None


def progress_bar(label: str, unit: str = "") -> AbstractContextManager[Advance]:
    """A progress bar on stderr with rate and time left; silent where stderr is no terminal."""
    return _Bar(label, unit) if sys.stderr.isatty() else nullcontext(_no_advance)


def _no_advance(done: float, total: float | None, note: str = "") -> None:
    """Show nothing."""


class _Bar(AbstractContextManager[Advance]):
    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.bar: Progress | None = None

    def __enter__(self) -> Advance:
        from rich import progress
        from rich.console import Console

        amount: list[progress.ProgressColumn] = (
            [progress.DownloadColumn(), progress.TransferSpeedColumn()]
            if self.unit == "B"
            else [progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[rate]}")]
        )
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            *amount,
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.bar.start()
        task = self.bar.add_task(self.label, total=None, note="", rate="")

        def advance(done: float, total: float | None, note: str = "") -> None:
            bar = cast(Any, self.bar)
            speed = bar.tasks[0].speed
            rate = f"{speed:,.0f} {self.unit}/s" if speed else ""
            bar.update(task, completed=done, total=total, note=note, rate=rate)

        return advance

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()


# What would move the cursor or change the terminal if it came out of the data.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS |= {9: "\\t", 10: "\\n", 13: "\\r", 27: "\\e"}


def shown(value: object) -> str:
    """A value as tables and sentences show it: null as a dash, no control character, no markup."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).translate(_CONTROLS).replace("[", "\\[")
