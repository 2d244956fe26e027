"""Rewards: a mode and weights, or the user's expression, become one SQL expression.

The formulas stand in ``sql/macros/reward_<mode>.sql`` and nowhere else. A macro's parameters are
named after the columns it reads and the weights of :class:`.RewardSpec`, so the call follows from
the file. The expression is to be used on a relation with the alias ``v``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

import duckdb

from lever_data.catalog import macros, quote_identifier, quote_literal
from lever_data.errors import LeverError, UsageError
from lever_data.relations.reward_expression import not_failed, null_columns, require_expression
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.selection import readable_errors

LIMIT = 5.0  # rewards are clipped to [-LIMIT, LIMIT], as in the legacy trainer
_WEIGHTS = ("_weight", "_alpha", "_beta")  # how the parameters end that are weights
_PARAMETERS = re.compile(r"create or replace macro \w+\((.*?)\)\s+as", re.DOTALL)
# The mode hybrid reads `info`, which lives beside the views: joined by the candidate's key.
_INFO = (
    "(select any_value(i.info) from candidate_info as i where i.run = v.run "
    "and i.dataset = v.dataset and i.split = v.split and i.query_id = v.query_id "
    "and i.candidate = v.candidate)"
)
_HOW_TO_GET = {
    "vqa_gt_prob": "generate with an answerer that gives log-probabilities",
    "vqa_rel_score": "run `lever rescore`, which fills the similarity columns",
    "vqa_correct": "score the candidates with `lever rescore` or `lever generate`",
    "vqa_acc_score": "score the candidates with `lever rescore` or `lever generate`",
    "shot_scores": "run `lever generate --shots 1,2,…`, which scores every prefix",
    "info": "ingest InfoScore beam data, or RL data with beam scores",
    "beam_score": "ingest data with beam scores",
    "logprob_score": "ingest data with log-probabilities",
}


def modes() -> list[str]:
    """The reward modes: the stems of ``sql/macros/reward_*.sql`` that are one."""
    names = [m.removeprefix("reward_") for m in macros() if m.startswith("reward_")]
    return [name for name in names if name != "clip"]


def reward_columns(spec: RewardSpec) -> list[str]:
    """The columns of the view a mode reads; empty for an expression."""
    if spec.expression is not None:
        return []
    weights = {f.name for f in fields(RewardSpec)}
    return [p for p in _parameters(spec.mode) if p not in weights and p not in ("info", "pointer")]


@dataclass(frozen=True)
class Need:
    """A value the reward reads, which counts as 0 where it is missing.

    Args:
        columns: where it comes from, each in place of the one before; or the expression itself.
        value: SQL over ``v``.
        lacking: SQL condition over ``v``: the candidate needs the value and has none.
    """

    columns: tuple[str, ...]
    value: str
    lacking: str


def reward_sql(spec: RewardSpec) -> str:
    """The reward as a SQL expression of type double over the relation ``v``, clipped.

    Raises:
        UsageError: an unknown mode, a weight out of range, or an expression that is no single
            SQL expression.
    """
    if spec.expression is not None:
        require_expression(spec.expression)
        return f"reward_clip(cast((\n{spec.expression}\n) as double))"
    _require_weights(spec)
    arguments = ", ".join(_argument(spec, p) for p in _parameters(spec.mode))
    return f"reward_clip(reward_{spec.mode}({arguments}))"


def require_scores(con: duckdb.DuckDBPyConnection, view: str, spec: RewardSpec) -> None:
    """Refuse a reward that the rows of ``view`` cannot give.

    Raises:
        LeverError: a column of the mode or of the expression is missing, or null in every row; it
            says which and how to get it.
        UsageError: every weight of the mode is 0.
    """
    name = quote_identifier(view)
    present = [row[0] for row in con.cursor().execute(f"describe {name}").fetchall()]
    needed = needs(view, spec, present)
    counts = ", ".join(f"count({need.value})" for need in needed)
    with readable_errors():
        sql = f"select count(*), {counts} from {name} as v{not_failed(present)}"
        row = con.cursor().execute(sql).fetchall()[0]
    if row[0]:
        refuse_unscored(con, view, spec, dict(zip(needed, row[1:], strict=True)))


def needs(view: str, spec: RewardSpec, present: Sequence[str]) -> list[Need]:
    """What the reward reads as the macro weighs it: of a weight of 0 it needs nothing.

    Raises:
        LeverError: the view, whose columns are ``present``, lacks one.
        UsageError: every weight of the mode is 0.
    """
    if spec.expression is not None:
        sql = reward_sql(spec)
        return [Need((spec.name,), sql, f"({sql}) is null")]
    if missing := [c for c in reward_columns(spec) if c not in present]:
        raise LeverError(
            f"the view has no column for the reward {spec.name}",
            where=view,
            value=", ".join(missing),
            hint=_how_to_get(missing),
        )
    read = _legacy_reads(spec) if spec.mode == "legacy" else _reads(spec)
    weighed = [columns for columns, weight in read if weight != 0]
    if not weighed:
        raise UsageError(
            "the reward weighs nothing: each of its weights is 0",
            value=spec.mode,
            hint=", ".join(w for w in _parameters(spec.mode) if w.endswith(_WEIGHTS)),
        )
    return [_need(spec, columns) for columns in weighed]


def _reads(spec: RewardSpec) -> list[tuple[tuple[str, ...], float]]:
    """Each value that a mode reads, by the columns it comes from, and its weight."""
    weights = {
        "vqa_correct": spec.hard_weight,
        "vqa_acc_score": spec.soft_weight,
        "vqa_gt_prob": spec.soft_weight,
        "vqa_rel_score": spec.rel_weight,
    }
    if spec.mode == "hybrid":
        right = 1 - spec.hybrid_alpha
        weights = {"info": spec.hybrid_alpha, "vqa_correct": right, "vqa_acc_score": right}
    columns = [*(["info"] if spec.mode == "hybrid" else []), *reward_columns(spec)]
    return [((column,), weights.get(column, 1.0)) for column in columns]


def _legacy_reads(spec: RewardSpec) -> list[tuple[tuple[str, ...], float]]:
    quality = ("logprob_score", "beam_score") if spec.use_logprob else ("beam_score",)
    return [(quality, spec.reward_alpha), (("vqa_correct", "vqa_acc_score"), spec.reward_beta)]


def _need(spec: RewardSpec, columns: tuple[str, ...]) -> Need:
    values = [_argument(spec, column) for column in columns]
    value = f"coalesce({', '.join(values)})" if len(values) > 1 else values[0]
    # A right answer earns nothing for being near the truth.
    only = " and v.vqa_correct is distinct from 1" if columns == ("vqa_rel_score",) else ""
    return Need(columns, value, f"({value}) is null{only}")


def refuse_unscored(
    con: duckdb.DuckDBPyConnection, view: str, spec: RewardSpec, counts: Mapping[Need, int]
) -> None:
    """Refuse a reward with a need that no row has a value for.

    Raises:
        LeverError: says which column and how to get it.
    """
    empty = [column for need, found in counts.items() if not found for column in need.columns]
    if not empty:
        return
    if spec.expression is not None:
        empty = null_columns(con, view, spec.expression)
    reads = "reads a column that " if empty else ""
    raise LeverError(
        f"the reward {spec.name} {reads}is null in every row",
        where=view,
        value=", ".join(empty) or None,
        hint=_how_to_get(empty),
    )


def _how_to_get(columns: Sequence[str]) -> str | None:
    return "; ".join(f"{c}: {_HOW_TO_GET[c]}" for c in columns if c in _HOW_TO_GET) or None


def _parameters(mode: str) -> list[str]:
    if mode not in modes():
        near = get_close_matches(mode, modes(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            "unknown reward mode", value=mode, hint=f"{hint}modes: {', '.join(modes())}"
        )
    match = _PARAMETERS.search(macros()[f"reward_{mode}"])
    if match is None:
        raise AssertionError(f"reward_{mode}.sql does not open with create or replace macro")
    return [p.strip() for p in match.group(1).split(",")]


def _argument(spec: RewardSpec, parameter: str) -> str:
    if parameter == "info":
        return _INFO
    if parameter not in {f.name for f in fields(RewardSpec)}:
        return f"v.{quote_identifier(parameter)}"
    value = getattr(spec, parameter)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quote_literal(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(f'{w!r}::double' for w in value)}]::double[]"
    return f"{float(value)!r}::double"


def _require_weights(spec: RewardSpec) -> None:
    for f in fields(RewardSpec):
        value = getattr(spec, f.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
            raise UsageError(f"{f.name} is not a finite number", value=value)
    if spec.correctness_mode not in ("01", "pm1"):
        raise UsageError("correctness_mode is 01 or pm1", value=spec.correctness_mode)
    if not 0 <= spec.hybrid_alpha <= 1:
        raise UsageError("hybrid_alpha lies between 0 and 1", value=spec.hybrid_alpha)
    if spec.shot_weights and abs(sum(spec.shot_weights) - 1) > 1e-6:
        raise UsageError("shot weights must sum to 1", value=spec.shot_weights)
    if spec.shot_weights and spec.mode != "multi_shot":
        raise UsageError(
            f"the mode {spec.mode} has no shot weights",
            value=spec.shot_weights,
            hint="--reward-mode multi_shot",
        )


def prepare_reward(con: duckdb.DuckDBPyConnection, spec: RewardSpec) -> None:
    """Make ready what a mode reads besides the view; call it once per connection.

    ``hybrid`` looks up ``candidate_info`` for every row: as a view over several runs that takes
    minutes for 90,000 rows, as a table half a second.
    """
    if spec.expression is not None or spec.mode != "hybrid":
        return
    kind = "select 1 from duckdb_views() where view_name = 'candidate_info'"
    if con.execute(kind).fetchall():
        con.execute("create table new_candidate_info as from candidate_info")
        con.execute("drop view candidate_info")
        con.execute("alter table new_candidate_info rename to candidate_info")
