"""``curves.html``: every metric of a training as a small chart, validation first.

In goes the log; out comes a page with a chart per metric and phase: a line through the steps (mean
and range of equal bins where there are many), or a line with a dot per epoch. What belongs together
(the selector's pick, the best and the mean stored candidate) shares a chart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import polars as pl

from lever_data.report.page import Chart, Figure, Line, Section, render
from lever_data.report.verdict import Finding

if TYPE_CHECKING:
    from lever_train.learn.log import Log

BINS = 240

_ABOUT = (
    "A chart over steps shows every step; where there are many, the line is the mean of "
    "neighbouring steps and the shade their range. A chart over epochs has one dot per epoch: "
    "`train_` is the mean over the steps of the epoch, and `val_` was measured at its end on the "
    "queries kept out of training."
)
_PHASES = {
    "sft": "SFT: supervised training on the best InfoScore beam",
    "dense": "Dense: the candidates of a query against each other",
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
    "val_accuracy": "Stored accuracy of the candidate the selector likes best.",
    "val_expected_reward": "Estimated reward of what the selector would sample.",
    "val_ess": "Stored candidates that estimate rests on, a query; more is surer.",
}


_LOOKS = {  # line of a shared chart → colour and dash
    "the selector's pick": ("c0", ()),
    "best stored candidate": ("c2", (7, 4)),
    "mean stored candidate": ("plain", (2, 4)),
}


def curves_page(log: Log, title: str, facts: Mapping[str, str], config: str) -> str:
    """The page as text.

    Args:
        log: what was measured.
        title: the name of the training.
        facts: what was trained on what, and when.
        config: the resolved configuration, as TOML.
    """
    table = pl.DataFrame(log.table()).drop_nulls("value")
    sections = curves({title: table})
    findings = [
        finding
        for phase in table["phase"].unique(maintain_order=True)
        for finding in _overfits(phase, table.filter(pl.col("phase") == phase))
    ]
    folded = Figure("Configuration", _ABOUT, text=config, text_title="every option, as TOML")
    return render(
        f"Training curves: {title}",
        facts,
        "lever train",
        [*sections, Section([folded])],
        findings=findings,
    )


def curves(trainings: Mapping[str, pl.DataFrame]) -> list[Section]:
    """Every metric as a chart, by phase; of several trainings, their lines over each other.

    Args:
        trainings: by name, rows of phase, epoch, step, metric and value.
    """
    known = pl.concat([t.with_columns(training=pl.lit(n)) for n, t in trainings.items()])
    known = known.drop_nulls("value")
    sections = []
    for phase in known["phase"].unique(maintain_order=True):
        rows = known.filter(pl.col("phase") == phase)
        panels = sorted(_panels(rows).items(), key=lambda panel: _rank(panel[0]))
        figures = [_figure(title, rows, metrics, list(trainings)) for title, metrics in panels]
        sections.append(Section(figures, _PHASES.get(phase, phase), grid=True))
    return sections


def _rank(title: str) -> int:
    """Validation comes first, then what an epoch was like, then what its steps were."""
    return 0 if title.startswith("val_") else 1 if title.startswith("train_") else 2


def _overfits(phase: str, rows: pl.DataFrame) -> list[Finding]:
    """A validation loss that rises while the loss of training falls."""
    epochs = rows.filter(pl.col("step").is_null())
    by_metric = {
        name: dict(epochs.filter(pl.col("metric") == name).select("epoch", "value").iter_rows())
        for name in ("val_loss", "train_loss")
    }
    held_out, trained = by_metric["val_loss"], by_metric["train_loss"]
    if not held_out or not trained:
        return []
    best, last = min(held_out, key=lambda epoch: held_out[epoch]), max(held_out)
    if held_out[last] <= held_out[best] or trained[last] >= trained[best]:
        return []
    text = (
        f"{phase.upper()}: the validation loss is lowest after epoch {best} "
        f"({held_out[best]:.4g}) and rises to {held_out[last]:.4g} by epoch {last}, while the "
        "training loss falls."
    )
    advice = "What is learned later may hold for the training queries alone: fewer epochs may do."
    return [Finding("fair", text, advice)]


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


def _figure(
    title: str, rows: pl.DataFrame, metrics: Mapping[str, str], trainings: Sequence[str]
) -> Figure:
    """One chart: steps where the metric has them, else epochs."""
    known = rows.filter(pl.col("metric").is_in(list(metrics.values())))
    axis = "step" if known["step"].null_count() < known.height else "epoch"
    known = known.drop_nulls(axis)
    found = {
        (training, name): _points(own.filter(pl.col("metric") == metric), axis)
        for training, own in ((t, known.filter(pl.col("training") == t)) for t in trainings)
        for name, metric in metrics.items()
    }
    x = sorted({at for points in found.values() for at in points["x"]})
    lines = []
    for (training, name), points in found.items():
        colour, dash = _LOOKS.get(name, ("c0", ()))
        words = name
        if len(trainings) > 1:
            colour = f"c{trainings.index(training) % 8}"
            words = training if len(metrics) == 1 else f"{training}: {name}"
        placed = pl.DataFrame({"x": x}, schema={"x": pl.Float64}).join(points, on="x", how="left")
        mean, low, high = (placed[column].to_list() for column in ("mean", "low", "high"))
        line = Line(words, mean, colour=colour, dash=dash)
        # where every step is shown there is no range
        lines.append(line if low == high else replace(line, low=low, high=high))
    chart = Chart(f"{title} by {axis}", x, lines, axis, smooth=axis == "step")
    return Figure(title, _meaning(title), chart)


def _meaning(title: str) -> str:
    """What a metric is, where that is known; of a mean over an epoch, what its steps are."""
    return _MEANINGS.get(title) or _MEANINGS.get(title.removeprefix("train_"), "")


def _points(rows: pl.DataFrame, axis: str) -> pl.DataFrame:
    """A metric's rows as at most ``BINS`` points, each of equally many rows."""
    size = max(1, -(-rows.height // BINS))
    return (
        rows.with_row_index("row")
        .group_by(pl.col("row") // size, maintain_order=True)
        .agg(
            # the last of the bin, so that the line ends where the training does
            x=pl.col(axis).last().cast(pl.Float64),
            mean=pl.col("value").mean(),
            low=pl.col("value").min(),
            high=pl.col("value").max(),
        )
    )
