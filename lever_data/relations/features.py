"""Features of pairs: one ``sql/features/NAME.sql`` each, computed over pools, free of leaks.

In go the pairs of some queries and the candidates of their pools; out come numbers, one column a
value. A feature is a SELECT that gives ``query, place`` and one or more values for every pair; it
reads two relations and nothing else:

    pool_pairs    query, place, similarity, answer, and cosine__Q__C of any two vector spaces Q of
                  the query and C of the candidate
    pool_answers  query, place, answer, share of the candidate's annotators who gave it

A query is a number of the moment and a candidate its place, so that no feature can find its own
query among the candidates of others; the answers of the query itself, and of candidates that ask
the same question in the same split, are null (``lever_train.inputs.pair_features``). And what a
feature says of a query must depend on that query's pool alone: it is computed again for some
queries by themselves, and refused where that gives other values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from lever_data import catalog
from lever_data.catalog import Relation, body
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import require_select

PAIRS, ANSWERS = "pool_pairs", "pool_answers"
DECIMALS = 6  # sums of doubles differ in their last digits between machines
_ALONE = 5  # queries that are computed again by themselves
_COSINE = re.compile(r"\bcosine__(\w+?)__(\w+)\b")

Floats = np.ndarray


def find_features(names: Sequence[str], store: Path) -> list[Relation]:
    """The features of these names: lever's own, or files in ``<store>/features``.

    A name may say the digest of its SQL, ``vote@1b2c3d4e5f60``, as checkpoints do.

    Raises:
        UsageError: there is no such feature, or two files of the name.
        LeverError: the SQL is another than the digest says.
    """
    own = {path.stem: path for path in sorted((store / "features").glob("*.sql"))}
    known, found = catalog.features(), []
    for text in dict.fromkeys(names):
        name, _, digest = text.partition("@")
        if name in known and name in own:
            raise UsageError("lever has a feature of this name", value=str(own[name]))
        if name not in known and name not in own:
            listed = ", ".join(sorted({*known, *own}))
            raise UsageError("there is no such feature", value=name, hint=f"there are {listed}")
        if name in known:
            found.append(known[name])
        else:
            found.append(catalog.parse(name, "features", own[name].read_text("utf-8")))
        if digest and sha256(found[-1]) != digest:
            raise LeverError(
                "the feature is not the one that the selector was trained with",
                where=f"{name}.sql",
                value=f"{sha256(found[-1])}, not {digest}",
                hint="put the file back as it was, or train again",
            )
    return found


def sha256(feature: Relation) -> str:
    """12 digits of the digest of its SQL."""
    return hashlib.sha256(feature.sql.encode()).hexdigest()[:12]


def cosines_read(features: Sequence[Relation]) -> list[tuple[str, str]]:
    """The vector spaces (of the query, of the candidate) whose cosines the features read."""
    found = (pair for f in features for pair in _COSINE.findall(catalog.without_comments(f.sql)))
    return sorted(set(found))


def reads_answers(features: Sequence[Relation]) -> bool:
    """Whether any of them reads ``pool_answers``."""
    return any(ANSWERS in catalog.without_comments(f.sql) for f in features)


def compute(
    features: Sequence[Relation], tables: Mapping[str, pa.Table], *, alone: bool = True
) -> tuple[list[str], Floats]:
    """The names of all values, and the values [R, F] float32 of the R rows of ``pool_pairs``.

    Args:
        tables: ``pool_pairs``, sorted by query and place, and ``pool_answers``, sorted likewise.
        alone: compute some queries again by themselves, and compare.

    Raises:
        LeverError: a feature reads anything else, leaves out a pair, gives one twice, gives no
            number, or depends on other queries.
    """
    con = duckdb.connect()
    con.execute("set enable_external_access = false")
    con.execute("set threads = 1")  # the same sums whatever the machine
    names, values = _run(con, features, tables)
    query = tables[PAIRS]["query"].to_numpy()
    every = np.unique(query)
    for one in every[:: max(1, len(every) // _ALONE)][: _ALONE * alone]:
        apart = {name: _only(table, int(one)) for name, table in tables.items()}
        _, again = _run(con, features, apart)
        if not np.allclose(again, values[query == one], atol=10.0**-DECIMALS):
            column = int(np.argmax(np.abs(again - values[query == one]).max(0)))
            raise LeverError(
                "a feature of a query depends on other queries",
                where=names[column],
                hint="partition by query, join on query: it may read the query's own pool alone",
            )
    con.close()
    return names, values


def _only(table: pa.Table, query: int) -> pa.Table:
    rows = table["query"].to_numpy()
    low, high = np.searchsorted(rows, [query, query + 1])
    return table.slice(int(low), int(high - low))


def _run(
    con: duckdb.DuckDBPyConnection, features: Sequence[Relation], tables: Mapping[str, pa.Table]
) -> tuple[list[str], Floats]:
    for name, table in tables.items():
        con.register(name, table)
    pairs = tables[PAIRS]
    keys = _keys(pairs["query"].to_numpy(), pairs["place"].to_numpy())
    names: list[str] = []
    columns: list[Floats] = []
    for feature in features:
        found = _select(con, feature)
        at = _keys(found["query"], found["place"])
        order = np.argsort(at, kind="stable")
        if not np.array_equal(at[order], keys):
            raise LeverError(
                "a feature gives one row for every pair of query and place, no more and no less",
                where=feature.name,
                value=f"{len(at):,} rows for {len(keys):,} pairs",
            )
        for name in found:
            if name in ("query", "place"):
                continue
            column = np.ma.filled(found[name].astype(np.float64), np.nan)[order]
            if not np.isfinite(column).all():
                raise LeverError(
                    "a feature is null or not finite for a pair",
                    where=f"{feature.name}: {name}",
                    hint="coalesce in its SQL says what such a pair counts as",
                )
            names.append(name)
            columns.append(column.round(DECIMALS).astype(np.float32))
    if len(set(names)) < len(names):
        raise LeverError("two features give a value of one name", value=", ".join(names))
    return names, np.stack(columns, axis=1)


def _keys(query: Floats, place: Floats) -> Floats:
    return query.astype(np.int64) * (1 << 32) + place.astype(np.int64)


def _select(con: duckdb.DuckDBPyConnection, feature: Relation) -> dict[str, Floats]:
    try:
        sql = require_select(con, body(feature))
        found = con.execute(sql).fetchnumpy()
    except duckdb.Error as error:
        raise LeverError(
            f"the feature cannot be computed ({str(error).splitlines()[0]})",
            where=feature.name,
            hint=f"a feature reads {PAIRS} and {ANSWERS} alone; docs/features.md says what they "
            "hold",
        ) from None
    if not {"query", "place"} < found.keys():
        raise LeverError(
            "a feature gives query, place and its values", where=feature.name, value=list(found)
        )
    return found
