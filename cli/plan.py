"""``lever plan``: what a comparison can show before it is paid for."""

from __future__ import annotations

from lever_data.report.options import PlanRequest
from lever_data.vocabulary import DEFAULT_STORE, JsonFile, StorePath

from .common import emit, emit_table, notice
from .flags import with_flags


@with_flags
def plan(request: PlanRequest, store: StorePath = DEFAULT_STORE, json: JsonFile = None) -> None:
    """Say how many queries show a difference, and what they cost, from stored answers."""
    from dataclasses import asdict

    from lever_data.report.plan import plan
    from lever_data.store.store import Store

    found = plan(Store.open(store), request)
    if emit(asdict(found), json):
        return
    emit_table(
        ["comparison", "shots", "queries", "spread", "by image", "shown by these",
         f"queries to show {request.difference:g}"],
        [[c.name, c.shots, c.n, c.deviation, c.design_effect, c.smallest, c.needed]
         for c in found.comparisons],
        title=f"From {found.source}: paired, power {request.power:g}, "
        f"confidence {request.confidence:g}",
    )  # fmt: skip
    print()
    named = ["queries", "smallest difference", "answers", "tokens", "cost"]
    rows: list[list[object]] = [
        [s.queries, s.smallest, s.answers, s.tokens, s.cost] for s in found.sizes
    ]
    shown = [i for i in range(len(named)) if any(row[i] is not None for row in rows)]
    emit_table(
        [named[i] for i in shown],
        [[row[i] for i in shown] for row in rows],
        title=f"What a number of queries shows of {found.widest}",
    )
    if found.looks:
        print()
        emit_table(
            ["look", "share of the queries", "stop where p is at most"],
            [[number, look.share, look.p] for number, look in enumerate(found.looks, 1)],
            title="Stopping early, the chance to err kept",
        )
    if found.noise is not None:
        notice(_noise(found.noise.repeated, found.noise.variance, found.noise.within))


def _noise(repeated: int, variance: float | None, within: float | None) -> str:
    if variance is None:
        return "noise of the answers: unknown, since no pointer was answered twice"
    share = "" if not within else f", {variance / within:.0%} of the variance within a query"
    return f"noise of the answers: variance {variance:.4g} over {repeated:,} pointers{share}"
