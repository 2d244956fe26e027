"""``lever audit``: which queries can teach, and which rewards are noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from lever_data.options import words
from lever_data.report.options import AuditRequest
from lever_data.vocabulary import (
    DEFAULT_STORE,
    Gates,
    HtmlFile,
    JsonFile,
    StorePath,
)

from .common import emit, emit_table, notice, say, shown
from .flags import with_flags

if TYPE_CHECKING:
    from lever_data.report.audit import Audit

_SOURCE_COLUMNS = {
    "num_candidates": "candidates",
    "right_share": "right",
    "mean_reward": "mean reward",
    "within_query_variance": "variance in query",
    "num_queries_needing": "queries only it makes teach",
}
_MODE_COLUMNS = ("mean_deviation", "right_wrong_gap", "rank_agreement")
_COMPARED = {
    "view": "view",
    "queries": "queries",
    "candidates": "candidates",
    "teachable_share": "can teach",
    "mean_reward": "mean reward",
    "mixed_deviation": "spread where mixed",
    "fallback_share": "fallback",
    "oracle_gap": "oracle gap",
}


@with_flags
def audit(
    request: AuditRequest,
    store: StorePath = DEFAULT_STORE,
    compare: Annotated[
        tuple[str, ...], words("Set this view beside the others.", metavar="VIEW")
    ] = (),
    fail_on: Gates = (),
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Audit a view: which queries can teach anything, which rewards are noise.

    With --compare, several views side by side; the JSON is then a list.
    """
    from lever_data.report.audit import audit_views
    from lever_data.report.gate import parse_gate, require_known, require_passed
    from lever_data.store.files import write_text

    gates = [parse_gate(text) for text in fail_on]
    require_known(gates)
    is_named = not compare or "view" in request.model_fields_set
    views = [*([request.view] if is_named else []), *compare]
    audits = audit_views(store, request, views)
    figures = [found.figures for found in audits]
    if html is not None:
        from lever_data.report.audit_page import audit_page

        write_text(html, audit_page(audits))
        notice(f"wrote {html}")
    try:
        if not emit(figures if compare else figures[0], json):
            _render(audits)
    finally:  # a reader of our output that leaves early lets no gate pass
        require_passed(gates, figures)


def _render(audits: list[Audit]) -> None:
    from lever_data.report.page import percent
    from lever_data.report.verdict import verdict

    if len(audits) > 1:
        rows = [[_cell(a.figures, key) for key in _COMPARED] for a in audits]
        emit_table(list(_COMPARED.values()), rows)
        return
    figures = audits[0].figures
    where = f"{figures['view']} of {', '.join(figures['places'])}, reward {figures['reward']}"
    say(shown(where))
    say(shown("read: " + ", ".join(figures["runs"])))
    print()
    for finding in verdict(figures):
        say(shown(f"  {finding.text} {finding.advice}".rstrip()))
    print()
    rows = [
        [row["gen_method"], *(_cell(row, key) for key in _SOURCE_COLUMNS)]
        for row in figures["by_gen_method"]
    ]
    emit_table(["source", *_SOURCE_COLUMNS.values()], rows)
    print()
    modes = [
        [row["reward_mode"], percent(row["tied_share"]), *(row[key] for key in _MODE_COLUMNS)]
        for row in figures["reward_modes"]
    ]
    columns = ["reward mode", "tied queries", "deviation in query", "right - wrong"]
    emit_table([*columns, "agrees with hard_plus_soft"], modes)


def _cell(row: dict[str, object], key: str) -> object:
    from lever_data.report.page import percent

    value = row[key]
    return percent(value) if key.endswith("_share") and isinstance(value, float) else value
