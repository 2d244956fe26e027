"""What is trained on: the selection, its split into training and validation, pools, embeddings.

In go a store and a config; out comes :class:`TrainingData`. The split and the shared pool come
from every stored candidate of the runs and places the views read, before view and filters, so that
ablations compare on the same questions. What takes a pass over the view is done once: its results
stand in the cache (``store/cache.py``) under the SQL, the runs and the options they depend on, and
the second training of the same opens at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
from jaxtyping import Float
from torch import Tensor

from lever_data.catalog import quote_literal
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import Place, load_items, require_same_questions
from lever_data.paths import cache_folder
from lever_data.relations.blocks import Blocks, open_blocks
from lever_data.relations.census import Census, census
from lever_data.relations.db import (
    Session,
    identity,
    open_session,
    quote_identifier,
)
from lever_data.relations.rewards import (
    prepare_reward,
    require_scores,
    reward_columns,
    reward_sql,
    with_todays_columns,
)
from lever_data.relations.snapshot import NoRoomError, Snapshot, open_snapshot
from lever_data.relations.stream import Selection
from lever_data.store.store import Store
from lever_train.inputs.check import Vectors, check_inputs, split_size
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pools import PoolSource, SharedPool, open_pools
from lever_train.inputs.provenance import Input, input_records
from lever_train.learn.split import (
    TRAIN,
    VALIDATION,
    base_relation,
    read_held_out,
    remembered,
    require_whole_rows,
    runs_read,
    split_options,
    split_queries,
)
from lever_train.options.train import DataConfig, Source, TrainConfig

if TYPE_CHECKING:
    from lever_train.inputs.pair_features import PairFeatures

READ = (
    *("runs", "queries", "examples", "embeddings", "stg_candidates", "stg_beams"),
    *("candidate_info", "own_pointers"),
)


@dataclass(frozen=True)
class TrainingData:
    """Everything the loop reads. ``provenance`` says where all of it came from, for the reader and
    for a resumed training to compare."""

    con: duckdb.DuckDBPyConnection
    train: Selection
    census: Census
    validation: Selection | None  # None: there is no validation
    validation_census: Census | None
    snapshot: Snapshot
    pools: PoolSource
    queries: Float[Tensor, "n d"]  # float32 on the CPU, as are the candidates
    candidates: Float[Tensor, "m d"]
    features: PairFeatures | None  # what the selector reads of pairs, where it reads some
    provenance: dict[str, Any]


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
    known = identity(con)
    selection = _selection(con, config, known)
    # [run, dataset, split] of all rows
    read: list[list[str | None]] = remembered(
        known, "read", data.view, lambda: runs_read(con, data.view)
    )
    runs = sorted({run for run, *_ in read if run is not None})
    base = base_relation(con, data.view, read)
    # the split, and what is counted by it, is another where other queries are held out
    halves = known + read_held_out(source, con, config)
    split = split_queries(con, base, config, halves)
    for view in data.view:
        if session.relations[view].folder == "user":
            whole = partial(require_whole_rows, con, view)
            remembered(halves, "whole rows", (*split_options(config), view), whole)
    _require_queries(split, data)
    train = replace(selection, queries=TRAIN)
    try:
        snapshot = open_snapshot(con, selection, known)
    except NoRoomError:
        snapshot = open_blocks(con, selection, known)
    counted = _census(con, snapshot, train, config, halves)
    validation = replace(selection, queries=VALIDATION) if split[1] else None
    held_out = None
    if validation is not None:
        held_out = _census(con, snapshot, validation, config, halves)
    counted = _with_own_pointers(con, counted, known)
    places = _require_trainable(counted, held_out, config)
    for place in counted.datasets:
        require_same_questions(con, *place)
    if held_out is not None and not held_out.rows:
        validation = None  # the filters left nothing of it; the notices say so
    pools = open_pools(con, data.pool, base, *places, known=known)
    _give_back()
    queries, candidates = _embeddings(source, con, config, places, pools, counted, held_out)
    features = _features(source, session, config, places, pools, queries, candidates)
    provenance = {
        "runs": runs,
        "views": _views_read(session, data.view),
        "reward": selection.reward,
        "places": ["/".join(place) for place in places],
        "rows": counted.rows,
        "groups": counted.groups,
        "queries": {"training": split[0], "validation": split[1]},
        "dropped": counted.dropped
        | {"queries_emptied": counted.emptied, "queries_without_right": split[2]},
        "inputs": _inputs(source, config),
        "pool": pools.describe(),
        "pool_sha256": pools.sha256(),
        "embeddings": [list(queries.shape), list(candidates.shape)],
    }
    if (shuffle := snapshot.shuffle(counted.rows)) is not None:
        provenance["shuffle"] = shuffle
    if features is not None:
        provenance |= {"pair_features": list(features.features), "features_run": features.run}
    vectors = queries, candidates
    return TrainingData(
        con, train, counted, validation, held_out, snapshot, pools, *vectors, features, provenance
    )


def _require_queries(split: tuple[int, int, int], data: DataConfig) -> None:
    """Refuse a split that leaves no query to train on, or holds none out that were named.

    Args:
        split: queries of training, of validation, and without a right candidate.

    Raises:
        UsageError: so it is; it names what the split was made by.
    """
    if data.held_out is not None and not split[1]:
        raise UsageError("the view holds no query of this training", where=data.held_out)
    if not split[0]:
        value = f"--split-ratio {data.split_ratio}"
        if data.held_out is not None:
            value = f"--held-out {data.held_out}"
        if split[2]:
            value = f"--require-positive-query: {split[2]:,} queries without a right candidate"
        raise UsageError("no query is left to train on", value=value)


def _give_back() -> None:
    """Let the system have what is free: at 20 million candidates glibc keeps 70 MB of what
    DuckDB's threads used."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def _features(
    source: Source,
    session: Session,
    config: TrainConfig,
    places: Sequence[tuple[str, str]],
    pools: PoolSource,
    queries: Tensor,
    candidates: Tensor,
) -> PairFeatures | None:
    """The pair features of all queries of the split, where the selector reads any.

    Raises:
        UsageError: there is one pool for all, or several splits: no pairs to compute them of.
    """
    names = config.model.pair_features
    if not names:
        return None
    if isinstance(pools, SharedPool) or len(places) > 1:
        raise UsageError(
            "pair features are of one split, with a pool of its own for every query",
            value=", ".join(names),
            hint="--pool FILE.npy gives every query one",
        )
    # its kernels of Arrow take 17 MB and 0.1 s of a training without features
    from lever_train.inputs.pair_features import Pairs, pair_features

    place, con = places[0], session.con
    rows = con.cursor().execute("select distinct query_id from split_queries order by 1").fetchall()
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    # what lies beside the runs that are trained on: items and vectors of the whole store
    wide = open_session(source.store, only=("examples", "queries", "embeddings")).con
    items = load_items(wide, Place(*place))
    pairs = Pairs(
        wide,
        (*place, place[1]),
        ids,
        pools.of(ids),
        queries[ids],
        candidates,
        [items[int(number)].question for number in ids],
        items,
    )
    return pair_features(Store.open(source.store), pairs, names, votes=config.model.votes)


def _inputs(source: Source, config: TrainConfig) -> list[Input]:
    """Every file that is read beside the store's runs, by its role."""
    data = config.data
    named = {
        "query embeddings": data.query_embeddings,
        "candidate embeddings": data.candidate_embeddings,
        "pool": data.pool,
        "checkpoint": config.model.sft_checkpoint,
    }
    return input_records(named, Store.open(source.store))


def _census(
    con: duckdb.DuckDBPyConnection,
    snapshot: Snapshot,
    selection: Selection,
    config: TrainConfig,
    known: str,
) -> Census:
    made_of = (*split_options(config), config.data.require_positive_query, selection)
    found = remembered(known, "census", made_of, lambda: asdict(census(con, snapshot, selection)))
    found |= {"datasets": tuple(map(tuple, found["datasets"]))}  # JSON has lists
    return Census(**found | {"scorers": tuple(found["scorers"])})


def _with_own_pointers(con: duckdb.DuckDBPyConnection, counted: Census, known: str) -> Census:
    """The census with the candidates that views left out because they show the query itself."""
    sql = "select count(*) from own_pointers where dataset = ? and split = ?"

    def count(place: tuple[str, str]) -> int:
        return int(con.cursor().execute(sql, list(place)).fetchall()[0][0])

    found = [remembered(known, "own pointers", p, partial(count, p)) for p in counted.datasets]
    return replace(counted, dropped=counted.dropped | {"own_pointer": sum(found)})


def _open_views(source: Source, config: TrainConfig) -> Session:
    """A connection with the views asked for and what training itself reads, no more: defining
    every relation takes longer than a small training's first epoch."""
    session = open_session(
        source.store,
        runs=source.runs,
        scorer=config.data.scorer,
        sql_dir=source.sql_dir,
        only=(*config.data.view, *READ),
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
        f"training on {counted.queries:,} queries of {', '.join(data.provenance['places'])}: "
        f"{counted.groups:,} groups of {counted.rows:,} candidates; {data.pools.describe()}"
    )
    left_out = [f"{n:,} {why}" for why, n in counted.dropped.items() if n]
    if left_out:
        yield f"left out: {', '.join(left_out)} candidates; {counted.emptied:,} queries emptied"
    if without := data.provenance["dropped"]["queries_without_right"]:
        yield f"{without:,} queries have no right candidate: left out, of training and validation"
    if counted.null_rewards:
        yield f"{counted.null_rewards:,} candidates have no score: it counts as 0"
    if isinstance(data.snapshot, Blocks):
        yield (
            f"{cache_folder()} has no room for what is trained on: it is read from the views in "
            "every epoch"
        )
    if shuffle := data.snapshot.shuffle(counted.rows):
        yield f"the groups of an epoch are shuffled among {shuffle}"
    held_out = data.validation_census
    if data.validation is None and held_out is not None:
        yield "the filters leave nothing of the validation queries: there is no validation"
    elif held_out is not None:
        yield f"validating on {held_out.queries:,} queries: {held_out.rows:,} candidates"


def _selection(con: duckdb.DuckDBPyConnection, config: TrainConfig, known: str) -> Selection:
    data = config.data
    if config.run.stage == "sft":  # the best beam is the one with the highest InfoScore
        return Selection(
            views=data.view,
            reward="v.info_score::double",
            gen_methods=data.gen_method,
            columns=("info_score",),
        )
    spec = with_todays_columns(con, data.view, config.reward)
    prepare_reward(con, spec)
    for view in data.view:
        scored = partial(require_scores, con, view, spec)
        remembered(known, "scores", (view, spec.model_dump_json()), scored)
    return Selection(
        views=data.view,
        reward=reward_sql(spec),
        gen_methods=data.gen_method,
        skip_fallback=data.skip_fallback,
        # a selector that ends its pointers itself compares them whatever their length
        merge_shots="shot_scores" in reward_columns(spec) or config.model.ends_pointers,
        columns=_accuracy_column(con, data.view),
    )


def _accuracy_column(con: duckdb.DuckDBPyConnection, views: Sequence[str]) -> tuple[str, ...]:
    """The stored accuracy, where every view has it: validation reports it."""
    for view in views:
        described = con.cursor().execute(f"describe {quote_identifier(view)}").fetchall()
        if "score" not in {row[0] for row in described}:
            return ()
    return ("score",)


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
    con: duckdb.DuckDBPyConnection,
    config: TrainConfig,
    places: Sequence[tuple[str, str]],
    pools: PoolSource,
    counted: Census,
    held_out: Census | None,
) -> tuple[Tensor, Tensor]:
    """The vectors, checked against the place of the queries; a name is looked up in every run of
    the store, not in the selected alone."""
    data = config.data
    if source.runs:
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
