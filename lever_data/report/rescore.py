"""Score stored answers again by the official VQA metric, without asking any model.

In go a run, the official questions and annotations; out comes a new run of kind ``rescore`` with
the same rows in the same order and new scores, the old run as its parent. Reads and writes batch
by batch: memory holds one batch, the annotations and the list of what changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.catalog import RL_KINDS
from lever_data.errors import LeverError, UsageError
from lever_data.items.vqa_metric import METRIC_VERSION, edit_similarity, token_f1, vqa_accuracy
from lever_data.readers.source import Source
from lever_data.relations.db import connect
from lever_data.sources.questions import read_annotations, read_questions, split_of
from lever_data.store.integrity import require_intact
from lever_data.store.store import Run, RunSpec, RunWriter, Store

_BATCH = 65_536
DECIMALS = 10


@dataclass(frozen=True)
class RescoreRequest:
    """What to rescore.

    Args:
        run: id of a run of candidates, or a prefix only it has.
        questions: official question file; a question's index is its query id.
        annotations: official annotation file.
        allow_missing: leave rows without annotations as they are, and count them.
    """

    run: str
    questions: Path
    annotations: Path
    allow_missing: bool = False


@dataclass(frozen=True)
class Change:
    """A row whose official accuracy is another than the one it had; ``old_mode`` says whence it
    had that: ``fallback``, ``file``, or ``unknown``."""

    query_id: int
    candidate: int
    prediction: str
    old_mode: str
    old: float | None
    new: float


@dataclass(frozen=True)
class Rescored:
    """The new run, or the one that was there already (``is_new`` false), and what it changed.

    ``num_unknown_before`` counts rows that did not say how they were scored.
    ``num_missing`` counts rows without annotations, ``num_unanswered`` rows without a prediction;
    both are left as they were. ``num_healed`` counts failed evaluations that have a prediction and
    now a score.
    """

    run: Run
    parent: str
    is_new: bool
    changes: tuple[Change, ...]
    num_unknown_before: int
    num_rows: int
    num_fallback_before: int
    num_missing: int
    num_unanswered: int
    num_healed: int


def rescore(store: Store, request: RescoreRequest) -> Rescored:
    """Commit the rescored run, or find it.

    New values: ``vqa_acc_score`` (official accuracy), ``vqa_correct`` (accuracy > 0),
    ``eval_mode`` file, ``metric_version``, ``vqa_rel_token_f1`` and ``vqa_rel_edit_sim`` (to the
    nearest ground truth, see :mod:`vqa_metric`) and ``vqa_rel_score``, the larger of the two as in
    the legacy code. A failed evaluation with a prediction and no error of the answerer failed in
    scoring: it is scored and no longer failed. All else stays.

    Raises:
        LeverError: the run has no candidates to score, a file is not what it should be, the files
            are of another split, or a query has no annotation.
    """
    run = store.run(request.run)
    if run.kind not in RL_KINDS:
        raise UsageError(
            f"a run of kind {run.kind} holds no scored candidates",
            value=run.run,
            hint=f"kinds that do: {', '.join(RL_KINDS)}",
        )
    sources = Source.open(request.questions), Source.open(request.annotations)
    spec = RunSpec(
        kind="rescore",
        dataset=run.dataset,
        split=run.split,
        source={"questions": str(request.questions), "annotations": str(request.annotations)},
        source_sha256=sources[0].sha256() + sources[1].sha256(),
        parameters={"metric_version": METRIC_VERSION, "allow_missing": request.allow_missing},
        parents=(run.run,),
    )
    if (found := store.find(spec)) is not None:
        return _result(store, found, is_new=False)
    require_intact([run])
    scorer = _Scorer(run, _Truth(run, *sources), request.allow_missing)
    with store.begin(spec) as writer:
        for batch in _batches(run, "candidates"):
            writer.write("candidates", scorer.rescore(batch))
        _copy(run, writer, ("queries", "examples"))
        made = writer.commit({"rescore": scorer.counts})
    return _result(store, made, is_new=True)


def _result(store: Store, made: Run, *, is_new: bool) -> Rescored:
    parent = made.parents[0]
    with connect(store, runs=[made.run, parent]) as con:
        rows = con.execute(_CHANGES, {"old": parent, "new": made.run}).fetchall()
        unknown = con.execute(_UNKNOWN, [parent]).fetchall()[0][0]
    changes = tuple(Change(*row) for row in rows)
    return Rescored(made, parent, is_new, changes, unknown, **made.details["rescore"])


_UNKNOWN = """
    select count(*)
    from stg_candidates
    where run = ? and eval_mode is null and eval_failed is not true
"""


_CHANGES = """
    select
        new.query_id,
        new.candidate,
        new.vqa_pred_answer,
        coalesce(old.eval_mode, 'unknown'),
        old.vqa_acc_score,
        new.vqa_acc_score
    from (select * from stg_candidates where run = $old) as old
    inner join (select * from stg_candidates where run = $new) as new
        using (dataset, split, query_id, candidate)
    where old.vqa_acc_score is distinct from new.vqa_acc_score
    order by new.query_id, new.candidate
"""


class _Truth:
    """The annotators' answers by query id."""

    def __init__(self, run: Run, questions: Source, annotations: Source) -> None:
        asked, noted = read_questions(questions), read_annotations(annotations)
        self.where = f"{questions.path} and {annotations.path}"
        for file in (asked, noted):
            found = split_of(str(file.head.get("data_subtype")))
            if found and run.split in ("train", "val", "test") and found != run.split:
                raise LeverError(
                    f"the file is of the split {found}, the run of {run.split}",
                    where=str(file.source.path),
                    hint="give the questions and annotations of the run's own split",
                )
        answers = noted.columns["answers"].to_pylist()
        ids = noted.columns["question_id"].to_pylist()
        self._answers = {i: tuple(a) for i, a in zip(ids, answers, strict=True) if a}
        self._questions = asked.columns["question_id"].to_pylist()
        self._own_ids = _question_ids(run)

    def question_id(self, query_id: int) -> int | None:
        """From the run's own queries, else the question at that index of the file."""
        if (own := self._own_ids.get(query_id)) is not None:
            return own
        return self._questions[query_id] if query_id < len(self._questions) else None

    def answers(self, query_id: int) -> tuple[str, ...] | None:
        """The answers, or ``None`` where there is no annotation."""
        question_id = self.question_id(query_id)
        return None if question_id is None else self._answers.get(question_id)


class _Scorer:
    """Rescores batches and counts what happened."""

    def __init__(self, run: Run, truth: _Truth, allow_missing: bool) -> None:
        self.run, self.truth, self.allow_missing = run, truth, allow_missing
        self.counts = dict.fromkeys(
            ("num_rows", "num_fallback_before", "num_missing", "num_unanswered", "num_healed"), 0
        )

    def rescore(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with new scores in the rows that can be scored."""
        column = {name: batch.column(name) for name in batch.schema.names}
        predictions = column["vqa_pred_answer"].to_pylist()
        failed = column["eval_failed"].fill_null(False).to_numpy(zero_copy_only=False)
        broken = failed & column["error"].is_valid().to_numpy(zero_copy_only=False)
        # A failed evaluation keeps "" as its answer: that is no answer to score.
        silent = np.array([not p for p in predictions], bool) & failed
        answered = column["vqa_pred_answer"].is_valid().to_numpy(zero_copy_only=False)
        answered &= ~(broken | silent)
        known = [self._answers(q) for q in column["query_id"].to_pylist()]
        scored = answered & np.array([a is not None for a in known], bool)
        rows = np.flatnonzero(scored)
        texts = [predictions[i] for i in rows]
        truths = [known[i] or () for i in rows]
        new = _scores(texts, truths)
        self._count(batch, scored, answered, failed)
        for name, values in new.items():
            field = batch.schema.field(name)
            column[name] = _replace(column[name], scored, rows, pa.array(values, field.type))
        failure = column["eval_failed"]
        column["eval_failed"] = pa.compute.if_else(pa.array(scored & failed), False, failure)
        return pa.RecordBatch.from_arrays(list(column.values()), schema=batch.schema)

    def _answers(self, query_id: int) -> tuple[str, ...] | None:
        answers = self.truth.answers(query_id)
        if answers is None and not self.allow_missing:
            raise LeverError(
                "a query has no annotation",
                where=self.truth.where,
                value={"query_id": query_id, "question_id": self.truth.question_id(query_id)},
                hint="give the files of the run's split, or leave such rows as they are with "
                "--allow-missing",
            )
        return answers

    def _count(
        self, batch: pa.RecordBatch, scored: np.ndarray, answered: np.ndarray, failed: np.ndarray
    ) -> None:
        fallback = pa.compute.equal(batch.column("eval_mode"), "fallback")
        self.counts["num_rows"] += batch.num_rows
        self.counts["num_fallback_before"] += pa.compute.sum(fallback).as_py() or 0
        self.counts["num_unanswered"] += int((~answered).sum())
        self.counts["num_missing"] += int((answered & ~scored).sum())
        self.counts["num_healed"] += int((scored & failed).sum())


def _scores(texts: list[str], truths: list[tuple[str, ...]]) -> dict[str, list[Any]]:
    """The new value of every column that rescoring writes, for the rows that can be scored."""
    accuracy = vqa_accuracy(texts, truths).tolist()
    similar = [_similarities(text, truth) for text, truth in zip(texts, truths, strict=True)]
    return {
        "vqa_acc_score": accuracy,
        "vqa_correct": [int(score > 0) for score in accuracy],
        "eval_mode": ["file"] * len(texts),
        "metric_version": [METRIC_VERSION] * len(texts),
        "vqa_rel_token_f1": [f1 for f1, _ in similar],
        "vqa_rel_edit_sim": [edit for _, edit in similar],
        "vqa_rel_score": [max(pair) for pair in similar],
    }


@lru_cache(maxsize=1 << 16)
def _similarities(text: str, truth: tuple[str, ...]) -> tuple[float, float]:
    f1 = round(token_f1(text, truth), DECIMALS)
    return f1, round(edit_similarity(text, truth), DECIMALS)


def _replace(old: pa.Array, scored: np.ndarray, rows: np.ndarray, values: pa.Array) -> pa.Array:
    """``old`` with ``values`` in the scored rows."""
    if len(rows) == len(old):
        return values
    return pa.compute.replace_with_mask(old, pa.array(scored), values)


def _question_ids(run: Run) -> dict[int, int]:
    """Question ids by query id, from the run's queries that have one."""
    found: dict[int, int] = {}
    for batch in _batches(run, "queries", ["query_id", "question_id"]):
        ids, questions = (batch.column(i).to_pylist() for i in range(2))
        found |= {i: q for i, q in zip(ids, questions, strict=True) if q is not None}
    return found


def _batches(run: Run, table: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    for path in run.table_files(table):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(_BATCH, columns=columns)


def _copy(run: Run, writer: RunWriter, tables: Sequence[str]) -> None:
    for table in tables:
        for batch in _batches(run, table):
            writer.write(table, batch)
