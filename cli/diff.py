"""``lever diff``: two runs, two views or two evaluations, and whether the change is real."""

from __future__ import annotations

from lever_data.report.options import DiffRequest
from lever_data.vocabulary import DEFAULT_STORE, JsonFile, StorePath

from .common import emit, emit_table, notice
from .flags import with_flags


@with_flags
def diff(request: DiffRequest, store: StorePath = DEFAULT_STORE, json: JsonFile = None) -> None:
    """Compare A with B: what only one has, the paired change in accuracy, McNemar's test."""
    from dataclasses import asdict

    from lever_data.report.diff import diff
    from lever_data.store.store import Store

    found = diff(Store.open(store), request)
    if found.is_same:
        notice("A and B are the same: nothing can differ")
    if emit(asdict(found), json):
        return
    pairs = "query and pointer" if found.kind == "candidates" else "query and shots"
    rows: list[list[object]] = [
        [f"pairs ({pairs})", found.pairs],
        ["only in A", found.only_a],
        ["only in B", found.only_b],
        ["pairs whose accuracy changed", found.changed],
        ["mean change, B - A", found.mean_change],
        ["95 % interval from", found.low],
        ["95 % interval to", found.high],
        ["queries with a pick in both", found.picks],
        ["pick right, A", found.picks_right_a],
        ["pick right, B", found.picks_right_b],
        ["right only in A", found.mcnemar_only_a],
        ["right only in B", found.mcnemar_only_b],
        ["McNemar's exact p", found.mcnemar_p],
    ]
    emit_table(["A -> B", "figure"], rows, title=f"A: {request.a}\nB: {request.b}")
