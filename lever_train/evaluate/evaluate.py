"""Evaluate selectors on held-out queries: pick demonstrations, ask the answerer, score officially.

In go a :class:`HeldOut`, an answerer and policies by name; out come :class:`Outcome` records, one
per selector and shot number: what was shown, what was answered, how right it was. Zero-shot,
random, nearest-neighbour and the vote of the pool are always among them, the oracle where it is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Prompt
from lever_data.report.diff import BASELINES
from lever_train.evaluate import baselines
from lever_train.evaluate.baselines import Accuracy, Pointers, Rows
from lever_train.evaluate.heldout import HeldOut
from lever_train.evaluate.scores import shots_said
from lever_train.rollout.answerers.base import Answer
from lever_train.rollout.policy import Policy
from lever_train.rollout.propose import unpadded

Answers = Callable[[Sequence[Prompt]], list[Answer]]
_PROMPTS_AT_ONCE = 65_536  # bounds the memory of the oracle's hundreds of thousands of prompts


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Args:
        shots: numbers of demonstrations to show, each at least 1.
        seed: of the random baseline.
        oracle: whether to ask about every demonstration of every pool.
        progress: told (answers so far, answers in all, what they are for).
    """

    shots: tuple[int, ...] = (1, 2, 3, 4)
    seed: int = 0
    oracle: bool = True
    progress: Callable[[float, float | None, str], None] = field(default=lambda *_: None)


@dataclass(frozen=True)
class Outcome:
    """One selector at one shot number.

    ``pointer`` [n, shots] int64: example ids in the order shown, -1 after the end of a pointer
    that the selector ended early. ``predictions``: n answers after
    post-processing, ``None`` where the answerer failed for the reason in ``errors``.
    ``accuracy`` [n] float64: the task's score, in [0, 1], NaN where it failed. ``right`` [n] bool.
    """

    selector: str
    shots: int
    pointer: Pointers
    predictions: tuple[str | None, ...]
    errors: tuple[str | None, ...]
    accuracy: Accuracy
    right: npt.NDArray[np.bool_]


def evaluate(
    held: HeldOut, answer: Answers, policies: Mapping[str, Policy], options: EvalOptions
) -> list[Outcome]:
    """Evaluate the baselines and every policy at every shot number.

    Raises:
        UsageError: no shot number, one below 1, or a policy named like a baseline.
        LeverError: a pool is too small.
    """
    _require(held, policies, options)
    court = _Court(held, answer, options)
    most = max(options.shots)
    nothing = np.zeros((len(held), 0), dtype=np.int64)
    outcomes = [court.outcome("zero_shot", nothing)]
    for name, picks in _picks(held, policies, most, options):
        outcomes += [court.outcome(name, picks[:, :shots]) for shots in options.shots]
    if options.oracle:
        best = baselines.oracle(held.ask, most, court.accuracy)
        outcomes += [court.outcome("oracle", best[:, :shots]) for shots in options.shots]
    return outcomes


def _picks(
    held: HeldOut, policies: Mapping[str, Policy], most: int, options: EvalOptions
) -> Iterator[tuple[str, Pointers]]:
    yield "random", baselines.random(held.ask, most, options.seed)
    yield "nearest", baselines.nearest(held.ask, most)
    yield "vote", baselines.vote(held.pairs, held.ask, most)
    for name, policy in policies.items():
        yield name, baselines.greedy(policy, held.ask_for(policy), most)


def _require(held: HeldOut, policies: Mapping[str, Policy], options: EvalOptions) -> None:
    if not len(held):
        raise LeverError("there is no query to evaluate on", where=f"{held.dataset}/{held.split}")
    if not options.shots or min(options.shots) < 1:
        raise UsageError("shot numbers start at 1", value=options.shots)
    if taken := set(policies) & set(BASELINES):
        raise UsageError(
            "a checkpoint is named like a baseline", value=taken.pop(), hint="rename the file"
        )


@dataclass
class _Court:
    """Asks the answerer about picks and scores what it says."""

    held: HeldOut
    answer: Answers
    options: EvalOptions
    asked: int = 0

    def outcome(self, selector: str, pointer: Pointers) -> Outcome:
        rows = np.arange(len(self.held), dtype=np.int64)
        answers = self._ask(rows, pointer, f"{selector}, {shots_said(pointer.shape[1])}")
        predictions, accuracy = self._predictions(answers), self._score(rows, answers)
        right = self.held.scoring.is_right(
            [said or "" for said in predictions], [t.answers for t in self.held.truths], accuracy
        )
        errors = tuple(a.error for a in answers)
        return Outcome(
            selector,
            pointer.shape[1],
            pointer,
            predictions,
            errors,
            accuracy,
            right & ~np.isnan(accuracy),
        )

    def accuracy(self, rows: Rows, pointers: Pointers) -> Accuracy:
        """The judge of the oracle."""
        answers = self._ask(rows, pointers, f"oracle, {shots_said(pointers.shape[1])}")
        return self._score(rows, answers)

    def _ask(self, rows: Rows, pointers: Pointers, note: str) -> list[Answer]:
        found: list[Answer] = []
        examples = self.held.examples
        for first in range(0, len(rows), _PROMPTS_AT_ONCE):
            part = slice(first, first + _PROMPTS_AT_ONCE)
            prompts = [
                Prompt(self.held.queries[row], tuple(examples[i] for i in pointer))
                for row, pointer in zip(rows[part].tolist(), unpadded(pointers[part]), strict=True)
            ]
            found += self.answer(prompts)
            self.asked += len(prompts)
            self.options.progress(self.asked, None, note)
        return found

    def _predictions(self, answers: Sequence[Answer]) -> tuple[str | None, ...]:
        read = self.held.scoring.task.answer
        return tuple(None if a.text is None else read(a.text) for a in answers)

    def _score(self, rows: Rows, answers: Sequence[Answer]) -> Accuracy:
        predictions = [said or "" for said in self._predictions(answers)]
        truths = [self.held.truths[r].answers for r in rows.tolist()]
        accuracy = self.held.scoring.score(predictions, truths)
        failed = np.array([a.text is None for a in answers], dtype=bool)
        return np.where(failed, np.nan, accuracy)
