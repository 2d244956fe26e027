"""Queries to evaluate on: their items, truths, embeddings and pools, and the examples to show.

In go a connection and :class:`Questions`; out comes a :class:`HeldOut`. The demonstrations are the
items of another split, ``train`` as a rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
from torch import Tensor

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import Place, Truth, load_items, load_truth, only_dataset
from lever_data.items.official import Official, load_official
from lever_data.items.prompts import Item
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pools import SharedPool, open_pools
from lever_train.options.evaluate import Questions
from lever_train.rollout.propose import Ask

_NO_TRUTH = Truth((), False, ())


@dataclass(frozen=True)
class HeldOut:
    """n queries, in the order of their ids.

    ``ask``: their ids, embeddings and pools. ``queries`` and ``truths``: n items and what their
    answers are compared with. ``examples``: the demonstrations by example id. ``query_table``: the
    query embeddings whole, row = query id.
    """

    dataset: str
    split: str
    ask: Ask
    queries: tuple[Item, ...]
    truths: tuple[Truth, ...]
    examples: Mapping[int, Item]
    query_table: Tensor

    def __len__(self) -> int:
        return len(self.queries)


def open_held_out(
    con: duckdb.DuckDBPyConnection,
    questions: Questions,
    limit: int | None = None,
    *,
    is_judged: bool = True,
) -> HeldOut:
    """Load everything an evaluation reads; of the first ``limit`` queries where it is given.

    Where nothing ``is_judged``, queries need no answers, and their truths are empty.

    Raises:
        LeverError: items, answers, embeddings or pools are missing; it names the query.
        UsageError: the dataset or embeddings are not named.
    """
    dataset = questions.dataset or only_dataset(con)
    official = _official(questions)
    items = load_items(con, Place(dataset, questions.split, questions.image_root), official)
    size = _split_size(con, dataset, questions.split, official)
    if limit is not None:
        items = {number: items[number] for number in sorted(items)[:limit]}
    own = questions.candidate_split == questions.split
    source = Place(dataset, questions.candidate_split, questions.image_root)
    examples = load_items(con, source, official if own else None)
    truths = load_truths(items, official) if is_judged else dict.fromkeys(items, _NO_TRUTH)
    numbers = np.array(sorted(items), dtype=np.int64)
    queries, table = _embeddings(con, questions)
    _require_rows(numbers, len(queries), "the query embeddings")
    if size is not None and len(queries) != size:
        raise LeverError(
            f"the query embeddings have {len(queries):,} rows, the split {questions.split} has "
            f"{size:,} questions",
            where=questions.query_embeddings,
            hint="give the embeddings of this split; row = index of the question in it",
        )
    _require_rows(np.array(sorted(examples)), len(table), "the candidate embeddings")
    pool = _pool(con, questions, numbers, examples)
    return HeldOut(
        dataset,
        questions.split,
        Ask(numbers, queries[numbers], table, pool, own),
        tuple(items[int(i)] for i in numbers),
        tuple(truths[int(i)] for i in numbers),
        examples,
        queries,
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


def _official(questions: Questions) -> Official | None:
    if questions.questions is None or questions.annotations is None:
        return None
    return load_official(questions.questions, questions.annotations)


def _embeddings(con: duckdb.DuckDBPyConnection, questions: Questions) -> tuple[Tensor, Tensor]:
    """Query and candidate embeddings, row = item of their split."""
    if questions.query_embeddings is None:
        raise UsageError("no query embeddings are named", hint="--query-embeddings FILE")
    queries = load_embeddings(questions.query_embeddings, con)
    if questions.candidate_embeddings is not None:
        table = load_embeddings(questions.candidate_embeddings, con)
    elif questions.candidate_split == questions.split:
        table = queries
    else:
        raise UsageError(
            f"the demonstrations are of another split ({questions.candidate_split}) and need "
            "embeddings of their own",
            hint="--candidate-embeddings FILE",
        )
    if queries.shape[1] != table.shape[1]:
        raise LeverError(
            "query and candidate embeddings differ in width",
            value=f"{queries.shape[1]} and {table.shape[1]}",
        )
    return queries, table


def _pool(
    con: duckdb.DuckDBPyConnection,
    questions: Questions,
    numbers: np.ndarray,
    examples: Mapping[int, Item],
) -> np.ndarray:
    """Example ids [n, K], or [K] where all queries share one pool."""
    if questions.pool is None and questions.candidate_split != questions.split:
        return np.array(sorted(examples), dtype=np.int64)
    source = open_pools(con, questions.pool, "candidates")
    pool = source.ids if isinstance(source, SharedPool) else source.of(numbers)
    unknown = np.setdiff1d(pool[pool >= 0], np.fromiter(examples, np.int64, len(examples)))
    if len(unknown):
        raise LeverError(
            "the pool holds an example that the store does not",
            where=f"split {questions.candidate_split}",
            value=int(unknown[0]),
            hint="ingest the questions and annotations of the demonstrations' split",
        )
    return pool


def _split_size(
    con: duckdb.DuckDBPyConnection, dataset: str, split: str, official: Official | None
) -> int | None:
    """Questions of the whole split, where the official file or the store's examples tell."""
    if official is not None:
        return len(official.questions)
    sql = "select count(*) from examples where dataset = ? and split = ?"
    found = con.cursor().execute(sql, [dataset, split]).fetchall()[0][0]
    return int(found) or None


def _require_rows(numbers: np.ndarray, rows: int, what: str) -> None:
    if len(numbers) and numbers.max() >= rows:
        raise LeverError(
            f"{what} have {rows:,} rows, none for item {int(numbers.max())}",
            hint="row = index of the question in its split",
        )
