"""How many queries a comparison needs, and what they cost, from answers that are stored.

In go an evaluation run, or a view of scored candidates; out comes a :class:`Plan`. Of an evaluation
the spread of the difference of two selectors is known; of candidates it is that of two selectors
that pick independently of each other, which is the most it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import duckdb
import numpy as np

from lever_data.catalog import quote_identifier, quote_literal
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import Session, open_session
from lever_data.report.options import PlanRequest
from lever_data.report.power import (
    Look,
    Spread,
    inflation,
    looks,
    queries_needed,
    smallest_difference,
    spread_of,
)
from lever_data.store.store import Run, Store

_INDEPENDENT = "two independent picks"


@dataclass(frozen=True)
class Comparison:
    """Two selectors and what telling them apart takes.

    ``deviation`` is σ of the paired difference in accuracy, ``design_effect`` what questions that
    share an image add to its variance; ``smallest``: the true difference that the ``n`` stored
    queries show with the power asked for; ``needed``: the queries that show the one asked for.
    """

    name: str
    shots: int | None
    n: int
    deviation: float
    design_effect: float
    smallest: float
    needed: int


@dataclass(frozen=True)
class Size:
    """What a number of queries shows and costs; ``tokens`` and ``cost`` where they were given."""

    queries: int
    smallest: float
    answers: int
    tokens: int | None
    cost: float | None


@dataclass(frozen=True)
class Noise:
    """Of pointers that one run of RL data holds answered more than once: how much of the spread
    within a query is the model's own wavering. Variances of the accuracy; ``within`` is null
    where no query has two candidates."""

    repeated: int
    variance: float | None
    within: float | None


@dataclass(frozen=True)
class Plan:
    """``sizes`` are of the comparison whose difference varies most, ``widest``; ``looks``: where an
    early stop is allowed; ``noise`` only of candidates."""

    source: str
    difference: float
    comparisons: tuple[Comparison, ...]
    widest: str
    sizes: tuple[Size, ...]
    looks: tuple[Look, ...]
    noise: Noise | None


def plan(store: Store, request: PlanRequest) -> Plan:
    """Plan a comparison like the stored one.

    Raises:
        UsageError: the source is neither an evaluation nor a view, or holds several places; a price
            without a number of tokens.
        LeverError: it holds too little to tell a spread from.
    """
    if request.cost.prices and request.cost.tokens is None:
        raise UsageError(
            "a price takes the tokens of an answer", hint="--prompt-tokens N --answer-tokens N"
        )
    bounds = looks([(k + 1) / request.looks for k in range(request.looks)], request.confidence)
    growth = inflation(bounds, power=request.power, confidence=request.confidence)
    session, run = _open(store, request)
    with session.con as con:
        spreads = _independent(con, request) if run is None else _paired(con, run)
        noise = _noise(con, request) if run is None else None
    found = tuple(_comparison(request, growth, *named) for named in spreads)
    if not found:
        raise LeverError(
            "there are no two selectors at one shot number to compare", where=request.source
        )
    widest = max(found, key=lambda comparison: comparison.deviation)
    sizes = tuple(_size(request, widest.deviation, growth, n) for n in request.queries)
    return Plan(
        request.source, request.difference, found, widest.name, sizes,
        tuple(bounds) if request.looks > 1 else (), noise,
    )  # fmt: skip


def _open(store: Store, request: PlanRequest) -> tuple[Session, Run | None]:
    """The relations, and the evaluation that the source names; None where it is a view."""
    runs = store.runs()
    session = open_session(
        store,
        runs=store.with_examples(request.runs),
        scorer=request.scorer,
        sql_dir=request.sql_dir,
        only=["stg_evaluations", "stg_candidates", "stg_runs", "query_images", request.source],
    )
    if request.source in session.relations:
        return session, None
    named = [run for run in runs if run.run.startswith(request.source)]
    exact = [run for run in named if run.run == request.source]
    found = exact or named
    if len(found) == 1 and found[0].kind == "evaluation":
        return session, found[0]
    session.con.close()
    if found:
        what = "several runs begin like this" if len(found) > 1 else "that run is not an evaluation"
        raise UsageError(what, value=request.source, hint="`lever runs --kind evaluation`")
    hint = open_session(store, sql_dir=request.sql_dir).explain_missing(request.source).hint
    raise UsageError(
        "there is neither an evaluation nor a view of this name", value=request.source, hint=hint
    )


_Named = tuple[str, int | None, Spread]


def _paired(con: duckdb.DuckDBPyConnection, run: Run) -> list[_Named]:
    """The spread between every two selectors of an evaluation at equal shots."""
    rows = con.execute(_EVALUATED, [run.run]).fetchnumpy()
    if not len(rows["shots"]):
        raise LeverError("the evaluation holds no answer that was scored", where=run.run)
    selectors, codes = np.unique(rows["selector"].astype(str), return_inverse=True)
    queries = int(rows["query"].max()) + 1
    images = np.zeros(queries, np.int64)
    images[rows["query"]] = rows["image"]
    found: list[_Named] = []
    for shots in np.unique(rows["shots"]):
        accuracy = np.full((len(selectors), queries), np.nan)
        here = rows["shots"] == shots
        accuracy[codes[here], rows["query"][here]] = rows["accuracy"][here]
        for a, b in combinations(range(len(selectors)), 2):
            apart = accuracy[a] - accuracy[b]
            both = ~np.isnan(apart)
            if both.sum() > 1 and len(np.unique(images[both])) > 1:
                name = f"{selectors[a]} and {selectors[b]}"
                found.append((name, int(shots), spread_of(apart[both], images[both])))
    return found


# queries and images numbered from 0; a query without an image is one of its own
_EVALUATED = """
    select
        e.selector,
        e.shots,
        e.accuracy,
        dense_rank() over (order by e.dataset, e.split, e.query_id) - 1 as query,
        dense_rank() over (order by i.image_id is null, coalesce(i.image_id, e.query_id::varchar))
            - 1 as image
    from stg_evaluations as e
    left join query_images as i using (dataset, split, query_id)
    where e.run = ? and e.accuracy is not null
"""


def _independent(con: duckdb.DuckDBPyConnection, request: PlanRequest) -> list[_Named]:
    """The spread between two picks at random among a query's candidates: twice their variance.

    Two picks of one query share its image, and nothing else: their difference is 0 on average
    whatever the query, so that queries on one image add nothing.
    """
    columns = [row[0] for row in con.execute(f"describe {_source(request)}").fetchall()]
    if missing := {"dataset", "split", "query_id", "score"} - set(columns):
        raise LeverError(
            "the view cannot be planned from: it has no column " + ", ".join(sorted(missing)),
            where=request.source,
        )
    places = con.execute(
        f"select distinct dataset, split from {_source(request)} order by all"
    ).fetchall()
    if len(places) > 1:
        raise UsageError(
            "the view holds several places: a plan is for one",
            where=request.source,
            value=", ".join(f"{dataset}/{split}" for dataset, split in places),
            hint="--dataset NAME --split NAME",
        )
    if "scorer" in columns:
        _require_one_scorer(con, request)
    variance, n = con.execute(_WITHIN.format(source=_source(request))).fetchall()[0]
    if not n:
        raise LeverError(
            "no query has two scored candidates: nothing tells how much a pick matters",
            where=request.source,
        )
    return [(_INDEPENDENT, None, Spread(sqrt(2 * variance), 1.0, n))]


def _require_one_scorer(con: duckdb.DuckDBPyConnection, request: PlanRequest) -> None:
    named = f"select distinct scorer from {_source(request)} where scorer is not null order by all"
    scorers = [scorer for (scorer,) in con.execute(named).fetchall()]
    if len(scorers) > 1:
        raise UsageError(
            "the view holds answers of several models: what they differ by is not a selector's",
            where=request.source,
            value=", ".join(scorers),
            hint="--scorer MODEL",
        )


_WITHIN = """
    select avg(variance), count(variance)
    from (
        select var_samp(score) as variance
        from {source}
        where score is not null
        group by dataset, split, query_id
    )
"""


def _source(request: PlanRequest) -> str:
    """The view, of the place asked for."""
    chosen = {"dataset": request.dataset, "split": request.split}
    where = " and ".join(f"{k} = {quote_literal(v)}" for k, v in chosen.items() if v is not None)
    return f"(from {quote_identifier(request.source)} where {where or 'true'})"


def _noise(con: duckdb.DuckDBPyConnection, request: PlanRequest) -> Noise:
    """How far answers of one model to one prompt lie apart: pointers of RL data answered more than
    once. What lever asked is not a sample of that: it asks once, and stores the answer again."""
    names = ("dataset", "split", "scorer")
    given = [getattr(request, name) for name in names]
    repeated, variance = con.execute(_REPEATED, given).fetchall()[0]
    within, _ = con.execute(_WITHIN.format(source=_source(request))).fetchall()[0]
    return Noise(repeated, variance, within)


# within one run: files of RL data often hold one another's rows, for which nobody asked again
_REPEATED = """
    select count(variance), avg(variance)
    from (
        select var_samp(score) as variance
        from stg_candidates
        semi join (select run from stg_runs where kind = 'rl_data') using (run)
        where
            score is not null
            and scorer is not null
            and dataset = coalesce($1, dataset)
            and split = coalesce($2, split)
            and scorer = coalesce($3, scorer)
        group by run, dataset, split, query_id, pointer, scorer, metric
    )
"""


def _comparison(
    request: PlanRequest, growth: float, name: str, shots: int | None, spread: Spread
) -> Comparison:
    shown = smallest_difference(
        spread.deviation, spread.n, power=request.power, confidence=request.confidence,
        inflation=growth,
    )  # fmt: skip
    needed = queries_needed(
        spread.deviation, request.difference, power=request.power, confidence=request.confidence,
        inflation=growth,
    )  # fmt: skip
    return Comparison(name, shots, spread.n, spread.deviation, spread.design_effect, shown, needed)


def _size(request: PlanRequest, deviation: float, growth: float, queries: int) -> Size:
    cost = request.cost
    answers = queries * cost.answers_per_query
    smallest = smallest_difference(
        deviation, queries, power=request.power, confidence=request.confidence, inflation=growth
    )
    if cost.tokens is None:
        return Size(queries, smallest, answers, None, None)
    asked, told = cost.tokens
    money = None
    if cost.prices is not None:
        money = answers * (asked * cost.prices[0] + told * cost.prices[1]) / 1e6
    return Size(queries, smallest, answers, answers * (asked + told), money)
