"""Queries to evaluate on: their items, truths, embeddings and pools, and the examples to show.

In go a store, a (dataset, split) and the files beside it; out comes a :class:`HeldOut`. The
demonstrations are the items of another split, ``train`` as a rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np

from lever_data.errors import LeverError, UsageError
from lever_train.embeddings import load_embeddings
from lever_train.pools import SharedPool, open_pools
from lever_train.rollout.items import Place, Truth, load_items, load_truth
from lever_train.rollout.official import Official, load_official
from lever_train.rollout.prompts import Item
from lever_train.rollout.proposals import Ask


@dataclass(frozen=True)
class Request:
    """What to evaluate on.

    ``split`` holds the queries, ``candidate_split`` the demonstrations. Embeddings are files or
    names in the store. ``pool``: a file [n, K], row = query id; without it the store's pools, and
    without those every example is in every pool. ``questions`` and ``annotations``: the official
    files of ``split``; without them the examples table must hold the annotators' answers.
    """

    dataset: str
    split: str
    query_embeddings: str
    candidate_embeddings: str | None = None
    candidate_split: str = "train"
    pool: str | None = None
    questions: Path | None = None
    annotations: Path | None = None
    image_root: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """n queries, in the order of their ids.

    ``ask``: their ids, embeddings and pools. ``queries`` and ``truths``: n items and what their
    answers are compared with. ``examples``: the demonstrations by example id.
    """

    dataset: str
    split: str
    ask: Ask
    queries: tuple[Item, ...]
    truths: tuple[Truth, ...]
    examples: Mapping[int, Item]

    def __len__(self) -> int:
        return len(self.queries)


def open_held_out(con: duckdb.DuckDBPyConnection, request: Request) -> HeldOut:
    """Load everything an evaluation reads.

    Raises:
        LeverError: items, answers, embeddings or pools are missing; it names the query.
        UsageError: only one of the official files is given.
    """
    place = Place(request.dataset, request.split, request.image_root)
    official = _official(request)
    items = load_items(con, place, official)
    if request.limit is not None:
        items = {number: items[number] for number in sorted(items)[: request.limit]}
    own = request.candidate_split == request.split
    source = Place(request.dataset, request.candidate_split, request.image_root)
    examples = load_items(con, source, official if own else None)
    truths = load_truths(items, official)
    numbers = np.array(sorted(items), dtype=np.int64)
    return HeldOut(
        request.dataset,
        request.split,
        _ask(con, request, numbers, examples),
        tuple(items[int(i)] for i in numbers),
        tuple(truths[int(i)] for i in numbers),
        examples,
    )


def load_truths(items: Mapping[int, Item], official: Official | None) -> dict[int, Truth]:
    """What the queries' answers are compared with: the official files, else the stored answers.

    Raises:
        LeverError: a query has no annotators' answers.
    """
    if official is not None:
        return load_truth(items, official, allow_fallback=False)
    lacking = [number for number, item in items.items() if not item.answers]
    if lacking:
        raise LeverError(
            f"{len(lacking):,} of {len(items):,} queries have no annotators' answers",
            where=f"query {lacking[0]}",
            hint="give --questions and --annotations, or ingest both files into the store",
        )
    return {
        number: Truth(item.answers, True, tuple(sorted(set(item.answers))))
        for number, item in items.items()
    }


def _official(request: Request) -> Official | None:
    if (request.questions is None) != (request.annotations is None):
        raise UsageError("--questions and --annotations belong together: give both or neither")
    if request.questions is None or request.annotations is None:
        return None
    return load_official(request.questions, request.annotations)


def _ask(
    con: duckdb.DuckDBPyConnection,
    request: Request,
    numbers: np.ndarray,
    examples: Mapping[int, Item],
) -> Ask:
    queries = load_embeddings(request.query_embeddings, con)
    own = request.candidate_split == request.split
    if request.candidate_embeddings is not None:
        table = load_embeddings(request.candidate_embeddings, con)
    elif own:
        table = queries
    else:
        raise UsageError(
            f"the demonstrations are of another split ({request.candidate_split}) and need "
            "embeddings of their own",
            hint="--candidate-embeddings FILE",
        )
    if queries.shape[1] != table.shape[1]:
        raise LeverError(
            "query and candidate embeddings differ in width",
            value=f"{queries.shape[1]} and {table.shape[1]}",
        )
    _require_rows(numbers, len(queries), "the query embeddings")
    _require_rows(np.array(sorted(examples)), len(table), "the candidate embeddings")
    return Ask(numbers, queries[numbers], table, _pool(con, request, numbers, examples), own)


def _pool(
    con: duckdb.DuckDBPyConnection,
    request: Request,
    numbers: np.ndarray,
    examples: Mapping[int, Item],
) -> np.ndarray:
    """Example ids [n, K], or [K] where all queries share one pool."""
    if request.pool is None and request.candidate_split != request.split:
        return np.array(sorted(examples), dtype=np.int64)
    source = open_pools(con, request.pool, "candidates")
    pool = source.ids if isinstance(source, SharedPool) else source.of(numbers)
    unknown = np.setdiff1d(pool[pool >= 0], np.fromiter(examples, np.int64, len(examples)))
    if len(unknown):
        raise LeverError(
            "the pool holds an example that the store does not",
            where=f"{request.dataset}/{request.candidate_split}",
            value=int(unknown[0]),
            hint="ingest the questions and annotations of the demonstrations' split",
        )
    return pool


def _require_rows(numbers: np.ndarray, rows: int, what: str) -> None:
    if len(numbers) and numbers.max() >= rows:
        raise LeverError(
            f"{what} have {rows:,} rows, none for item {int(numbers.max())}",
            hint="row = index of the question in its split",
        )
