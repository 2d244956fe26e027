"""What is trained on: the selection, its split into training and validation, pools, embeddings.

In go a store and a config; out comes :class:`TrainingData`. The split and the shared pool come
from the selected runs before view and filters, so that ablations compare on the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
from torch import Tensor

from lever_data.catalog import quote_literal
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import Session, open_session, quote_identifier
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import prepare_reward, require_scores, reward_sql
from lever_data.relations.selection import Census, Selection, census
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pools import PoolSource, open_pools
from lever_train.learn.split import (
    TRAIN,
    VALIDATION,
    base_relation,
    require_whole_rows,
    runs_read,
    split_queries,
)
from lever_train.options.train import TrainConfig

_READ = ("runs", "queries", "stg_candidates", "stg_beams", "candidate_info")


@dataclass(frozen=True)
class Source:
    """Where the data is: a store, some of its runs (all where empty), a folder of views."""

    store: Path
    runs: tuple[str, ...] = ()
    sql_dir: Path | None = None


@dataclass(frozen=True)
class TrainingData:
    """Everything the loop reads.

    ``queries`` [n, d] and ``candidates`` [m, d] float32 on the CPU. ``validation`` is ``None``
    where there is none. ``provenance`` says where all of it came from, for the reader and for a
    resumed training to compare.
    """

    con: duckdb.DuckDBPyConnection
    train: Selection
    census: Census
    validation: Selection | None
    validation_census: Census | None
    pools: PoolSource
    queries: Tensor
    candidates: Tensor
    provenance: dict[str, object]


def open_data(source: Source, config: TrainConfig) -> TrainingData:
    """Select, split and load.

    Raises:
        LeverError: nothing to train on, a column missing or empty, several scorers, embeddings of
            different widths.
        UsageError: an unknown view, or several datasets or splits without ``allow_mixed``.
    """
    data = config.data
    session = _open_views(source, config)
    con = session.con
    selection = _selection(con, config)
    base = base_relation(con, data.view)
    split = split_queries(con, base, config)
    for view in data.view:
        if session.relations[view].folder == "user":
            require_whole_rows(con, view)
    train = _limited(selection, TRAIN)
    counted = census(con, train)
    _require_trainable(counted, config)
    validation = _limited(selection, VALIDATION) if split[1] else None
    held_out = census(con, validation) if validation is not None else None
    if held_out is not None and not held_out.rows:
        validation = None  # the filters left nothing of it; the notices say so
    queries, candidates = _embeddings(source, config, counted)
    _require_row(queries, config, max(c.last_query for c in (counted, held_out) if c is not None))
    pools = open_pools(con, data.pool, base)
    provenance = {
        "places": ["/".join(place) for place in counted.datasets],
        "runs": runs_read(con, data.view),
        "views": _views_read(session, data.view),
        "reward": selection.reward,
        "rows": counted.rows,
        "groups": counted.groups,
        "queries": {"training": split[0], "validation": split[1]},
        "dropped": counted.dropped | {"queries_emptied": counted.emptied},
        "pool": pools.describe(),
        "pool_sha256": pools.sha256(),
        "embeddings": [list(queries.shape), list(candidates.shape)],
    }
    return TrainingData(
        con, train, counted, validation, held_out, pools, queries, candidates, provenance
    )


def _open_views(source: Source, config: TrainConfig) -> Session:
    """A connection with the views asked for and what training itself reads, no more: defining
    every relation takes longer than a small training's first epoch."""
    wanted = (*config.data.view, *_READ)
    session = open_session(
        source.store,
        runs=source.runs,
        scorer=config.data.scorer,
        sql_dir=source.sql_dir,
        only=wanted,
    )
    for view in config.data.view:
        if view not in session.relations:
            every = open_session(source.store, runs=source.runs, sql_dir=source.sql_dir)
            raise every.explain_missing(view)
    session.con.execute("set memory_limit = ?", [config.run.memory_limit])
    return session


def describe_data(data: TrainingData) -> Iterator[str]:
    """Lines that say what is trained on and what was left out."""
    counted = data.census
    yield (
        f"training on {counted.queries:,} queries: {counted.groups:,} groups of "
        f"{counted.rows:,} candidates; {data.pools.describe()}"
    )
    left_out = [f"{n:,} {why}" for why, n in counted.dropped.items() if n]
    if left_out:
        yield f"left out: {', '.join(left_out)} candidates; {counted.emptied:,} queries emptied"
    if counted.null_rewards:
        yield f"{counted.null_rewards:,} candidates have no score: it counts as 0"
    held_out = data.validation_census
    if data.validation is None and held_out is not None:
        yield "the filters leave nothing of the validation queries: there is no validation"
    elif held_out is not None:
        yield f"validating on {held_out.queries:,} queries: {held_out.rows:,} candidates"


def reward_spec(config: TrainConfig) -> RewardSpec:
    """The reward the config asks for."""
    reward = config.reward
    return RewardSpec(
        mode=reward.mode,
        hard_weight=reward.hard_weight,
        soft_weight=reward.soft_weight,
        rel_weight=reward.rel_weight,
        hybrid_alpha=reward.hybrid_alpha,
        reward_alpha=reward.alpha,
        reward_beta=reward.beta,
        correctness_mode=reward.correctness_mode,
        use_logprob=reward.use_logprob,
        shot_weights=reward.shot_weights,
        expression=reward.expression,
    )


def _selection(con: duckdb.DuckDBPyConnection, config: TrainConfig) -> Selection:
    data = config.data
    if config.run.stage == "sft":  # the best beam is the one with the highest InfoScore
        return Selection(
            views=data.view,
            reward="v.info_score::double",
            gen_methods=data.gen_method,
            columns=("info_score",),
        )
    spec = reward_spec(config)
    prepare_reward(con, spec)
    for view in data.view:
        require_scores(con, view, spec)
    return Selection(
        views=data.view,
        reward=reward_sql(spec),
        gen_methods=data.gen_method,
        skip_fallback=data.skip_fallback,
        merge_shots=spec.mode == "multi_shot" and spec.expression is None,
        columns=_accuracy_column(con, data.view),
    )


def _accuracy_column(con: duckdb.DuckDBPyConnection, views: Sequence[str]) -> tuple[str, ...]:
    """The stored VQA accuracy, where every view has it: validation reports it."""
    for view in views:
        described = con.cursor().execute(f"describe {quote_identifier(view)}").fetchall()
        if "vqa_acc_score" not in {row[0] for row in described}:
            return ()
    return ("vqa_acc_score",)


def _views_read(session: Session, views: Sequence[str]) -> dict[str, str]:
    """The SQL of the views, and of the user's own that they read, however far below."""
    return {
        name: relation.sql
        for name, relation in sorted(session.relations.items())
        if name in views or relation.folder == "user"
    }


def _limited(selection: Selection, queries: str) -> Selection:
    return Selection(**{**vars(selection), "queries": queries})


def _require_trainable(counted: Census, config: TrainConfig) -> None:
    views = ", ".join(config.data.view)
    if not counted.rows:
        reasons = ", ".join(f"{n:,} {why}" for why, n in counted.dropped.items() if n)
        raise LeverError(
            "the view holds no rows to train on",
            where=views,
            value=reasons or None,
            hint="`lever views` counts every view; check --gen-method, --skip-fallback and --run",
        )
    if len(counted.datasets) > 1 and not config.data.allow_mixed:
        raise UsageError(
            "the selection mixes datasets or splits, whose query ids mean different things",
            where=views,
            value=", ".join(f"{d}/{s}" for d, s in counted.datasets),
            hint="choose runs with --run, or pass --allow-mixed",
        )
    if len(counted.scorers) > 1:
        raise UsageError(
            "the selection holds scores of several models",
            where=views,
            value=", ".join(counted.scorers),
            hint=f"choose one: --scorer {quote_literal(counted.scorers[0])}",
        )
    if config.run.stage == "sft" and counted.null_rewards == counted.rows:
        raise LeverError("info_score is null in every row", where=views)


def _require_row(queries: Tensor, config: TrainConfig, last: int) -> None:
    """Every query has its row: known before anything is written, not at the batch that lacks it."""
    if last >= len(queries):
        raise LeverError(
            f"the query embeddings have {len(queries):,} rows, none for a query",
            where=f"{config.data.query_embeddings}, query {last}",
            hint="row = query id; are they those of another split?",
        )


def _embeddings(source: Source, config: TrainConfig, counted: Census) -> tuple[Tensor, Tensor]:
    """The vectors; a name is looked up in every run of the store, not in the selected alone."""
    data, prefer = config.data, counted.datasets[0]
    con = open_session(source.store, only=("embeddings",)).con
    if data.query_embeddings is None:
        raise UsageError("no embeddings are named", hint="--query-embeddings FILE")
    queries = load_embeddings(data.query_embeddings, con, prefer)
    if data.candidate_embeddings is None:
        return queries, queries
    candidates = load_embeddings(data.candidate_embeddings, con, prefer)
    if queries.shape[1] != candidates.shape[1]:
        raise LeverError(
            "query and candidate embeddings have different widths",
            where=f"{data.query_embeddings} and {data.candidate_embeddings}",
            value=f"{queries.shape[1]} and {candidates.shape[1]}",
        )
    return queries, candidates
