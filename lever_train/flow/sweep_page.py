"""A sweep as a page: its cells with their intervals, how one was chosen, and what luck gives.

In goes a :class:`SweepReport`; out comes HTML, and the sentences that the terminal says too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lever_data.report.page import Cell as TableCell
from lever_data.report.page import Chart, Figure, Line, Section, Table, render
from lever_data.report.verdict import Finding

if TYPE_CHECKING:
    from lever_train.flow.sweep import SweepReport


def sweep_page(report: SweepReport) -> str:
    """The page as HTML."""
    cells = report.cells
    numbers = list(range(1, len(cells) + 1))
    accuracy = Line(
        "accuracy",
        [cell.accuracy for cell in cells],
        [cell.low for cell in cells],
        [cell.high for cell in cells],
    )
    lines = [accuracy]
    if report.is_held_out:
        found = [cell.validation for cell in cells]
        lines.append(Line("held-out training questions (chosen by)", found, colour="plain"))
    chart = Chart(
        "Accuracy of every cell",
        numbers,
        lines,
        "cell",
        kind="interval",
        y="percent",
        joined=False,
        height=320,
    )
    note = "The chosen cell is the first. Accuracy: mean over shot numbers, with its 95 % interval."
    findings = [
        Finding("good" if report.is_held_out else "fair", choice(report)),
        Finding("good" if report.num_distinct == len(cells) else "fair", luck(report)),
    ]
    for settings, error in report.failed:
        findings.append(Finding("bad", f"A cell failed: {_words(settings)}. {error}"))
    figures = [
        Figure("Accuracy of every cell", note, chart),
        Figure("Cells", table=_table(report)),
    ]
    title = f"Sweep {report.name}: {len(cells)} cells"
    return render(title, report.about, "lever sweep", [Section(figures)], findings=findings)


def choice(report: SweepReport) -> str:
    """How the first cell came to be chosen, and what its figure is worth for that."""
    best = report.cells[0]
    place = report.about["dataset/split"]
    worth = f"{best.accuracy:.2%} ({best.low:.2%} to {best.high:.2%}) on {place}"
    if report.is_held_out:
        return (
            f"Chosen by its accuracy on held-out training questions ({best.validation:.2%}): "
            f"{_words(best.settings)}. It has {worth}, which took no part in the choice."
        )
    return (
        f"Chosen by the accuracy it is reported with: {_words(best.settings)}, {worth}. That "
        "figure is partly luck: evaluate the checkpoint on questions no cell has seen. Cells are "
        "chosen on held-out training questions where each holds the same ones out "
        "(data.split_ratio below 1 and no data option in the grid)."
    )


def luck(report: SweepReport) -> str:
    """How far the best cell would be ahead by chance."""
    alike = len(report.cells) - report.num_distinct
    same = f" ({alike} answered every question like another)" if alike else ""
    return (
        f"Were all {report.num_distinct} distinct cells{same} equally good, the best of them would "
        f"lead their mean by {100 * report.luck:.2f} points by luck."
    )


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {setting(value)}" for name, value in settings.items()) or "the base"


def setting(value: object) -> str:
    """What a cell sets, as people read it."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(report: SweepReport) -> Table:
    names = list(dict.fromkeys(name for cell in report.cells for name in cell.settings))
    rows: list[list[TableCell]] = []
    for number, cell in enumerate(report.cells, 1):
        shares = [cell.accuracy, cell.low, cell.high]
        changes = [cell.difference, cell.difference_low, cell.difference_high]
        rows.append(
            [
                (f"cell {number}", number),
                *(setting(cell.settings.get(name, "–")) for name in names),
                (f"{cell.validation:.2%}" if cell.validation is not None else "–", cell.validation),
                *((f"{share:.2%}", share) for share in shares),
                *(("–" if c is None else f"{100 * c:+.2f}", c) for c in changes),
            ]
        )
    columns = ("held-out", "accuracy", "low", "high", "points to SFT", "from", "to")
    return Table(("cell", *names, *columns), rows, marked=[0])
