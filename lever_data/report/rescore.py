"""Score stored answers again by the metric of their task, without asking any model.

In go a run and the annotations, those of the store or files named instead; out comes a new run of
kind ``rescore`` with the same rows in the same order and new scores, the old run as its parent.
A query is the question of its own question id, else of the example of its number. Reads and writes
batch by batch: memory holds one batch, the annotations and the list of what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from lever_data.catalog import RL_KINDS
from lever_data.errors import LeverError, UsageError
from lever_data.items.scoring import Scoring
from lever_data.items.task import stored_task
from lever_data.items.vqa_metric import edit_similarity, token_f1
from lever_data.readers.source import Source
from lever_data.relations.db import connect
from lever_data.report.options import RescoreRequest
from lever_data.report.truth import Truth, batches
from lever_data.sources.official import load_official
from lever_data.store.integrity import require_intact
from lever_data.store.store import Run, RunSpec, Store
from lever_data.store.writer import RunWriter

DECIMALS = 10
_COUNTS = (
    *("num_rows", "num_fallback_before", "num_missing"),
    *("num_unanswered", "num_healed", "num_partial", "num_unread", "num_few"),
)


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
class RescoreResult:
    """The new run, or the one that was there already (``is_new`` false), and what it changed.

    ``num_unknown_before`` counts rows that did not say how they were scored. Left as they were:
    ``num_missing`` rows without annotations, ``num_unanswered`` rows without a prediction,
    ``num_unread`` rows whose text is not stored to be read anew, ``num_partial`` rows of which a
    prefix of the pointer has a score but no prediction, or none that can be read anew.
    ``num_healed`` counts failed evaluations that have a prediction and now a score, ``num_few``
    scored rows whose question has one to three annotators.
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
    num_partial: int = 0
    num_unread: int = 0
    num_few: int = 0


def rescore(store: Store, request: RescoreRequest) -> RescoreResult:
    """Commit the rescored run, or find it.

    Answers that were read otherwise than the task now says (``cut_at``, ``normalize``) are read
    anew from the generated text. New values: ``answer`` of those, ``score`` (the
    metric's score), ``correct`` (whether it is right),
    ``eval_mode`` file, ``metric``, ``token_f1`` and ``edit_sim`` (to the
    nearest ground truth, see :mod:`vqa_metric`) and ``similarity``, the larger of the two as in
    the legacy code; the scores of all prefixes in ``shot_scores`` with them, or the row stays as it
    was. A failed evaluation with a prediction and no error of the answerer failed in
    scoring: it is scored and no longer failed. All else stays.

    Raises:
        LeverError: the run has no candidates to score, a file is not what it should be, the files
            are of another split, a query has no annotation, or an answer no text to read anew.
    """
    run = store.run(request.run)
    if run.kind not in RL_KINDS:
        raise UsageError(
            f"a run of kind {run.kind} holds no scored candidates",
            value=run.run,
            hint=f"kinds that do: {', '.join(RL_KINDS)}",
        )
    official = load_official(request.questions, request.annotations, split=run.split)
    examples = _examples(store, run)
    truth = Truth(run, examples, official)
    task = request.task or stored_task(examples, run.dataset, run.split)
    if request.cut_at:
        task = task.but(cut_at=request.cut_at)
    scoring = Scoring(task, truth.corpus)
    again = {"read_again": True} if request.cut_at else {}
    spec = RunSpec(
        kind="rescore",
        dataset=run.dataset,
        split=run.split,
        source={"questions": str(request.questions), "annotations": str(request.annotations)}
        if official is not None
        else {},
        source_sha256="" if official is None else _digest(request),
        parameters={"metric_version": scoring.name, "allow_missing": request.allow_missing} | again,
        parents=(run.run, *(r.run for r in examples)),
    )
    if (found := store.find(spec)) is not None:
        return _result(store, found, is_new=False)
    require_intact([run, *examples])
    scorer = _Scorer(truth, scoring, request)
    with store.begin(spec) as writer:
        for batch in batches(run, "candidates"):
            writer.write("candidates", scorer.rescore(batch))
        truth.require_evidence()
        _copy(run, writer, ("queries", "examples"))
        made = writer.commit({"rescore": scorer.counts})
    return _result(store, made, is_new=True)


def _result(store: Store, made: Run, *, is_new: bool) -> RescoreResult:
    parent = made.parents[0]
    with connect(store, runs=[made.run, parent], only=["stg_candidates"]) as con:
        rows = con.execute(_CHANGES, {"old": parent, "new": made.run}).fetchall()
        unknown = con.execute(_UNKNOWN, [parent]).fetchall()[0][0]
    changes = tuple(Change(*row) for row in rows)
    return RescoreResult(made, parent, is_new, changes, unknown, **made.details["rescore"])


_UNKNOWN = """
    select count(*)
    from stg_candidates
    where run = ? and eval_mode is null and eval_failed is not true
"""


_CHANGES = """
    select
        new.query_id,
        new.candidate,
        new.answer,
        coalesce(old.eval_mode, 'unknown'),
        old.score,
        new.score
    from (select * from stg_candidates where run = $old) as old
    inner join (select * from stg_candidates where run = $new) as new
        using (dataset, split, query_id, candidate)
    where old.score is distinct from new.score
    order by new.query_id, new.candidate
"""


def _digest(request: RescoreRequest) -> str:
    files = (request.questions, request.annotations)
    return "".join(Source.open(file).sha256() for file in files if file is not None)


def _examples(store: Store, run: Run) -> list[Run]:
    """The newest examples of the run's place; none where the store has none."""
    place = (run.dataset, run.split)
    found = [r for r in store.runs() if r.kind == "examples" and (r.dataset, r.split) == place]
    return found[-1:]


class _Scorer:
    """Rescores batches and counts what happened."""

    def __init__(self, truth: Truth, scoring: Scoring, request: RescoreRequest) -> None:
        self.truth, self.scoring, self.allow_missing = truth, scoring, request.allow_missing
        self._read_all = bool(request.cut_at)
        self.counts = dict.fromkeys(_COUNTS, 0)

    def rescore(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with new scores in the rows that can be scored."""
        self.truth.evidence.add(batch)
        column = {name: batch.column(name) for name in batch.schema.names}
        predictions = column["answer"].to_pylist()
        failed = column["eval_failed"].fill_null(False).to_numpy(zero_copy_only=False)
        broken = failed & column["error"].is_valid().to_numpy(zero_copy_only=False)
        # A failed evaluation keeps "" as its answer: that is no answer to score.
        silent = np.array([not p for p in predictions], bool) & failed
        answered = column["answer"].is_valid().to_numpy(zero_copy_only=False)
        answered &= ~(broken | silent)
        prefixes = column["shot_scores"].to_pylist()
        versions = column["metric"].to_pylist()
        again = [self._read_all or not self.scoring.reads_as(version) for version in versions]
        read = self._read(batch, again)
        whole = np.array([*map(_is_whole, prefixes, again)], bool)
        known = [self._answers(q) for q in column["query_id"].to_pylist()]
        scored = answered & whole & np.array([a is not None for a in known], bool)
        unread = scored & np.array([text is None for text in read], bool)
        self._require_text(batch, unread)
        scored &= ~unread
        rows = np.flatnonzero(scored)
        truths = [known[i] or () for i in rows]
        texts = [str(read[i]) for i in rows]
        new = {"answer": texts, **_scores(texts, truths, self.scoring)}
        new["shot_scores"] = _shot_scores([prefixes[i] for i in rows], truths, self.scoring)
        said = column["scorer"].to_pylist()
        new["scorer"] = [self._scorer(said[i]) for i in rows]
        self._count(batch, scored, answered, failed)
        if self.scoring.task.metric == "vqa-accuracy":  # which asks how many agree
            self.counts["num_few"] += sum(len(truth) < 4 for truth in truths)
        self.counts["num_partial"] += int((answered & ~whole).sum())
        self.counts["num_unread"] += int(unread.sum())
        for name, values in new.items():
            field = batch.schema.field(name)
            column[name] = _replace(column[name], scored, rows, pa.array(values, field.type))
        failure = column["eval_failed"]
        column["eval_failed"] = pa.compute.if_else(pa.array(scored & failed), False, failure)
        return pa.RecordBatch.from_arrays(list(column.values()), schema=batch.schema)

    def _read(self, batch: pa.RecordBatch, again: list[bool]) -> list[str | None]:
        """The answer of each row: of its generated text where it is read again, ``None`` where that
        is not stored."""
        task = self.scoring.task
        texts, answers = (batch.column(name).to_pylist() for name in ("generation", "answer"))
        return [
            (None if text is None else task.answer(text)) if anew else task.normalized(answer or "")
            for text, answer, anew in zip(texts, answers, again, strict=True)
        ]

    def _require_text(self, batch: pa.RecordBatch, unread: np.ndarray) -> None:
        if unread.any() and not self.allow_missing:
            key = batch.slice(int(np.flatnonzero(unread)[0]), 1).select(["query_id", "candidate"])
            raise LeverError(
                "an answer was read otherwise, and the text it is of is not stored",
                where=self.truth.run.run,
                value=key.to_pylist()[0],
                hint="a task with the cut_at and normalize it was read by; --allow-missing leaves "
                "such rows as they are",
            )

    def _scorer(self, name: str | None) -> str | None:
        """What a row is marked with once this metric has scored it."""
        return None if name is None else self.scoring.scorer(name.partition("~")[0])

    def _answers(self, query_id: int) -> tuple[str, ...] | None:
        answers = self.truth.answers(query_id)
        if answers is None and not self.allow_missing:
            raise LeverError(
                "a query has no annotation",
                where=self.truth.run.run,
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
        known = np.array([self.truth.answers(q) is not None for q in batch["query_id"].to_pylist()])
        self.counts["num_missing"] += int((answered & ~known).sum())
        self.counts["num_healed"] += int((scored & failed).sum())


def _scores(
    texts: list[str], truths: list[tuple[str, ...]], scoring: Scoring
) -> dict[str, list[Any]]:
    """The new value of every column that rescoring writes, for the rows that can be scored."""
    accuracy = scoring.score(texts, truths)
    similar = [_similarities(text, truth) for text, truth in zip(texts, truths, strict=True)]
    return {
        "score": accuracy.tolist(),
        "correct": scoring.is_right(texts, truths, accuracy).astype(int).tolist(),
        "eval_mode": ["file"] * len(texts),
        "metric": [scoring.name] * len(texts),
        "token_f1": [f1 for f1, _ in similar],
        "edit_sim": [edit for _, edit in similar],
        "similarity": [max(pair) for pair in similar],
    }


def _is_whole(prefixes: list[dict[str, Any]] | None, again: bool) -> bool:
    """Whether every prefix that has a score has the answer it came from; to be read ``again`` it
    would need its text, which is not stored."""
    return not prefixes or (not again and all(p["answer"] is not None for p in prefixes))


def _shot_scores(
    rows: list[list[dict[str, Any]] | None], truths: list[tuple[str, ...]], scoring: Scoring
) -> list[list[dict[str, Any]] | None]:
    """The prefixes of every row with official scores."""
    found: list[list[dict[str, Any]] | None] = []
    for prefixes, truth in zip(rows, truths, strict=True):
        texts = [scoring.task.normalized(one["answer"]) for one in prefixes or ()]
        known = [truth] * len(texts)
        scores = scoring.score(texts, known)
        right = scoring.is_right(texts, known, scores).tolist()
        new = [
            {
                **one,
                "answer": text,
                "score": score,
                "correct": int(hit),
                "eval_mode": "file",
            }
            for one, text, score, hit in zip(
                prefixes or (), texts, scores.tolist(), right, strict=True
            )
        ]
        found.append(None if prefixes is None else new)
    return found


@lru_cache(maxsize=1 << 16)
def _similarities(text: str, truth: tuple[str, ...]) -> tuple[float, float]:
    f1 = round(token_f1(text, truth), DECIMALS)
    return f1, round(edit_similarity(text, truth), DECIMALS)


def _replace(old: pa.Array, scored: np.ndarray, rows: np.ndarray, values: pa.Array) -> pa.Array:
    """``old`` with ``values`` in the scored rows."""
    if len(rows) == len(old):
        return values
    if pa.types.is_list(old.type):  # Arrow replaces no lists
        if values.null_count == len(values):
            return old
        rest, new = old.to_pylist(), iter(values.to_pylist())
        return pa.array(
            [next(new) if hit else kept for kept, hit in zip(rest, scored, strict=True)], old.type
        )
    return pa.compute.replace_with_mask(old, pa.array(scored), values)


def _copy(run: Run, writer: RunWriter, tables: Sequence[str]) -> None:
    for table in tables:
        for batch in batches(run, table):
            writer.write(table, batch)
