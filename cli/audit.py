"""``lever audit``: which queries can teach, and which rewards are noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lever_data.relations.reward_spec import RewardSpec, both_given

from .common import (
    DEFAULT_STORE,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_table,
    notice,
    shown,
)
from .flags import build, with_flags

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


def audit(
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    view: Annotated[
        str | None, typer.Option(help="The view to audit; all_candidates if none is named.")
    ] = None,
    compare: Annotated[
        list[str], typer.Option(help="Set this view beside the others (repeatable).")
    ] = [],  # noqa: B006
    policy: Annotated[
        str | None,
        typer.Option(help="Relation (dataset, split, query_id, pointer, logprob) to weigh for."),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Only candidates that this model answered.")
    ] = None,
    sql_dir: SqlDirOption = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    fail_on: Annotated[
        list[str],
        typer.Option(help='Exit 1 where this holds, such as "fallback_share > 0.05".'),
    ] = [],  # noqa: B006
    **flags: Any,
) -> None:
    """Audit a view: which queries can teach anything, which rewards are noise.

    With --compare, several views side by side; the JSON is then a list.
    """
    from lever_data.report.audit import AuditRequest, audit_views
    from lever_data.report.audit_page import audit_page
    from lever_data.report.gate import parse_gate, require_known, require_passed
    from lever_data.store.files import require_writable, write_json, write_text

    gates = [parse_gate(text) for text in fail_on]
    require_known(gates)
    require_writable([path for path in (json, html) if path is not None])
    reward = _reward(flags)
    request = AuditRequest("", reward, tuple(run), scorer, sql_dir, policy)
    views = [*([view] if view else []), *compare] or ["all_candidates"]
    audits = audit_views(store, request, views)
    figures = [found.figures for found in audits]
    if json is not None:
        write_json(json, figures if compare else figures[0])
        notice(f"figures: {json}")
    if html is not None:
        write_text(html, audit_page(audits))
        notice(f"page: {html}")
    try:
        _render(audits)
    finally:  # a reader of our output that leaves early lets no gate pass
        require_passed(gates, figures)


audit = with_flags(audit, RewardSpec)


def _reward(flags: dict[str, Any]) -> RewardSpec:
    reward = build(RewardSpec, flags)
    mode = flags.get("rewardspec__mode")
    if reward.expression is not None and mode is not None:
        from lever_data.errors import UsageError

        raise UsageError(both_given(mode, reward.expression))
    return reward


def _render(audits: list[Audit]) -> None:
    from lever_data.report.page import percent
    from lever_data.report.verdict import verdict

    if len(audits) > 1:
        rows = [[_cell(a.figures, key) for key in _COMPARED] for a in audits]
        emit_table(list(_COMPARED.values()), rows)
        return
    figures = audits[0].figures
    print(_line(f"{figures['view']}, reward {figures['reward']}") + "\n")
    for finding in verdict(figures):
        print(_line(f"  {finding.text} {finding.advice}".rstrip()))
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


def _line(text: str) -> str:
    """Text from the data as a cell of a table shows it, so that it moves no cursor."""
    return shown(text).replace("\\[", "[")  # brackets are markup in tables only


def _cell(row: dict[str, object], key: str) -> object:
    from lever_data.report.page import percent

    value = row[key]
    return percent(value) if key.endswith("_share") and isinstance(value, float) else value
