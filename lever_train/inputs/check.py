"""Whether what a command was given belongs to its queries: the one check of every command.

In goes the place of the queries, a (dataset, split), with the vectors, pools and checkpoints named
for it; out comes nothing, or the error that says which input is of another place. A row of the
query embeddings and of a pool file is a query id, a row of the candidate embeddings an example id:
so the number of rows tells splits apart, as soon as the store or a question file knows their size.
Nothing here reads a vector: whoever plans a command checks from the files' headers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import duckdb
from torch import Tensor

from lever_data.errors import LeverError
from lever_train.inputs.pools import FilePool, PoolSource

OF_THIS_SPLIT = "give those of this split; row = index of the question in it"


class Vectors(NamedTuple):
    """Embeddings as errors name them: the file or the name in the store, rows and width."""

    name: str
    rows: int
    width: int

    @classmethod
    def of(cls, name: str | None, table: Tensor) -> Vectors:
        """Those of a table [n, d] and what the user called it."""
        return cls(name or "the embeddings", *table.shape)


def split_size(con: duckdb.DuckDBPyConnection, dataset: str, split: str) -> int | None:
    """Items of a split as far as the store holds its questions; ``None`` where it holds none."""
    sql = "select max(example_id) + 1 from examples where dataset = ? and split = ?"
    size: int | None = con.cursor().execute(sql, [dataset, split]).fetchall()[0][0]
    return size


def check_inputs(
    queries: Vectors,
    candidates: Vectors,
    *,
    split: str,
    size: int | None,
    last_query: int,
    candidate_size: int | None = None,
    pool: PoolSource | None = None,
    checkpoints: Mapping[str, int] | None = None,
) -> None:
    """Refuse inputs that do not belong together, before any work.

    Args:
        split: the queries', as the errors name it.
        size: questions in that split, candidates in theirs; ``None`` where nothing tells.
        last_query: the largest query id that will be read; -1 without any.
        pool: where candidates are looked up; ``None`` where nobody looks.
        checkpoints: the width of the embeddings that each takes, by its name.

    Raises:
        LeverError: a width, a number of rows or an id does not fit; it names both values.
    """
    if queries.width != candidates.width:
        raise LeverError(
            "query and candidate embeddings have different widths",
            where=f"{queries.name} and {candidates.name}",
            value=f"{queries.width} and {candidates.width}",
        )
    require_width(queries, checkpoints or {})
    if last_query >= queries.rows:
        raise LeverError(
            f"the query embeddings have {queries.rows:,} rows, none for a query",
            where=f"{queries.name}, query {last_query}",
            hint=OF_THIS_SPLIT,
        )
    _require_size("the query embeddings have", queries.rows, size, split, queries.name)
    if candidate_size is not None and candidates.rows != candidate_size:
        raise LeverError(
            f"the candidate embeddings have {candidates.rows:,} rows, the split of the "
            f"demonstrations has {candidate_size:,} items",
            where=candidates.name,
            hint="give those of the demonstrations' split; row = index of the item in it",
        )
    if pool is None:
        return
    if isinstance(pool, FilePool):
        pool.require_row(last_query)
        _require_size(f"the pool file {pool.path} has", pool.rows, size, split, pool.path)
    if (last := pool.last_id()) >= candidates.rows:
        raise LeverError(
            f"the candidate embeddings have {candidates.rows:,} rows, none for example {last}",
            where=f"{candidates.name}; {pool.describe()}",
            hint="a pool holds ids of examples: are the embeddings those of the same split?",
        )


def require_width(queries: Vectors, checkpoints: Mapping[str, int]) -> None:
    """Refuse checkpoints, by name, that take embeddings of another width.

    Raises:
        LeverError: it names both widths.
    """
    for name, width in checkpoints.items():
        if width != queries.width:
            raise LeverError(
                f"the checkpoint takes embeddings of width {width}, the embeddings have "
                f"{queries.width}",
                where=f"{name} and {queries.name}",
                hint="give the embeddings it was trained with",
            )


def _require_size(what: str, rows: int, size: int | None, split: str, where: str) -> None:
    if size is not None and rows != size:
        raise LeverError(
            f"{what} {rows:,} rows, the split {split} has {size:,} questions",
            where=where,
            hint=OF_THIS_SPLIT,
        )
