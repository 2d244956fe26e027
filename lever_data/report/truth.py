"""What stored answers are judged by: the annotators' answers, by query id.

In go a run, the stored examples of its split and the annotations of files, where there are some;
out come each query's question and answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import UsageError
from lever_data.items.items import Official, official_id
from lever_data.items.prompts import Id
from lever_data.sources.belong import Evidence
from lever_data.store.schema import under_todays_names
from lever_data.store.store import Run

_BATCH = 65_536  # rows in memory at once


class Truth:
    """The annotators' answers by query id.

    The question of a query is that of its own question id; where the run has none, that of the
    stored example of its number, else the one at that place of the file, and then the answers
    the run calls right are the evidence.
    """

    def __init__(self, run: Run, examples: Sequence[Run], official: Official | None) -> None:
        self.run, self._official = run, official
        self._own = _column(run, "queries", "query_id", "question_id")
        self._stored: dict[int, Id] = {}
        self._answers: Mapping[Id, tuple[str, ...]] = {}
        if examples:
            self._stored = _column(examples[0], "examples", "example_id", "question_id")
            said = _column(examples[0], "examples", "example_id", "answers")
            self._answers = {q: tuple(said[n]) for n, q in self._stored.items() if said.get(n)}
        if official is not None:
            self._answers = official.answers
        if not self._answers:
            raise UsageError(
                "the store has no annotations of this split to score by",
                where=f"{run.dataset}/{run.split}",
                hint="`lever ingest QUESTIONS ANNOTATIONS`, or name them with --questions and "
                "--annotations",
            )
        self.evidence = Evidence()

    @property
    def corpus(self) -> list[tuple[str, ...]]:
        """The answers to every question."""
        return list(self._answers.values())

    def question_id(self, query_id: int) -> Id | None:
        """The question of a query; ``None`` where nothing tells."""
        for known in (self._own, self._stored):
            if (found := known.get(query_id)) is not None:
                return found
        asked = None if self._official is None else self._official.questions.get(query_id)
        return None if asked is None else asked.question_id

    def answers(self, query_id: int) -> tuple[str, ...] | None:
        """The answers, or ``None`` where there is no annotation."""
        question_id = self.question_id(query_id)
        return None if question_id is None else self._answers.get(question_id)

    def require_evidence(self) -> None:
        """Refuse answers that are to other questions, where no question id tells."""
        numbered = {q: said for q, said in self.evidence.said.items() if q not in self._own}
        known = {query_id: self.answers(query_id) for query_id in numbered}
        Evidence(numbered).require(known, self.run.run)


def _column(run: Run, table: str, key: str, name: str) -> dict[int, Any]:
    """A column of a run's table by its integer key, without nulls; ids as official files have
    them."""
    found: dict[int, Any] = {}
    for batch in batches(run, table, [key, name]):
        keys, values = (batch.column(i).to_pylist() for i in (key, name))
        found |= {k: v for k, v in zip(keys, values, strict=True) if v is not None}
    if name == "question_id":
        return {k: official_id(v) for k, v in found.items()}
    return found


def batches(run: Run, table: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """A table of a run, some rows at a time, under today's names."""
    for path in run.table_files(table):
        with pq.ParquetFile(path) as file:
            yield from map(under_todays_names, file.iter_batches(_BATCH, columns=columns))
