"""The features of pairs that come with lever, in arrays: of one question DuckDB takes ten times as
long for them.

In go the two relations a feature reads, as arrays; out come its values. The SQL is what counts: a
twin stands for it only where the pack's SQL is the one here, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from lever_data import catalog
from lever_data.catalog import Relation

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PoolAnswers:
    """``pool_answers`` of A answers given in pools of R pairs, by query and place.

    ``query`` [R]: numbers from 0 on; ``answer`` [R]: its code, -1 for none. Of each answer given:
    ``pair`` [A] whose annotators gave it, its ``code`` and the ``share`` of them.
    """

    query: Ids
    answer: Ids
    pair: Ids
    code: Ids
    share: Values

    @property
    def queries(self) -> int:
        """How many pools there are."""
        return int(self.query.max(initial=-1)) + 1

    @cached_property
    def groups(self) -> tuple[Ids, Ids, Ids]:
        """The G distinct answers of each pool: their queries [G]; which one each answer given is
        [A]; which one each pair shows [R], -1 where nobody gave it."""
        size = 1 + int(max(self.code.max(initial=0), self.answer.max(initial=0)))
        given = self.query[self.pair] * size + self.code
        keys, number = np.unique(given, return_inverse=True)
        wanted = self.query * size + self.answer
        if not len(keys):  # nobody said anything
            return keys, number, np.full(len(wanted), -1)
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        is_given = (self.answer >= 0) & (keys[at] == wanted)
        return keys // size, number, np.where(is_given, at, -1)


@dataclass(frozen=True)
class PoolArrays:
    """``pool_pairs`` of R pairs and what was said in their pools.

    ``cosines`` [R] of vectors by the names of their spaces, ``similarity`` under ``("", "")``.
    """

    answers: PoolAnswers
    cosines: Mapping[tuple[str, str], Values]

    def gap(self, spaces: tuple[str, str]) -> Values:
        """Each cosine less the highest of its query's."""
        cosine, query = self.cosines[spaces], self.answers.query
        highest = np.full(self.answers.queries, -np.inf)
        np.maximum.at(highest, query, cosine)
        return np.asarray(cosine - highest[query])


def have_twins(asked: Sequence[Relation]) -> bool:
    """Whether all of these features are the ones that have a twin."""
    own = catalog.features()
    return all(f.name in _TWINS and own[f.name].sql == f.sql for f in asked)


def twin_values(asked: Sequence[Relation], arrays: PoolArrays) -> Values:
    """Values [R, F] as the SQL gives them, in its order; not rounded."""
    return np.stack([column for f in asked for column in _TWINS[f.name](arrays)], axis=1)


def _vote(arrays: PoolArrays) -> list[Values]:
    answers, gap, shares = arrays.answers, arrays.gap(("", "")), []
    query, number, shown = answers.groups
    is_given = shown >= 0
    for temperature in (0.05, 0.1, 0.2):
        weight = np.exp(gap / temperature)[answers.pair] * answers.share
        votes = np.bincount(number, weight, minlength=len(query))
        total = np.bincount(query, votes, minlength=answers.queries)
        share = np.zeros(len(shown))
        share[is_given] = votes[shown[is_given]] / total[answers.query[is_given]]
        shares.append(share)
    return [*shares, *(np.log(share + 0.001) for share in shares)]


def _agreement(arrays: PoolArrays) -> list[Values]:
    answers = arrays.answers
    is_own = answers.code == answers.answer[answers.pair]
    found = np.zeros(len(answers.query))
    found[answers.pair[is_own]] = answers.share[is_own]
    return [found]


def _cosine(arrays: PoolArrays, *, spaces: tuple[str, str]) -> list[Values]:
    return [arrays.cosines[spaces], arrays.gap(spaces)]


_TWINS: dict[str, Callable[[PoolArrays], list[Values]]] = {
    "vote": _vote,
    "agreement": _agreement,
    "cosine_question": partial(_cosine, spaces=("question", "question")),
    "cosine_picture": partial(_cosine, spaces=("picture", "picture")),
    "cosine_both": partial(_cosine, spaces=("both", "both")),
    "cosine_answer": partial(_cosine, spaces=("question", "answer")),
}
