"""Ids of one file and meaning of another: the proof that they belong together.

RL data names queries and examples by number; what a number means, the questions say. Both are
compared when the second of them is ingested: by question ids where the RL data has them, else by
content, as answers that the RL data calls right must be among the annotators' answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lever_data.catalog import RL_KINDS
from lever_data.errors import LeverError
from lever_data.items.items import official_id, other_question
from lever_data.items.prompts import Id
from lever_data.items.vqa_metric import fallback_match, vqa_accuracy
from lever_data.sources.fields import Batches
from lever_data.sources.item_file import ItemFile, match
from lever_data.store.store import RunSpec, Store

if TYPE_CHECKING:
    import duckdb

# With the right questions nearly all of these answers agree, with others some 3 % of OK-VQA's and
# 20 % of VQAv2's (yes, no): half of them tells the two apart from ten queries on.
MIN_QUERIES = 10
MIN_SHARE = 0.5
_SAMPLE = 1000

Answers = Sequence[str]


@dataclass
class Evidence:
    """One answer of each of up to a thousand queries that its file calls right."""

    said: dict[int, str] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the answers of a batch of candidates."""
        if len(self.said) >= _SAMPLE:
            return
        names = ("query_id", "answer", "score", "eval_failed")
        for query_id, said, score, failed in zip(
            *(batch.column(name).to_pylist() for name in names), strict=True
        ):
            if said and score is not None and score > 0 and not failed:
                self.said.setdefault(query_id, said)

    def require(self, answers: Mapping[int, Answers | None], where: str) -> None:
        """Refuse questions to which these are no answers.

        Args:
            answers: the annotators' answers by query id.

        Raises:
            LeverError: fewer than half of the answers, of ten queries or more, are among them.
        """
        known = [(said, own) for q, said in self.said.items() if (own := answers.get(q))]
        right = sum(
            bool(vqa_accuracy([said], [own])[0] > 0 or fallback_match(said, own) > 0)
            for said, own in known
        )
        if len(known) >= MIN_QUERIES and right < MIN_SHARE * len(known):
            raise LeverError(
                f"the answers are to other questions: of {len(known):,} answers that the RL data "
                f"calls right, {right:,} are among the annotators' answers",
                where=where,
                hint="ingest questions and annotations in the order of the RL data: legacy data "
                "numbers them by question_id (--order question_id), else they are numbered as in "
                "the file (--order file); or the files are of another split",
            )


def compared(store: Store, spec: RunSpec, batches: Iterator[Batches]) -> Iterator[Batches]:
    """RL data on its way in, as it is, compared with the examples that the store holds of its place
    where it holds some.

    Raises:
        LeverError: a query is another question than the example of its number; it names both.
    """
    place = (spec.dataset, spec.split)
    con = _session(store, place, ("examples",), "examples")
    return batches if con is None else _compared(con, place, batches)


def _compared(
    con: duckdb.DuckDBPyConnection, place: tuple[Any, Any], batches: Iterator[Batches]
) -> Iterator[Batches]:
    ids: dict[int, Id] = {}  # read only for files that have question ids
    evidence = Evidence()
    for built in batches:
        asked = built.queries.column("question_id")
        if asked.null_count < len(asked):
            if not ids:
                rows = con.execute("select example_id, question_id from examples").fetchall()
                ids = {number: official_id(i) for number, i in rows}
            queries = built.queries.column("query_id").to_pylist()
            _require_equal(zip(queries, asked.to_pylist(), strict=True), ids, place)
        else:
            evidence.add(built.candidates)
        yield built
    if evidence.said:
        sql = "select example_id, answers from examples where example_id in (select unnest(?))"
        rows = con.execute(sql, [list(evidence.said)]).fetchall()
        evidence.require(dict(rows), "/".join(map(str, place)))


def require_known_queries(
    store: Store,
    place: tuple[str, str],
    numbers: Sequence[int],
    questions: ItemFile,
    annotations: ItemFile | None,
) -> None:
    """Compare questions on their way in with the RL data that the store holds of their place.

    Args:
        numbers: the example id of every question.

    Raises:
        LeverError: a query of the RL data is another question; it names both.
    """
    con = _session(store, place, RL_KINDS, "queries", "stg_candidates")
    if con is None:
        return
    rows = con.execute(
        "select query_id, question_id from queries where question_id is not null order by query_id"
    ).fetchall()
    _require_equal(rows, dict(zip(numbers, questions.question_ids, strict=True)), place)
    if rows:
        return
    said = con.execute(_RIGHT, [*place, _SAMPLE]).fetchall()
    answers = questions.columns["answers"]
    if annotations is not None:
        answers = annotations.columns["answers"].take(
            pa.array(match(questions, annotations), pa.int64())
        )
    known = dict(zip(numbers, answers.to_pylist(), strict=True))
    Evidence(dict(said)).require(known, str(questions.source.path))


_RIGHT = """
    select query_id, min(answer)
    from stg_candidates
    where
        dataset = ? and split = ?
        and score > 0 and answer <> '' and eval_failed is not true
    group by query_id
    limit ?
"""


def _session(
    store: Store, place: tuple[Any, Any], kinds: Sequence[str], *relations: str
) -> duckdb.DuckDBPyConnection | None:
    """A connection to the runs of a place; ``None`` where there are none. A damaged run does not
    keep other files out."""
    runs = [r.run for r in store.inventory().runs if (r.dataset, r.split) == place]
    chosen = [run for run in runs if store.run(run).kind in kinds]
    if not chosen:
        return None
    from lever_data.relations.db import open_session  # 0.2 s: most files are the first of a store

    return open_session(store, runs=chosen, only=relations).con


def _require_equal(
    asked: Iterable[tuple[int, Id | None]], known: Mapping[int, Id], place: tuple[Any, Any]
) -> None:
    for query_id, question_id in asked:
        other = known.get(query_id)
        if question_id is not None and other is not None and official_id(question_id) != other:
            raise other_question(query_id, "/".join(map(str, place)), question_id, other)
