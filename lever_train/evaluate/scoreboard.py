"""Outcomes become a scoreboard: accuracies with intervals, paired differences, a run in the store.

In go the outcomes of ``evaluate``; out come a :class:`.Scoreboard`, which ``lever eval --json``
writes, and the rows of the table ``evaluations``. Intervals are bootstrapped over images, or over
queries where those have none; a difference is paired by query, with a sign-flip test of it, which
turns what shares an image together, and McNemar's exact test on right or wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.items.prompts import Item
from lever_data.report.diff import BASELINES
from lever_data.report.statistics import bootstrap_mean, mcnemar, sign_flip_p
from lever_data.store.schema import EVALUATIONS
from lever_train.evaluate.evaluate import Outcome
from lever_train.evaluate.heldout import HeldOut
from lever_train.evaluate.scores import PairTest, Row, Scoreboard, shots_said
from lever_train.rollout.propose import unpadded

CONFIDENCE = 0.95


def scoreboard(
    outcomes: Sequence[Outcome],
    limits: Sequence[int] = (),
    clusters: np.ndarray | None = None,
    examples: Mapping[int, Item] | None = None,
) -> Scoreboard:
    """Score outcomes over all queries, or over the first ``limit`` of them for each limit.

    Args:
        outcomes: of every selector and shot number, over the same n queries.
        limits: sizes beside or in place of n.
        clusters: int [n], the image each query is about; ``None``: every query is its own.
        examples: the demonstrations, to tell which answers are copied; ``None``: nothing is said.

    Raises:
        LeverError: the answerer failed on every query of a selector.
    """
    most = len(outcomes[0].accuracy)
    images = np.arange(most) if clusters is None else clusters
    sizes = sorted({min(limit, most) for limit in limits}) or [most]
    rows = [_row(o, images[:size], examples or {}) for size in sizes for o in outcomes]
    pairs = [_paired(a, b, images[:size]) for size in sizes for a, b in _pairs(outcomes)]
    return Scoreboard(tuple(rows), tuple(pairs))


def _row(outcome: Outcome, images: np.ndarray, examples: Mapping[int, Item]) -> Row:
    size = len(images)
    accuracy = outcome.accuracy[:size]
    is_answered = ~np.isnan(accuracy)
    answered = accuracy[is_answered]
    if not len(answered):
        raise LeverError(
            "the answerer failed on every query",
            where=f"{outcome.selector}, {shots_said(outcome.shots)}",
            value=outcome.errors[0],
        )
    found = bootstrap_mean(answered, images[is_answered], confidence=CONFIDENCE)
    failed = size - len(answered)
    copied = _copied(outcome, is_answered, examples)
    more = len(answered), failed, copied, _shown(outcome.pointer[:size])
    return Row(outcome.selector, outcome.shots, found.mean, found.low, found.high, *more)


def _shown(pointer: np.ndarray) -> float | None:
    """Demonstrations shown on average, where some pointer ends early, as :class:`.Row` has it."""
    return None if (pointer >= 0).all() else float((pointer >= 0).sum(1).mean())


def _copied(
    outcome: Outcome, is_answered: np.ndarray, examples: Mapping[int, Item]
) -> float | None:
    """The share of wrong answers that a demonstration shows, as :class:`.Row` has it."""
    if not examples or not outcome.shots:
        return None
    copies = [
        _plain(outcome.predictions[i]) in {_plain(examples[e].answer) for e in pointer if e >= 0}
        for i, pointer in enumerate(outcome.pointer[: len(is_answered)].tolist())
        if is_answered[i] and not outcome.right[i]
    ]
    return sum(copies) / len(copies) if copies else None


def _plain(answer: str | None) -> str | None:
    return None if answer is None else answer.strip().lower()


def _pairs(outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, Outcome]]:
    """Each policy against random and nearest and the policies before it, at equal shots; one that
    ends pointers early is judged against showing nothing, too."""
    for b, a in combinations(outcomes, 2):
        may_show_none = b.selector == "zero_shot" and _shown(a.pointer) is not None
        is_alike = a.shots == b.shots or may_show_none
        if is_alike and a.selector not in BASELINES and b.selector != "oracle":
            yield a, b


def _paired(a: Outcome, b: Outcome, images: np.ndarray) -> PairTest:
    size = len(images)
    left, right = a.accuracy[:size], b.accuracy[:size]
    both = ~np.isnan(left) & ~np.isnan(right)
    if not both.any():
        raise LeverError(
            "no query was answered for both selectors",
            where=f"{a.selector} and {b.selector}, {shots_said(a.shots)}",
        )
    apart = left[both] - right[both]
    change = bootstrap_mean(apart, images[both], confidence=CONFIDENCE)
    _, image = np.unique(images[both], return_inverse=True)
    test = mcnemar(a.right[:size][both], b.right[:size][both])
    return PairTest(
        a.selector,
        b.selector,
        a.shots,
        change.mean,
        change.low,
        change.high,
        sign_flip_p(np.bincount(image, weights=apart)),
        test.only_a,
        test.only_b,
        test.p,
        int(both.sum()),
    )


def image_numbers(held: HeldOut) -> np.ndarray:
    """The image of each query as a number, int64 [n]; a query without one is one of its own."""
    named = [
        (q.image_id is None, q.example_id if q.image_id is None else q.image_id)
        for q in held.queries
    ]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(named))}
    return np.array([numbers[name] for name in named], dtype=np.int64)


def evaluations_table(held: HeldOut, outcomes: Sequence[Outcome], scorer: str) -> pa.Table:
    """Rows of the table ``evaluations``, by query and within it in the order of ``outcomes``."""
    n, m = len(held), len(outcomes)
    accuracy = np.stack([o.accuracy for o in outcomes], axis=1).ravel()
    failed = np.isnan(accuracy)
    right = np.stack([o.right for o in outcomes], axis=1).ravel()
    picks = [unpadded(o.pointer) for o in outcomes]
    pointers = [picked[i] for i in range(n) for picked in picks]
    columns = {
        "dataset": pa.repeat(held.dataset, n * m),
        "split": pa.repeat(held.split, n * m),
        "query_id": np.repeat(held.ask.query_ids, m),
        "selector": [o.selector for o in outcomes] * n,
        "shots": [o.shots for o in outcomes] * n,
        "pointer": pointers,
        "prediction": [o.predictions[i] for i in range(n) for o in outcomes],
        "accuracy": pa.array(accuracy, mask=failed),
        "correct": pa.array(right, mask=failed).cast(pa.int8()),
        "error": [o.errors[i] for i in range(n) for o in outcomes],
        "scorer": pa.repeat(scorer, n * m),
        "metric": pa.repeat(held.scoring.name, n * m),
    }
    arrays = [_as(columns[f.name], f.type) for f in EVALUATIONS]
    return pa.Table.from_arrays(arrays, schema=EVALUATIONS)


def _as(values: object, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
