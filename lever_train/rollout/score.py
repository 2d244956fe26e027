"""Answers become scores, and proposals with their scores become rows of the store.

In go answers with the ground truth of their queries, and :class:`Proposals`; out come the tables
``candidates`` and ``queries`` of the store's schema. An answer is scored by the official metric, or
by string matching that says so. Nothing here depends on time, machine or batching.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lever_data.items.items import Truth
from lever_data.items.prompts import Item
from lever_data.items.scoring import Scoring
from lever_data.items.vqa_metric import edit_similarity, fallback_match, token_f1
from lever_data.store.schema import CANDIDATES, QUERIES, id_array, with_ids
from lever_train.rollout.answerers.base import Answer
from lever_train.rollout.propose import METHODS, Proposals

DECIMALS = 6


@dataclass(frozen=True, slots=True)
class Score:
    """The score columns of one answer, named as in the table; all ``None`` where it failed."""

    eval_mode: str | None = None
    error: str | None = None
    prediction: str | None = None
    raw: str | None = None
    correct: int | None = None
    accuracy: float | None = None
    gt_prob: float | None = None
    token_f1: float | None = None
    edit_sim: float | None = None


def score(answers: Sequence[Answer], truths: Sequence[Truth], scoring: Scoring) -> list[Score]:
    """Score answers, one each, in order."""
    read = scoring.task.answer
    predictions = [read(a.text) if a.text is not None else "" for a in answers]
    references = [t.answers for t in truths]
    # the metric's own cache makes repeated answer lists cheap
    official = scoring.score(predictions, references)
    right = scoring.is_right(predictions, references, official).tolist()
    return [
        _one(answer, prediction, truth, verdict, scoring)
        for answer, prediction, truth, *verdict in zip(
            answers, predictions, truths, official.tolist(), right, strict=True
        )
    ]


def _one(
    answer: Answer, prediction: str, truth: Truth, verdict: list[Any], scoring: Scoring
) -> Score:
    if answer.text is None:
        return Score(error=answer.error)
    accuracy, is_right = verdict
    if not truth.official:
        accuracy = fallback_match(prediction, truth.answers)
        is_right = accuracy > 0
    f1, edit = _similar(prediction, truth.given)
    return Score(
        eval_mode="file" if truth.official else "fallback",
        prediction=prediction,
        raw=answer.text,
        correct=int(is_right),
        accuracy=accuracy,
        gt_prob=expected_score(answer, truth, scoring),
        token_f1=f1,
        edit_sim=edit,
    )


def expected_score(answer: Answer, truth: Truth, scoring: Scoring) -> float | None:
    """Σ_a P(a)·worth(a) over the distinct ground-truth answers a; of VQA the worth is
    min(n_a / 3, 1) for the n_a annotators who gave it, see :meth:`Scoring.worth`.

    P(a) is the answerer's probability of exactly this string; ``None`` where it gives none.
    """
    if answer.log_probs is None:
        return None
    terms = (
        math.exp(log_prob) * worth
        for worth, log_prob in zip(
            scoring.worth(truth.given, truth.answers), answer.log_probs, strict=True
        )
    )
    return round(math.fsum(terms), DECIMALS)


@lru_cache(maxsize=1 << 16)
def _similar(prediction: str, answers: tuple[str, ...]) -> tuple[float, float]:
    f1 = round(token_f1(prediction, answers), DECIMALS)
    return f1, round(edit_similarity(prediction, answers), DECIMALS)


@dataclass(frozen=True)
class Label:
    """What every row of a job shares."""

    dataset: str
    split: str
    scorer: str
    metric: str
    policy: str
    generation: dict[str, Any]


@dataclass(frozen=True)
class CandidateScore:
    """A candidate's scores: of the whole pointer, of the prefixes asked for, and the key of the
    whole prompt."""

    whole: Score
    prefixes: tuple[tuple[int, Score], ...]
    key: bytes | None


def candidates_table(
    label: Label,
    query_ids: npt.NDArray[np.int64],
    proposals: Proposals,
    scored: Sequence[CandidateScore],
) -> pa.Table:
    """The table ``candidates``, sorted by (query_id, candidate).

    Args:
        query_ids: [B] ascending; ``proposals.row`` indexes it.
        scored: one per proposal.
    """
    order = np.argsort(proposals.row, kind="stable")
    proposals, scored = proposals.select(order), [scored[i] for i in order]
    count = len(order)
    starts = np.flatnonzero(np.diff(proposals.row, prepend=-1))
    ordinal = np.arange(count) - np.repeat(starts, np.diff(starts, append=count))
    columns: dict[str, Any] = {
        "dataset": [label.dataset] * count,
        "split": [label.split] * count,
        "query_id": query_ids[proposals.row],
        "candidate": ordinal.astype(np.int32),
        **_proposed(proposals),
        **_scores([s.whole for s in scored], label),
        "error": [_error(s) for s in scored],
        "shot_scores": [_shot_scores(s) for s in scored],
        "scorer": [label.scorer] * count,
        "metric": [label.metric] * count,
        "policy": [label.policy] * count,
        "extra": _extra(label, proposals, scored),
    }
    arrays = [pa.array(columns.get(f.name, [None] * count), f.type) for f in CANDIDATES]
    return pa.Table.from_arrays(arrays, schema=CANDIDATES)


def queries_table(
    label: Label,
    items: Sequence[Item],
    truths: Sequence[Truth],
    pools: Sequence[Sequence[int] | None],
) -> pa.Table:
    """The table ``queries``; a pool is ``None`` where all queries share one."""
    columns: dict[str, Any] = {
        "dataset": [label.dataset] * len(items),
        "split": [label.split] * len(items),
        "query_id": [item.example_id for item in items],
        "question_id": id_array(item.question_id for item in items),
        "image_id": id_array(item.image_id for item in items),
        "question": [item.question for item in items],
        "gt_answers": [list(truth.answers) for truth in truths],
        "candidate_pool": pools,
        "extra": [None] * len(items),
    }
    return pa.table(columns, schema=with_ids(QUERIES, items))


def _proposed(proposals: Proposals) -> dict[str, Any]:
    lengths = (proposals.pointer >= 0).sum(1)
    methods = np.array([*METHODS, None], dtype=object)
    return {
        "shot_num": lengths.astype(np.int8),
        "pointer": _ragged(proposals.pointer, lengths, pa.int32()),
        "pointer_pos": _positions(proposals, lengths),
        "gen_method": methods[proposals.method],
        "beam_rank": pa.array(proposals.rank, pa.int32(), mask=proposals.rank < 0),
        "beam_score": _nullable(proposals.score),
        "logprob_score": _nullable(proposals.log_prob_at),
        "temperature": _nullable(proposals.temperature),
    }


def _positions(proposals: Proposals, lengths: npt.NDArray[np.int64]) -> pa.Array:
    """Positions in the pool; null where the pool is too large for the column or not known."""
    if proposals.positions.size and not (
        proposals.positions.max() <= np.iinfo(np.int16).max
        and (proposals.positions >= 0).sum() == lengths.sum()
    ):
        return pa.nulls(len(lengths), pa.list_(pa.int16()))
    return _ragged(proposals.positions, lengths, pa.int16())


def _ragged(
    values: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], kind: pa.DataType
) -> pa.Array:
    inside = np.arange(values.shape[1]) < lengths[:, None]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[inside], kind))


def _nullable(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(values, pa.float64(), mask=np.isnan(values))


def _scores(scores: Sequence[Score], label: Label) -> dict[str, list[Any]]:
    return {
        "eval_mode": [s.eval_mode for s in scores],
        "eval_split": [label.split if s.eval_mode == "file" else None for s in scores],
        "eval_failed": [s.eval_mode is None for s in scores],
        "answer": [s.prediction for s in scores],
        "generation": [s.raw for s in scores],
        "correct": [s.correct for s in scores],
        "score": [s.accuracy for s in scores],
        "expected_score": [s.gt_prob for s in scores],
        "token_f1": [s.token_f1 for s in scores],
        "edit_sim": [s.edit_sim for s in scores],
        "similarity": [
            None if s.token_f1 is None or s.edit_sim is None else max(s.token_f1, s.edit_sim)
            for s in scores
        ],
    }


def _error(scored: CandidateScore) -> str | None:
    """What went wrong, with the whole prompt or with the first prefix that failed."""
    return scored.whole.error or next((s.error for _, s in scored.prefixes if s.error), None)


def _shot_scores(scored: CandidateScore) -> list[dict[str, Any]] | None:
    """The prefixes' scores; ``None`` where none were asked for or one of them failed."""
    if not scored.prefixes or any(s.eval_mode is None for _, s in scored.prefixes):
        return None
    return [
        {
            "shot": shot,
            "correct": s.correct,
            "score": s.accuracy,
            "expected_score": s.gt_prob,
            "answer": s.prediction,
            "eval_mode": s.eval_mode,
        }
        for shot, s in scored.prefixes
    ]


def _extra(label: Label, proposals: Proposals, scored: Sequence[CandidateScore]) -> list[str]:
    """JSON: log-probability at temperature 1, hash of the prompt, generation parameters."""
    generation = json.dumps(label.generation, sort_keys=True, ensure_ascii=False)
    rows = []
    for log_prob, one in zip(proposals.log_prob.tolist(), scored, strict=True):
        known = "null" if np.isnan(log_prob) else repr(log_prob)
        prompt = "null" if one.key is None else f'"{one.key.hex()[:32]}"'
        rows.append(
            f'{{"generation": {generation}, "logprob_t1": {known}, "prompt_sha256": {prompt}}}'
        )
    return rows
