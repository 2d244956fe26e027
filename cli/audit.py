"""``lever audit``: which queries can teach, and which rewards are noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    DEFAULT_STORE,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_table,
    notice,
)

if TYPE_CHECKING:
    from lever_data.audit.audit import Audit

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
    reward_mode: Annotated[str, typer.Option(help="Reward mode.")] = "hard_plus_soft",
    reward: Annotated[
        str | None, typer.Option(help="A SQL expression over the view's columns, as the reward.")
    ] = None,
    hard_weight: Annotated[float, typer.Option(help="Weight of vqa_correct.")] = 1.0,
    soft_weight: Annotated[
        float, typer.Option(help="Weight of vqa_acc_score or vqa_gt_prob.")
    ] = 1.0,
    rel_weight: Annotated[float, typer.Option(help="Weight of vqa_rel_score.")] = 0.1,
    hybrid_alpha: Annotated[
        float, typer.Option(help="Share of the information term in the mode hybrid.")
    ] = 0.5,
    reward_alpha: Annotated[float, typer.Option(help="Weight of quality in legacy.")] = 0.0,
    reward_beta: Annotated[float, typer.Option(help="Weight of correctness in legacy.")] = 0.0,
    correctness_mode: Annotated[str, typer.Option(help="01 or pm1, in legacy.")] = "01",
    use_logprob: Annotated[
        bool, typer.Option("--use-logprob", help="Quality in legacy is -log-probability.")
    ] = False,
    shot_weights: Annotated[
        str, typer.Option(help="Weights of the prefixes in multi_shot: 0.5,0.3,0.2.")
    ] = "",
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
) -> None:
    """Audit a view: which queries can teach anything, which rewards are noise.

    With --compare, several views side by side; the JSON is then a list.
    """
    from lever_data.audit.audit import AuditRequest, audit_views
    from lever_data.audit.gate import parse_gate, require_passed
    from lever_data.audit.page import write_json, write_page
    from lever_data.rewards import RewardSpec, parse_shot_weights

    gates = [parse_gate(text) for text in fail_on]
    spec = RewardSpec(
        mode=reward_mode,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        rel_weight=rel_weight,
        hybrid_alpha=hybrid_alpha,
        reward_alpha=reward_alpha,
        reward_beta=reward_beta,
        correctness_mode=correctness_mode,
        use_logprob=use_logprob,
        shot_weights=parse_shot_weights(shot_weights),
        expression=reward,
    )
    request = AuditRequest("", spec, tuple(run), scorer, sql_dir, policy)
    views = [*([view] if view else []), *compare] or ["all_candidates"]
    audits = audit_views(store, request, views)
    _render(audits)
    figures = [found.figures for found in audits]
    if json is not None:
        write_json(json, figures if compare else figures[0])
        notice(f"figures: {json}")
    if html is not None:
        write_page(html, audits)
        notice(f"page: {html}")
    require_passed(gates, figures)


def _render(audits: list[Audit]) -> None:
    from lever_data.audit.verdict import percent, verdict

    if len(audits) > 1:
        rows = [[_cell(a.figures, key) for key in _COMPARED] for a in audits]
        emit_table(list(_COMPARED.values()), rows)
        return
    figures = audits[0].figures
    print(f"{figures['view']}, reward {figures['reward']}\n")
    for finding in verdict(figures):
        print(f"  {finding.text}" + (f" {finding.advice}" if finding.advice else ""))
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
    from lever_data.audit.verdict import percent

    value = row[key]
    return percent(value) if key.endswith("_share") and isinstance(value, float) else value
