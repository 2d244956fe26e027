"""``curves.html``: every metric of a training as a small chart, validation first.

In goes the log; out comes a page with a chart per metric and phase: a line through the steps (mean
and range of equal bins where there are many), or a line with a dot per epoch. What belongs together
(the selector's pick, the best and the mean stored candidate) shares a chart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
    points = _points(known.drop_nulls("value"))
    sections = []
    for phase in dict.fromkeys(phase for phase, _, _ in points):
        metrics = dict.fromkeys(metric for own, metric, _ in points if own == phase)
        panels = sorted(_panels(metrics).items(), key=lambda panel: _rank(panel[0]))
        figures = []
        for title, lines in panels:
            drawn = {
                (training, name): points.get((phase, metric, training))
                for training in trainings
                for name, metric in lines.items()
            }
            figures.append(_figure(title, drawn, list(trainings)))
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


def _panels(metrics: Iterable[str]) -> dict[str, dict[str, str]]:
    """Charts in order: title → name of the line → metric. Most charts have one line."""
    found: dict[str, dict[str, str]] = {}
    for metric in metrics:
        compared = _COMPARED.fullmatch(metric)
        if compared is None:
            found[metric] = {metric: metric}
        else:
            found.setdefault(f"val_{compared[2]}", {})[_LINES[compared[1]]] = metric
    return found


def _figure(
    title: str,
    drawn: Mapping[tuple[str, str], pl.DataFrame | None],
    trainings: Sequence[str],
) -> Figure:
    """One chart of the points of its lines, by training and name; None where one has none."""
    known = [points for points in drawn.values() if points is not None]
    axis = "step" if any(points["by_step"][0] for points in known) else "epoch"
    x = sorted({at for points in known for at in points["x"]})
    is_shared = len({name for _, name in drawn}) > 1
    lines = []
    for (training, name), points in drawn.items():
        colour, dash = _LOOKS.get(name, ("c0", ()))
        words = name
        if len(trainings) > 1:
            colour = f"c{trainings.index(training) % 8}"
            words = f"{training}: {name}" if is_shared else training
        rows = () if points is None else points.select("x", "mean", "low", "high").iter_rows()
        at = {place: values for place, *values in rows}
        mean, low, high = ([at[place][i] if place in at else None for place in x] for i in range(3))
        line = Line(words, mean, colour=colour, dash=dash)
        # where every step is shown there is no range
        lines.append(line if low == high else replace(line, low=low, high=high))
    chart = Chart(f"{title} by {axis}", x, lines, axis, smooth=axis == "step")
    return Figure(title, _meaning(title), chart)


def _meaning(title: str) -> str:
    """What a metric is, where that is known; of a mean over an epoch, what its steps are."""
    return _MEANINGS.get(title) or _MEANINGS.get(title.removeprefix("train_"), "")


def _points(rows: pl.DataFrame) -> dict[tuple[str, str, str], pl.DataFrame]:
    """At most ``BINS`` points a line, each of equally many rows, by phase, metric and training:
    over steps where a metric has them, else over epochs. One pass: a chart by itself takes 3 ms,
    and a page is written at the end of every epoch."""
    line = ["phase", "metric", "training"]
    size = (pl.len().over(line) + BINS - 1) // BINS
    binned = (
        rows.with_columns(by_step=pl.col("step").is_not_null().any().over("phase", "metric"))
        .filter(pl.col("step").is_not_null() | ~pl.col("by_step"))
        .with_columns(bin=pl.int_range(pl.len()).over(line) // size)
        .group_by(*line, "by_step", "bin", maintain_order=True)
        .agg(
            # the last of the bin, so that the line ends where the training does
            x=pl.when("by_step").then("step").otherwise("epoch").last().cast(pl.Float64),
            mean=pl.col("value").mean(),
            low=pl.col("value").min(),
            high=pl.col("value").max(),
        )
    )
    found = binned.partition_by(*line, as_dict=True, maintain_order=True)
    return {(phase, metric, training): part for (phase, metric, training), part in found.items()}
