"""``curves.html``: every metric of a training as a small chart, in one file without scripts.

In goes the log; out comes a page with one inline SVG per metric and phase: a thin line through the
steps (mean and range of equal bins where there are many), or a line with a dot an epoch. What
belongs together (the selector's pick, the best and the mean stored candidate) shares a chart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import polars as pl

from lever_train.learn.metrics import Log

WIDTH, HEIGHT = 350, 176
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 12, 24  # around the drawing: room for the axes' labels
BINS = 240
DOTS = 40  # more epochs than this are drawn without dots

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5rem }} figure {{ margin: 0; width: 350px }}
figcaption {{ font-weight: 600 }} figcaption small {{ display: block; font-weight: 400 }}
small, .legend {{ color: #666 }} header p {{ max-width: 46rem }}
svg text {{ font: 11px system-ui, sans-serif; fill: #666 }}
rect {{ fill: #f7f7f5 }} polyline {{ fill: none; stroke-width: 1.4 }} polygon {{ opacity: .15 }}
.c0 {{ stroke: #1f5fa8; fill: #1f5fa8 }} .c1 {{ stroke: #2b7a3d; fill: #2b7a3d }}
.c2 {{ stroke: #b5451f; fill: #b5451f }} polyline.c0, polyline.c1, polyline.c2 {{ fill: none }}
polygon.c0, polygon.c1, polygon.c2 {{ stroke: none }} .c1 {{ stroke-dasharray: 6 3 }}
.c2 {{ stroke-dasharray: 2 3 }} circle {{ stroke: none !important }}
.legend span {{ margin-right: .9rem; white-space: nowrap }}
</style><header><h1>{title}</h1><p>{about}</p></header>{body}</html>
"""
_ABOUT = """What the training measured, by phase. A chart with a step axis shows every step; where
there are many, the line is the mean of neighbouring steps and the shade their range. A chart with
an epoch axis has one dot an epoch: <b>train_</b> is the mean over the steps of the epoch, and
<b>val_</b> was measured at its end on the queries kept out of training."""
_PHASES = {
    "sft": "SFT: supervised training on the best InfoScore beam",
    "rce": "RCE: cross-entropy weighted by reward",
    "grpo": "GRPO: policy gradient on group advantages",
}
_COMPARED = re.compile(r"val_(pick|oracle|behaviour)_(\w+)")
_LINES = {
    "pick": "the selector's pick",
    "oracle": "best stored candidate",
    "behaviour": "mean stored candidate",
}
_MEANINGS = {
    "groups": "Groups (queries with their candidates) in a step.",
    "tied": "Groups whose rewards are all equal: they teach nothing.",
    "weight": "Groups that count in the loss; tied ones are left out unless asked for.",
    "loss": "What the step descends on.",
    "weighted_reward": "Mean reward under the weights of the loss; rises as τ falls.",
    "gradient_norm": "Length of the gradient, before it is clipped.",
    "temperature": "τ: the lower, the more the best candidates outweigh the others.",
    "ppo": "The clipped policy loss, without the KL.",
    "kl": "KL divergence from the reference policy: how far training has moved.",
    "clipped_low": "Share of candidates whose ratio was clipped from below.",
    "clipped_high": "Share of candidates whose ratio was clipped from above.",
    "ratio_p05": "New over old probability of a candidate: 5th percentile.",
    "ratio_p50": "New over old probability of a candidate: median.",
    "ratio_p95": "New over old probability of a candidate: 95th percentile.",
    "advantage_rms": "Typical size of the advantages that trained.",
    "effective_sample_size": "Candidates the importance weights leave.",
    "beta": "β: the weight of the KL in the loss.",
    "val_loss": "The loss of RCE at τ = 1 (of SFT: its own); lower is better.",
    "val_reward": "Reward of the stored candidate the selector likes best.",
    "val_accuracy": "VQA accuracy of the stored candidate the selector likes best.",
    "val_expected_reward": "Estimated reward of what the selector would sample.",
    "val_ess": "Stored candidates that estimate rests on, a query; more is surer.",
}


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, and ``points`` with the columns x, mean, low, high."""

    name: str
    points: pl.DataFrame
    span: tuple[float, float]  # the first and the last step or epoch
    last: float


def curves_page(log: Log, title: str) -> str:
    """The page as text; ``title`` is the name of the training."""
    table = pl.DataFrame(log.table()).drop_nulls("value")
    parts: list[str] = []
    for phase in table["phase"].unique(maintain_order=True):
        rows = table.filter(pl.col("phase") == phase)
        figures = [_figure(name, rows, metrics) for name, metrics in _panels(rows).items()]
        heading = escape(_PHASES.get(phase, phase))
        parts.append(f"<section><h2>{heading}</h2><main>{''.join(figures)}</main></section>")
    return _PAGE.format(
        title=escape(f"training curves: {title}"), about=_ABOUT, body="".join(parts)
    )


def _panels(rows: pl.DataFrame) -> dict[str, dict[str, str]]:
    """Charts in order: title → name of the line → metric. Most charts have one line."""
    found: dict[str, dict[str, str]] = {}
    for metric in rows["metric"].unique(maintain_order=True):
        compared = _COMPARED.fullmatch(metric)
        if compared is None:
            found[metric] = {metric: metric}
        else:
            found.setdefault(f"val_{compared[2]}", {})[_LINES[compared[1]]] = metric
    return found


def _figure(title: str, rows: pl.DataFrame, metrics: dict[str, str]) -> str:
    """One chart: steps where the metric has them, else epochs."""
    known = rows.filter(pl.col("metric").is_in(list(metrics.values())))
    axis = "step" if known["step"].null_count() < known.height else "epoch"
    known = known.drop_nulls(axis)
    lines = [
        _line(name, known.filter(pl.col("metric") == metric), axis)
        for name, metric in metrics.items()
    ]
    if len(lines) > 1:
        below = '<div class="legend">' + "".join(map(_legend, range(len(lines)), lines))
        below += "</div>"
    else:
        below = f"<small>last {lines[0].last:.4g}</small>"
    meaning = f"<small>{escape(_meaning(title))}</small>"
    return (
        f"<figure><figcaption>{escape(title)}{meaning}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_drawing(lines, axis)}</svg>{below}</figure>"
    )


def _meaning(title: str) -> str:
    """What a metric is, where that is known; of a mean over an epoch, what its steps are."""
    return _MEANINGS.get(title) or _MEANINGS.get(title.removeprefix("train_"), "")


def _legend(index: int, line: Line) -> str:
    sample = (
        '<svg width="24" height="10" aria-hidden="true">'
        f'<polyline class="c{index}" points="0,5 24,5"/></svg>'
    )
    return f"<span>{sample} {escape(line.name)}, last {line.last:.4g}</span> "


def _line(name: str, rows: pl.DataFrame, axis: str) -> Line:
    """A metric's rows as at most ``BINS`` points, each of equally many rows."""
    size = max(1, -(-rows.height // BINS))
    points = (
        rows.with_row_index("row")
        .group_by(pl.col("row") // size, maintain_order=True)
        .agg(
            x=pl.col(axis).cast(pl.Float64).mean(),
            mean=pl.col("value").mean(),
            low=pl.col("value").min(),
            high=pl.col("value").max(),
        )
    )
    span = float(rows[axis][0]), float(rows[axis][-1])
    return Line(name, points, span, float(rows["value"][-1]))


class _Scale:
    """From values to pixels; what does not vary lies in the middle."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.first = min(line.span[0] for line in lines)
        self.last = max(line.span[1] for line in lines)
        self.low = min(low for line in lines for low in line.points["low"].to_list())
        self.high = max(high for line in lines for high in line.points["high"].to_list())

    def x(self, value: float) -> float:
        """From left to right."""
        share = (value - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From bottom to top."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def places(self, points: pl.DataFrame, column: str) -> list[tuple[float, float]]:
        """Pixels of a column's points."""
        pairs = zip(points["x"].to_list(), points[column].to_list(), strict=True)
        return [(self.x(a), self.y(b)) for a, b in pairs]

    def axes(self, axis: str) -> str:
        """The field, its lowest and highest value, and its first and last step or epoch."""
        base = HEIGHT - 8
        parts = [
            f'<rect x="{LEFT - 4}" y="{TOP - 6}" width="{WIDTH - LEFT - RIGHT + 8}" '
            f'height="{HEIGHT - TOP - BOTTOM + 12}"/>',
            _label((LEFT + WIDTH - RIGHT) / 2, base, axis, "middle"),
        ]
        for value in dict.fromkeys((self.low, self.high)):
            parts.append(_label(LEFT - 8, self.y(value) + 4, f"{value:.4g}", "end"))
        if self.first == self.last:
            parts[1] = _label(self.x(self.first), base, f"{axis} {self.first:.0f}", "middle")
        else:
            parts.append(_label(LEFT, base, f"{self.first:.0f}", "start"))
            parts.append(_label(WIDTH - RIGHT, base, f"{self.last:.0f}", "end"))
        return "".join(parts)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _drawing(lines: Sequence[Line], axis: str) -> str:
    """Axes, and of every line the range as a shade, the mean, and few epochs as dots."""
    scale = _Scale(lines)
    parts = [scale.axes(axis)]
    for index, line in enumerate(lines):
        middle = scale.places(line.points, "mean")
        if not (line.points["low"] == line.points["high"]).all():
            edge = scale.places(line.points, "high") + scale.places(line.points, "low")[::-1]
            parts.append(f'<polygon class="c{index}" points="{_text(edge)}"/>')
        if len(middle) > 1:
            parts.append(f'<polyline class="c{index}" points="{_text(middle)}"/>')
        if len(middle) == 1 or (axis == "epoch" and len(middle) <= DOTS):
            parts += [
                f'<circle class="c{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in middle
            ]
    return "".join(parts)


def _text(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
