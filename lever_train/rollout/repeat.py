"""Stored prompts asked again: is it still the same model, and how far does it waver by itself?

In go a :class:`Job` and how many prompts; out come stored prompts with what was answered, or a
:class:`Repeat`: the noise of the answers beside what tells a query's candidates apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np

from lever_data.errors import LeverError
from lever_data.items.items import Truth
from lever_data.items.prompts import Prompt
from lever_data.relations.db import run_sql
from lever_data.store.integrity import require_intact
from lever_data.store.store import Run
from lever_train.options.rollout import Request
from lever_train.rollout.answerers.base import Answer
from lever_train.rollout.job import Job
from lever_train.rollout.resolve import resolve
from lever_train.rollout.score import score


@dataclass(frozen=True)
class Repeat:
    """What asking stored prompts again tells.

    ``asked`` prompts, of which ``failed`` were not answered and ``changed`` answered in other
    words. ``noise``: variance of the accuracy between two answers to one prompt, half the mean
    squared difference. ``within``: mean variance of the accuracy among a query's stored candidates,
    noise included; null where no query has two.
    """

    asked: int
    failed: int
    changed: int
    noise: float
    within: float | None


def repeat(request: Request, count: int) -> Repeat:
    """Ask up to ``count`` stored prompts of the same scorer again; nothing is kept.

    Raises:
        LeverError: no run of this scorer holds answers about these queries, or none is answered.
    """
    job = resolve(request)
    stored = stored_prompts(job, count)
    if not stored:
        raise LeverError(
            "there are no stored answers of this scorer to ask again",
            value=job.label.scorer,
            hint="generate with the same options first, without --repeat-sample",
        )
    again = job.answerer.answer([prompt for prompt, _ in stored])
    pairs = [
        (prompt, old, new)
        for (prompt, old), new in zip(stored, again, strict=True)
        if new.text is not None
    ]
    if not pairs:
        raise LeverError("none of the prompts was answered", value=again[0].error)
    truths = [job.truths[prompt.query.example_id] for prompt, _, _ in pairs]
    before = _accuracies([Answer(old) for _, old, _ in pairs], truths, job)
    after = _accuracies([new for _, _, new in pairs], truths, job)
    return Repeat(
        asked=len(stored),
        failed=len(stored) - len(pairs),
        changed=sum(old != new.text for _, old, new in pairs),
        noise=float(np.square(after - before).mean() / 2),
        within=_within(runs_of(job)[-1]),
    )


def stored_prompts(job: Job, count: int) -> list[tuple[Prompt, str]]:
    """Prompts of the newest run of the same scorer about items of this job, and their answers; a
    sample that is the same each time."""
    runs = runs_of(job)
    if not runs:
        return []
    require_intact(runs[-1:], ("candidates",))
    found = duckdb.execute(
        "select query_id, pointer, generation "
        f"from ({run_sql(runs[-1], 'candidates', 'stg_candidates')}) where generation is not null "
        "and query_id in (select unnest(?)) order by hash(query_id, pointer), candidate limit ?",
        [list(job.items), count],
    ).fetchall()
    return [
        (Prompt(job.items[query], tuple(job.examples[e] for e in pointer)), said)
        for query, pointer, said in found
        if all(e in job.examples for e in pointer)
    ]


def runs_of(job: Job) -> list[Run]:
    """The runs of the same scorer about the same place, oldest first."""
    same = ("scorer", "generation")
    return [
        run
        for run in job.store.runs()
        if run.kind == job.spec.kind
        and (run.dataset, run.split) == (job.spec.dataset, job.spec.split)
        and all(run.parameters.get(k) == job.spec.parameters[k] for k in same)
    ]


def _accuracies(answers: Sequence[Answer], truths: Sequence[Truth], job: Job) -> np.ndarray:
    found = score(answers, truths, job.scoring)
    return np.array([one.accuracy for one in found], dtype=np.float64)


def _within(run: Run) -> float | None:
    require_intact([run], ("candidates",))
    rows = duckdb.execute(
        "select avg(variance) from (select var_samp(score) as variance "
        f"from ({run_sql(run, 'candidates', 'stg_candidates')}) where score is not null "
        "group by query_id)"
    ).fetchall()
    found: float | None = rows[0][0]
    return found
