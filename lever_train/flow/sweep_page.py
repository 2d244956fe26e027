"""A sweep as a page: its cells with their intervals, how one was chosen, and what luck gives.

In goes a :class:`SweepReport`; out comes HTML, and the sentences that the terminal says too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

from lever_data.report.page import Cell as TableCell
from lever_data.report.page import Chart, Figure, Line, Section, Table, render
from lever_data.report.verdict import Finding
from lever_train.options.sweep import Settings


@dataclass(frozen=True)
class Cell:
    """A finished cell: ``accuracy`` in [0, 1], mean over queries and shot numbers, with its 95 %
    interval; ``difference`` to the SFT model where there is one, else to the first cell of the
    file, paired by query. ``validation``:
    accuracy of the stored candidate it likes best on training questions that were held out, where
    there are any."""

    cell: str
    settings: Settings
    accuracy: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    num_queries: int
    evaluation: str
    checkpoint: str
    validation: float | None = None


@dataclass(frozen=True)
class SweepReport:
    """All cells, the chosen one first.

    Args:
        luck: by how much the best of ``num_distinct`` equally good cells would lead their mean by
            chance alone, on the same queries; cells that answer every query alike are one.
        is_held_out: whether the choice was made on held-out training questions, and not on the
            split whose accuracy is reported, where the winner is partly the luckiest.
        about: what the figures are of: dataset, split, answerer, run, date, by name.
        judged_on: views of training questions that trainings left out, where accuracies are theirs.
    """

    name: str
    cells: tuple[Cell, ...]
    luck: float
    run: str
    failed: tuple[tuple[Settings, str], ...] = ()
    num_distinct: int = 0
    is_held_out: bool = False
    about: dict[str, str] = field(default_factory=dict)
    judged_on: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def sweep_page(report: SweepReport) -> str:
    """The page as HTML."""
    findings = [
        Finding("good" if report.is_held_out else "fair", choice(report)),
        Finding("good" if report.num_distinct == len(report.cells) else "fair", luck(report)),
    ]
    findings += [Finding("fair", line) for line in spreads(report)]
    for settings, error in report.failed:
        findings.append(Finding("bad", f"A cell failed: {_words(settings)}. {error}"))
    note = (
        "The chosen cell is the first. Accuracy: mean over shot numbers, with its 95 % interval; "
        "the change is from the SFT model, where there is none from the first cell of the file."
    )
    title = f"Sweep {report.name}: {len(report.cells)} cells"
    sections = [sweep_figures(report, note)]
    return render(title, report.about, "lever sweep", sections, findings=findings)


def sweep_figures(report: SweepReport, note: str) -> Section:
    """The cells as a chart and as a table."""
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
    figures = [
        Figure("Accuracy of every cell", note, chart),
        Figure("Cells", table=_table(report)),
    ]
    return Section(figures)


def choice(report: SweepReport) -> str:
    """How the first cell came to be chosen, and what its figure is worth for that."""
    best = report.cells[0]
    place = report.about["dataset/split"]
    worth = f"{best.accuracy:.2%} ({best.low:.2%} to {best.high:.2%}) on {place}"
    if report.judged_on:
        return (
            f"Chosen by its accuracy on training questions that its trainings left out "
            f"({', '.join(report.judged_on)}): {_words(best.settings)}, {worth}. No question of "
            "the evaluation split was read."
        )
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


def spreads(report: SweepReport) -> list[str]:
    """Mean and spread of cells that differ in their seed alone, a sentence each."""
    groups: dict[str, list[Cell]] = {}
    for cell in report.cells:
        others = {k: v for k, v in cell.settings.items() if k != "run.seed"}
        groups.setdefault(_words(others), []).append(cell)
    found = []
    for words, cells in groups.items():
        if len(cells) > 1:
            each = [100 * cell.accuracy for cell in cells]
            found.append(
                f"{len(cells)} seeds of {words}: {mean(each):.2f} % on average, standard deviation "
                f"{stdev(each):.2f}, {min(each):.2f} to {max(each):.2f}."
            )
    return found


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
    columns = ("held-out", "accuracy", "low", "high", "change", "from", "to")
    return Table(("cell", *names, *columns), rows, marked=[0])
