"""Queries to evaluate on: their items, truths, embeddings and pools, and the examples to show.

In go a connection and :class:`Questions`; out comes a :class:`HeldOut`. The demonstrations are the
items of another split, ``train`` as a rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import duckdb
import numpy as np
from torch import Tensor

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import (
    Place,
    Truth,
    load_items,
    load_truth,
    only_dataset,
)
from lever_data.items.prompts import Item
from lever_data.items.scoring import Scoring
from lever_data.items.task import Task
from lever_data.sources.official import load_official
from lever_data.store.store import Store
from lever_train.inputs.check import Vectors, check_inputs, split_size
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pair_features import PairFeatures, Pairs
from lever_train.inputs.pools import PoolSource, SharedPool, open_pools
from lever_train.options.evaluate import Questions
from lever_train.rollout.policy import Policy, policy_features
from lever_train.rollout.propose import Ask
from lever_train.rollout.views import query_ids

_NO_TRUTH = Truth((), False, ())


@dataclass(frozen=True)
class HeldOut:
    """n queries, in the order of their ids.

    ``ask``: their ids, embeddings and pools. ``queries`` and ``truths``: n items and what their
    answers are compared with. ``examples``: the demonstrations by example id. ``query_table``: the
    query embeddings whole, row = query id. ``scoring``: how answers become scores.
    ``pairs``: what features of them are computed from; ``features``: those that policies
    read, by a policy's name.
    """

    dataset: str
    split: str
    ask: Ask
    queries: tuple[Item, ...]
    truths: tuple[Truth, ...]
    examples: Mapping[int, Item]
    query_table: Tensor
    scoring: Scoring
    pairs: Pairs
    features: Mapping[str, PairFeatures] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.queries)

    def with_features(self, store: Store, policies: Iterable[Policy]) -> HeldOut:
        """The same with what these policies read of pairs."""
        found = {p.name: policy_features(policy=p, store=store, pairs=self.pairs) for p in policies}
        return replace(self, features={n: f for n, f in found.items() if f is not None})

    def ask_for(self, policy: Policy) -> Ask:
        """The queries as this policy sees them."""
        return replace(self.ask, features=self.features.get(policy.name))


def open_held_out(
    con: duckdb.DuckDBPyConnection,
    questions: Questions,
    limit: int | None = None,
    *,
    task: Task | None = None,
    is_judged: bool = True,
    only: Sequence[int] = (),
    widths: Mapping[str, int] | None = None,
) -> HeldOut:
    """Load everything an evaluation reads; of the first ``limit`` queries where it is given, and of
    those of ``only`` that there are where any are named.

    Where nothing ``is_judged``, queries need no answers, and their truths are empty. ``widths`` are
    those of the embeddings that each checkpoint takes, by its name. Without a ``task`` it is vqa.

    Raises:
        LeverError: items, answers, embeddings or pools are missing; it names the query.
        UsageError: the dataset or embeddings are not named.
    """
    dataset = questions.dataset or only_dataset(con)
    official = load_official(questions.questions, questions.annotations)
    images = questions.image_root, questions.image_name
    items = load_items(con, Place(dataset, questions.split, *images), official)
    own_size = split_size(con, dataset, questions.split)
    # of the whole split, whichever queries are asked about: how rare a word is, is the split's
    scoring = Scoring(task or Task(), [item.answers for item in items.values()])
    size = max(official.questions) + 1 if own_size is None and official else own_size
    items = _chosen(con, questions, dataset, items, only, limit)
    own = questions.candidate_split == questions.split
    source = Place(dataset, questions.candidate_split, *images)
    examples = load_items(con, source, official if own else None)
    truths = load_truth(items, official) if is_judged else dict.fromkeys(items, _NO_TRUTH)
    numbers = np.array(sorted(items), dtype=np.int64)
    queries, table = _embeddings(con, questions, dataset)
    pool = _open_pools(con, questions, dataset, examples)
    check_inputs(
        Vectors.of(questions.query_embeddings, queries),
        Vectors.of(questions.candidate_embeddings or questions.query_embeddings, table),
        split=questions.split,
        size=size,
        last_query=int(numbers.max(initial=-1)),
        candidate_size=split_size(con, dataset, questions.candidate_split),
        pool=pool,
        checkpoints=widths,
    )
    shown = pool.ids if isinstance(pool, SharedPool) else pool.of(numbers)
    _require_examples(shown, questions, examples)
    asked = [items[int(i)].question for i in numbers]
    place = dataset, questions.split, questions.candidate_split
    each = np.broadcast_to(shown, (len(numbers), shown.shape[-1]))
    vectors = queries[numbers], table
    return HeldOut(
        dataset,
        questions.split,
        Ask(numbers, *vectors, shown, own),
        tuple(items[int(i)] for i in numbers),
        tuple(truths[int(i)] for i in numbers),
        examples,
        queries,
        scoring,
        Pairs(con, place, numbers, each, *vectors, asked, examples),
    )


def _chosen(
    con: duckdb.DuckDBPyConnection,
    questions: Questions,
    dataset: str,
    items: dict[int, Item],
    only: Sequence[int],
    limit: int | None,
) -> dict[int, Item]:
    """The items of the view that is named, of ``only`` where any are, and of those the first.

    Raises:
        UsageError: the view holds no query of this place.
        LeverError: it names queries that are not questions of the split; the first of them.
    """
    if questions.queries is not None:
        wanted = query_ids(con, questions.queries, dataset, questions.split).tolist()
        here = f"{dataset}/{questions.split}"
        if not wanted:
            raise UsageError(
                "the view holds no query of this place", where=questions.queries, value=here
            )
        if lacking := [number for number in wanted if number not in items]:
            raise LeverError(
                f"{len(lacking):,} of {len(wanted):,} queries of the view are not questions of "
                f"{here}",
                where=questions.queries,
                value=f"query {lacking[0]}",
                hint="ingest the questions of the split, or give a view of those that are there",
            )
        items = {number: items[number] for number in wanted}
    if only:
        items = {number: items[number] for number in only if number in items}
    return {number: items[number] for number in sorted(items)[:limit]}


def _embeddings(
    con: duckdb.DuckDBPyConnection, questions: Questions, dataset: str
) -> tuple[Tensor, Tensor]:
    """Query and candidate embeddings, row = item of their split."""
    if questions.query_embeddings is None:
        raise UsageError("no query embeddings are named", hint="--query-embeddings FILE")
    queries = load_embeddings(questions.query_embeddings, con, (dataset, questions.split))
    if questions.candidate_embeddings is not None:
        source = (dataset, questions.candidate_split)
        table = load_embeddings(questions.candidate_embeddings, con, source)
    elif questions.candidate_split == questions.split:
        table = queries
    else:
        raise UsageError(
            f"the demonstrations are of another split ({questions.candidate_split}) and need "
            "embeddings of their own",
            hint="--candidate-embeddings FILE",
        )
    return queries, table


def _open_pools(
    con: duckdb.DuckDBPyConnection,
    questions: Questions,
    dataset: str,
    examples: Mapping[int, Item],
) -> PoolSource:
    """The pools given or stored; every example, where there is neither."""
    if questions.pool is not None or questions.candidate_split == questions.split:
        source = open_pools(con, questions.pool, "candidates", (dataset, questions.split))
        if not isinstance(source, SharedPool) or len(source.ids):
            return source
    return SharedPool(np.array(sorted(examples), dtype=np.int64))


def _require_examples(pool: np.ndarray, questions: Questions, examples: Mapping[int, Item]) -> None:
    unknown = np.setdiff1d(pool[pool >= 0], np.fromiter(examples, np.int64, len(examples)))
    if len(unknown):
        raise LeverError(
            "the pool holds an example that the store does not",
            where=f"split {questions.candidate_split}",
            value=int(unknown[0]),
            hint="ingest the questions and annotations of the demonstrations' split",
        )
