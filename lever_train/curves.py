"""``curves.html``: every metric of a training as a small chart, in one file without scripts.

In goes the log; out comes a page with one inline SVG per metric and phase: a thin line through the
steps (mean and range of equal bins where there are many) and dots for the epochs.
"""

from __future__ import annotations

from html import escape

import polars as pl

from lever_train.metrics import Log

WIDTH, HEIGHT, MARGIN = 320, 150, 6
BINS = 240

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5rem }} figure {{ margin: 0 }}
figcaption {{ font-weight: 600 }} small {{ color: #666 }}
svg {{ background: #f7f7f5 }} polyline {{ fill: none; stroke: #1f5fa8; stroke-width: 1.4 }}
polygon {{ fill: #1f5fa8; opacity: .15 }} circle {{ fill: #b5451f }}
</style><h1>{title}</h1>{body}</html>
"""


def curves_page(log: Log, title: str) -> str:
    """The page as text."""
    table = pl.DataFrame(log.table())
    parts: list[str] = []
    for phase in table["phase"].unique(maintain_order=True):
        rows = table.filter(pl.col("phase") == phase)
        figures = [
            _figure(name, rows.filter(pl.col("metric") == name))
            for name in rows["metric"].unique(maintain_order=True)
        ]
        parts.append(f"<h2>{escape(phase)}</h2><main>{''.join(figures)}</main>")
    return _PAGE.format(title=escape(title), body="".join(parts))


def _figure(name: str, rows: pl.DataFrame) -> str:
    """One metric: steps where it has them, else epochs."""
    known = rows.drop_nulls("value")
    steps = known.drop_nulls("step")
    if steps.height:
        points = _binned(steps)
    else:
        points = known.select(
            x=pl.col("epoch").cast(pl.Float64), mean="value", low="value", high="value"
        )
    if not points.height:
        return ""
    last = points["mean"][-1]
    low, high = float(points["low"].min()), float(points["high"].max())  # type: ignore[arg-type]
    drawing = _lines(points, low, high) if points.height > 1 else _dots(points, low, high)
    if not steps.height and points.height > 1:
        drawing += _dots(points, low, high)
    return (
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(name)}">{drawing}'
        f"</svg><br><small>{low:.4g} to {high:.4g}, last {last:.4g}</small></figure>"
    )


def _binned(steps: pl.DataFrame) -> pl.DataFrame:
    size = max(1, -(-steps.height // BINS))
    return (
        steps.with_row_index("row")
        .group_by(pl.col("row") // size, maintain_order=True)
        .agg(
            x=pl.col("step").cast(pl.Float64).mean(),
            mean=pl.col("value").mean(),
            low=pl.col("value").min(),
            high=pl.col("value").max(),
        )
    )


def _lines(points: pl.DataFrame, low: float, high: float) -> str:
    upper = _places(points, "high", low, high)
    lower = _places(points, "low", low, high)[::-1]
    middle = _places(points, "mean", low, high)
    return (
        f'<polygon points="{" ".join([*upper, *lower])}"/><polyline points="{" ".join(middle)}"/>'
    )


def _dots(points: pl.DataFrame, low: float, high: float) -> str:
    places = (place.split(",") for place in _places(points, "mean", low, high))
    return "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in places)


def _places(points: pl.DataFrame, column: str, low: float, high: float) -> list[str]:
    x, y = points["x"].to_list(), points[column].to_list()
    wide, tall = (x[-1] - x[0]) or 1.0, (high - low) or 1.0
    return [
        f"{MARGIN + (a - x[0]) / wide * (WIDTH - 2 * MARGIN):.1f},"
        f"{HEIGHT - MARGIN - (b - low) / tall * (HEIGHT - 2 * MARGIN):.1f}"
        for a, b in zip(x, y, strict=True)
    ]
