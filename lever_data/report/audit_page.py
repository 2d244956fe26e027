"""An audit as a page: what of its figures becomes a chart.

In go :class:`Audit` records; out comes HTML. Every figure has the SQL behind it in a fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lever_data.report.audit import CLASSES, Audit
from lever_data.report.page import Chart, Line, render
from lever_data.report.verdict import verdict

_CLASS_TITLES = {
    "mixed": "mixed: rewards differ",
    "all_wrong": "all wrong",
    "all_right": "all right",
    "tied": "tied in between",
}
_BIN = 0.1  # width of the bars of reward_spread


def audit_page(audits: Sequence[Audit]) -> str:
    """The page of one audit, or of several side by side."""
    title, facts, more = audit_content(audits)
    return render(title, facts, "lever audit", template="audit.html", **more)


def audit_content(
    audits: Sequence[Audit],
) -> tuple[str, dict[str, str | None], dict[str, Any]]:
    """Title and facts of the page, and what ``audit.html`` takes."""
    views = " and ".join(audit.figures["view"] for audit in audits)
    figures = audits[0].figures
    runs = dict.fromkeys(run for audit in audits for run in audit.figures["runs"])
    facts = {
        "dataset/split": ", ".join(figures["places"]),
        "reward": f"`{figures['reward']}`",
        "runs read": ", ".join(f"`{run}`" for run in runs),
        "answered by": ", ".join(figures["scorers"]) or None,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    more = {
        "audits": [
            {
                "figures": audit.figures,
                "findings": verdict(audit.figures),
                "flat_queries": sum(r["num_queries"] for r in _spread(audit) if r["high"] == 0),
                "spread": _spread_chart(_spread(audit)),
                "sql": audit.sql,
            }
            for audit in audits
        ],
        "class_names": CLASSES,
        "class_titles": _CLASS_TITLES,
    }
    return f"Reward audit: {views}", facts, more


def _spread(audit: Audit) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = audit.figures["reward_spread"]
    return rows


def _spread_chart(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The histogram of the queries whose rewards differ, with its empty bars."""
    found = {round(row["low"] / _BIN): row["num_queries"] for row in rows if row["high"] > 0}
    if not found:
        return None
    bins = range(max(found) + 1)
    return Chart(
        "Queries by the standard deviation of their rewards",
        [round((i + 0.5) * _BIN, 2) for i in bins],
        [Line("queries", [found.get(i, 0) for i in bins], colour="main")],
        "deviation",
        kind="bars",
        step=_BIN,
        whole=False,
        from_zero=True,
    )
