"""The features of pairs that come with lever, in arrays: of one question DuckDB takes ten times as
long for them.

In go the two relations a feature reads, as arrays; out come its values. The SQL is what counts: a
twin stands for it only where the pack's SQL is the one here, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from lever_data import catalog
from lever_data.catalog import Relation

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PoolArrays:
    """``pool_pairs`` of R pairs, by query and place, and ``pool_answers`` of A answers.

    ``query`` [R]: numbers from 0 on; ``answer`` [R]: its code, -1 for none; ``cosines`` [R] of
    vectors by the names of their spaces, ``similarity`` under ``("", "")``. Of each answer given:
    ``pair`` [A] whose annotators gave it, its ``code`` and the ``share`` of them.
    """

    query: Ids
    answer: Ids
    cosines: Mapping[tuple[str, str], Values]
    pair: Ids
    code: Ids
    share: Values

    def gap(self, spaces: tuple[str, str]) -> Values:
        """Each cosine less the highest of its query's."""
        cosine = self.cosines[spaces]
        highest = np.full(int(self.query.max(initial=-1)) + 1, -np.inf)
        np.maximum.at(highest, self.query, cosine)
        return np.asarray(cosine - highest[self.query])


def have_twins(asked: Sequence[Relation]) -> bool:
    """Whether all of these features are the ones that have a twin."""
    own = catalog.features()
    return all(f.name in _TWINS and own[f.name].sql == f.sql for f in asked)


def twin_values(asked: Sequence[Relation], arrays: PoolArrays) -> Values:
    """Values [R, F] as the SQL gives them, in its order; not rounded."""
    return np.stack([column for f in asked for column in _TWINS[f.name](arrays)], axis=1)


def _vote(arrays: PoolArrays) -> list[Values]:
    size = 1 + int(max(arrays.code.max(initial=0), arrays.answer.max(initial=0)))
    keys, number = np.unique(
        arrays.query[arrays.pair] * size + arrays.code, return_inverse=True
    )  # the answers given in each pool
    wanted = arrays.query * size + arrays.answer
    at = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
    is_given = (arrays.answer >= 0) & (keys[at] == wanted) if len(keys) else wanted < 0
    gap, shares = arrays.gap(("", "")), []
    for temperature in (0.05, 0.1, 0.2):
        weight = np.exp(gap / temperature)[arrays.pair] * arrays.share
        votes = np.bincount(number, weight, minlength=len(keys))
        total = np.bincount(keys // size, votes, minlength=int(arrays.query.max(initial=-1)) + 1)
        share = np.zeros(len(wanted))
        share[is_given] = votes[at[is_given]] / total[arrays.query[is_given]]
        shares.append(share)
    return [*shares, *(np.log(share + 0.001) for share in shares)]


def _agreement(arrays: PoolArrays) -> list[Values]:
    is_own = arrays.code == arrays.answer[arrays.pair]
    found = np.zeros(len(arrays.query))
    found[arrays.pair[is_own]] = arrays.share[is_own]
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
