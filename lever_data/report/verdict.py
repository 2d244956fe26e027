"""What an audit means, in sentences: the verdict that the terminal and the page open with.

In go the figures of :mod:`audit`, out come short lines of plain text, most important first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lever_data.report.page import percent

Level = Literal["good", "fair", "bad"]

_MOST_TEACH = 0.5  # below this share of mixed queries most of the training data is dead weight
_FEW_TEACH = 0.1  # below this nearly all of it is
_MUCH_NOISE = 0.05  # above this share of string-matched rewards, filter or rescore
_MUCH_ORDER = 0.2  # above this share the reward says as much about the order as about the choice
_FLAT = {  # class of flat queries → what to do where most of them are of it
    "all_wrong": "Propose more candidates for the queries that are all wrong.",
    "tied": "The reward does not tell the candidates of a query apart; a soft score or a "
    "log-probability in it may.",
    "all_right": "The queries that are all right have nothing left to teach; train on harder ones.",
}


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict, how it should be taken, and what to do about it."""

    level: Level
    text: str
    advice: str = ""


def verdict(figures: Mapping[str, Any]) -> list[Finding]:
    """How many queries can teach, how far the rewards can be trusted, which source helps."""
    found = [_teachable(figures), _trust(figures), _annotators(figures), _models(figures)]
    found += [_sources(figures)]
    found += [_oracle(figures), _order(figures), _repeats(figures)]
    return [finding for finding in found if finding]


def _models(figures: Mapping[str, Any]) -> Finding | None:
    """Nothing where one model scored all."""
    scorers = figures["scorers"]
    if len(scorers) < 2:
        return None
    text = f"The scores are those of {len(scorers)} models: {', '.join(scorers)}."
    return Finding("bad", text, "`--scorer` takes those of one; training refuses a mixture.")


def _teachable(figures: Mapping[str, Any]) -> Finding:
    share, classes = figures["teachable_share"], figures["classes"]
    flat = ", ".join(
        f"{classes[name]:,} {text}"
        for name, text in [
            ("all_wrong", "all wrong"),
            ("all_right", "all right"),
            ("tied", "tied"),
        ]
        if classes[name]
    )
    text = (
        f"{classes['mixed']:,} of {figures['queries']:,} queries ({percent(share)}) can teach "
        f"anything" + (f"; the rest are flat: {flat}." if flat else ".")
    )
    level: Level = "bad" if share < _FEW_TEACH else "fair" if share < _MOST_TEACH else "good"
    most = max(_FLAT, key=lambda name: classes[name])  # of a tie the first
    return Finding(level, text, "" if level == "good" else _FLAT[most])


def _trust(figures: Mapping[str, Any]) -> Finding:
    fallback, unknown, failed, missing = (
        figures[f"{name}_share"] for name in ("fallback", "unknown", "failed", "missing")
    )
    text = f"{percent(fallback)} of the rewards come from string match"
    text += f", {percent(unknown)} from an unknown evaluation" if unknown else ""
    shots = figures["fallback_shots_share"]
    text += f"; {percent(shots)} hold a shorter prompt scored by string match" if shots else ""
    text += f"; {percent(missing)} lack a score, which counts as 0" if missing else ""
    text += f"; {percent(failed)} of the stored evaluations failed" if failed else ""
    noise = max(fallback, shots) > _MUCH_NOISE or missing > _MUCH_NOISE
    level: Level = "bad" if noise else "fair" if fallback or shots or unknown or missing else "good"
    advice = (
        "`lever rescore` replaces them by the official metric."
        if fallback or shots or unknown
        else ""
    )
    return Finding(level, text + ".", advice)


def _annotators(figures: Mapping[str, Any]) -> Finding | None:
    """Nothing where four or more annotators answered every question."""
    few, known = figures["few_annotators"]["num_few"], figures["few_annotators"]["num_queries"]
    if not few:
        return None
    from lever_data.items.vqa_metric import few_annotators

    return Finding("bad" if few > known / 2 else "fair", few_annotators(few, known) + ".")


def _sources(figures: Mapping[str, Any]) -> Finding | None:
    rows = [row for row in figures["by_gen_method"] if row["gen_method"] is not None]
    if len(rows) < 2 or not figures["classes"]["mixed"]:
        return None
    best = max(rows, key=lambda row: row["num_queries_needing"])
    if not best["num_queries_needing"]:
        return Finding("fair", "No source is needed: every query that teaches does so without it.")
    least = min(rows, key=lambda row: row["num_queries_needing"])
    text = (
        f"{best['gen_method']} helps most: {best['num_queries_needing']:,} queries teach only "
        f"because of it ({least['gen_method']}: {least['num_queries_needing']:,})."
    )
    return Finding("good", text)


def _oracle(figures: Mapping[str, Any]) -> Finding | None:
    oracle = figures["oracle"]
    if not oracle["num_queries"]:
        return None
    text = (
        f"The best stored candidate earns {oracle['best_reward']:.3f}, the policy's own pick "
        f"{oracle['picked_reward']:.3f}: a gap of {oracle['gap']:.3f} to train for."
    )
    return Finding("good" if oracle["gap"] > 0 else "bad", text)


def _order(figures: Mapping[str, Any]) -> Finding | None:
    rows = [row for row in figures["order_sensitivity"] if row["num_sets"]]
    if not rows:
        return None
    most = max(rows, key=lambda row: row["differing_share"])
    text = (
        f"Reordering the same {most['shot_num']} demonstrations changes the reward in "
        f"{percent(most['differing_share'])} of the cases."
    )
    if most["differing_share"] <= _MUCH_ORDER:
        return Finding("good", text)
    return Finding("fair", text, "So much hangs on the order: one order says little about a set.")


def _repeats(figures: Mapping[str, Any]) -> Finding | None:
    duplicates = figures["duplicates"]
    if not duplicates["num_repeats"]:
        return None
    text = f"{duplicates['num_repeats']:,} candidates repeat another of their query"
    conflicts = duplicates["num_conflicting"]
    text += f"; {conflicts:,} pointers have several rewards." if conflicts else "."
    return Finding("bad" if conflicts else "fair", text)
