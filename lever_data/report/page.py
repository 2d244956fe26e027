"""Write an audit down: as JSON with stable keys, and as one self-contained page.

In go :class:`Audit` records, out come files. The page needs no network and no script: styles and
charts (inline SVG) are in it, and every chart has the SQL behind it in a fold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lever_data.report.audit import CLASSES, Audit
from lever_data.report.verdict import Finding, percent, verdict
from lever_data.store.files import writing

_CLASS_TITLES = {
    "mixed": "mixed: rewards differ",
    "all_wrong": "all wrong",
    "all_right": "all right",
    "tied": "tied in between",
}
_BIN = 0.1  # width of the bars of reward_spread


@dataclass(frozen=True)
class _Shown:
    """One audit as the template takes it."""

    figures: Mapping[str, Any]
    findings: list[Finding]
    spread: list[dict[str, float]]
    sql: Mapping[str, str]


def write_json(path: Path, figures: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Write the figures of one audit, or of several as a list."""
    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with writing(path) as file:
        file.write(text.encode())


def write_page(path: Path, audits: Sequence[Audit]) -> None:
    """Write the page of one audit, or of several side by side."""
    with writing(path) as file:
        file.write(render(audits).encode())


def render(audits: Sequence[Audit]) -> str:
    """The page as HTML; texts from the data are escaped."""
    environment = Environment(
        loader=PackageLoader("lever_data.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "count": lambda value: f"{value:,}",
        "number": _number,
        "signed": lambda value: _number(value, "+"),
        "percent": percent,
        "code": _code,
    }
    environment.filters |= filters
    views = " and ".join(audit.figures["view"] for audit in audits)
    return environment.get_template("audit.html").render(
        title=f"Reward audit: {views}",
        audits=[_shown(audit) for audit in audits],
        class_names=CLASSES,
        class_titles=_CLASS_TITLES,
    )


def _shown(audit: Audit) -> _Shown:
    flat, spread = _spread(audit.figures["reward_spread"])
    figures = {**audit.figures, "flat_queries": flat}
    return _Shown(figures, verdict(audit.figures), spread, audit.sql)


def _spread(rows: Sequence[Mapping[str, float]]) -> tuple[float, list[dict[str, float]]]:
    """Queries without any spread, and the histogram of the others with its empty bars."""
    flat = sum(row["num_queries"] for row in rows if row["high"] == 0)
    found = {round(row["low"] / _BIN): row["num_queries"] for row in rows if row["high"] > 0}
    bars = range(max(found) + 1) if found else range(0)
    return flat, [
        {"low": i * _BIN, "high": (i + 1) * _BIN, "num_queries": found.get(i, 0)} for i in bars
    ]


def _code(text: str) -> Markup:
    """Text with its `commands` set as code; everything in it is escaped."""
    parts = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>" if i % 2 else "{}").format(p) for i, p in parts)


def _number(value: float | None, sign: str = "-") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"
