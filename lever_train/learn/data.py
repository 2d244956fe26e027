"""What is trained on: the selection, its split into training and validation, pools, embeddings.

In go a store and a config; out comes :class:`TrainingData`. The split and the shared pool come
from the selected runs before view and filters, so that ablations compare on the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
from torch import Tensor

from lever_data.catalog import quote_literal
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import Session, open_session, quote_identifier
from lever_data.relations.rewards import (
    prepare_reward,
    require_scores,
    reward_columns,
    reward_sql,
)
from lever_data.relations.selection import Census, Selection, census
from lever_train.inputs.check import Vectors, check_inputs, split_size
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
    train = replace(selection, queries=TRAIN)
    counted = census(con, train)
    validation = replace(selection, queries=VALIDATION) if split[1] else None
    held_out = census(con, validation) if validation is not None else None
    places = _require_trainable(counted, held_out, config)
    if held_out is not None and not held_out.rows:
        validation = None  # the filters left nothing of it; the notices say so
    pools = open_pools(con, data.pool, base, *places)
    queries, candidates = _embeddings(source, config, places, pools, counted, held_out)
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


def _selection(con: duckdb.DuckDBPyConnection, config: TrainConfig) -> Selection:
    data = config.data
    if config.run.stage == "sft":  # the best beam is the one with the highest InfoScore
        return Selection(
            views=data.view,
            reward="v.info_score::double",
            gen_methods=data.gen_method,
            columns=("info_score",),
        )
    spec = config.reward
    prepare_reward(con, spec)
    for view in data.view:
        require_scores(con, view, spec)
    return Selection(
        views=data.view,
        reward=reward_sql(spec),
        gen_methods=data.gen_method,
        skip_fallback=data.skip_fallback,
        merge_shots="shot_scores" in reward_columns(spec),
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


def _require_trainable(
    counted: Census, held_out: Census | None, config: TrainConfig
) -> list[tuple[str, str]]:
    """Refuse what cannot be trained on; returns the (dataset, split) of all queries.

    Training and validation queries count alike: a selector trained on one split and judged on
    another, or by another model's scores, would be a wrong figure without a word.
    """
    views = ", ".join(config.data.view)
    if not counted.rows:
        reasons = ", ".join(f"{n:,} {why}" for why, n in counted.dropped.items() if n)
        raise LeverError(
            "the view holds no rows to train on",
            where=views,
            value=reasons or None,
            hint="`lever views` counts every view; check --gen-method, --skip-fallback and --run",
        )
    parts = [counted] if held_out is None else [counted, held_out]
    places = sorted({place for part in parts for place in part.datasets})
    if len(places) > 1 and not config.data.allow_mixed:
        raise UsageError(
            "the selection mixes datasets or splits, whose query ids mean different things",
            where=views,
            value=", ".join(f"{d}/{s}" for d, s in places),
            hint="choose runs with --run, or pass --allow-mixed",
        )
    scorers = sorted({scorer for part in parts for scorer in part.scorers})
    if len(scorers) > 1:
        raise UsageError(
            "the selection holds scores of several models",
            where=views,
            value=", ".join(scorers),
            hint=f"choose one: --scorer {quote_literal(scorers[0])}",
        )
    if config.run.stage == "sft" and counted.null_rewards == counted.rows:
        raise LeverError("info_score is null in every row", where=views)
    return places


def _embeddings(
    source: Source,
    config: TrainConfig,
    places: Sequence[tuple[str, str]],
    pools: PoolSource,
    counted: Census,
    held_out: Census | None,
) -> tuple[Tensor, Tensor]:
    """The vectors, checked against the place of the queries; a name is looked up in every run of
    the store, not in the selected alone."""
    data = config.data
    con = open_session(source.store, only=("embeddings", "examples")).con
    if data.query_embeddings is None:
        raise UsageError("no embeddings are named", hint="--query-embeddings FILE")
    queries = candidates = load_embeddings(data.query_embeddings, con, places[0])
    name = data.candidate_embeddings or data.query_embeddings
    if data.candidate_embeddings is not None:
        candidates = load_embeddings(name, con, places[0])
    last = max(part.last_query for part in (counted, held_out) if part is not None)
    check_inputs(
        Vectors.of(data.query_embeddings, queries),
        Vectors.of(name, candidates),
        split=places[0][1],
        # of a mix nobody knows whose rows these are
        size=split_size(con, *places[0]) if len(places) == 1 else None,
        last_query=last,
        pool=pools,
    )
    return queries, candidates
