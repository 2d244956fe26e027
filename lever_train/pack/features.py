"""What a packed selector reads of pairs: the SQL it was trained with, over the pack's own examples.

In go queries and the rows of their pools; out come values [B, K, F], with the votes of the pool
behind them where they are read: those of ``lever eval``. DuckDB runs the SQL of features that have
no twin in ``twins.py``, and only packs of selectors that read features import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lever_data import catalog
from lever_data.catalog import Relation
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import majority
from lever_data.items.prompts import Item
from lever_data.relations import features as sql
from lever_train.inputs.pair_features import Answers, Pairs, cosines, pair_values
from lever_train.options.train import ModelConfig
from lever_train.pack.near import is_one_pool
from lever_train.pack.twins import PoolAnswers, PoolArrays, have_twins, twin_values

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Vectors = Mapping[str, npt.ArrayLike | Tensor]  # by the name of their space
_PLACE = ("", "questions", "examples")  # two splits: no question is one of the examples
_NONE = torch.zeros(0, 0)


@dataclass(frozen=True)
class Pools:
    """What pools [B, K] bring whatever is asked: ``rows`` of the examples, -1 where padded;
    ``used`` [U], each once; ``index`` [B, K] into them; ``tables`` [U, d] of their unit vectors by
    names of spaces; what was ``said`` in them; ``votes`` [B, K, K], or [1, K, K] of one that all
    share, where they are read."""

    rows: Ids
    used: Ids
    index: Ids
    tables: Mapping[tuple[str, str], Tensor]
    said: PoolAnswers
    votes: Values | None

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """Where there is a candidate."""
        return self.rows >= 0

    @property
    def are_one(self) -> bool:
        """Whether all queries share one pool."""
        return is_one_pool(self.rows)


@dataclass(frozen=True)
class PackedFeatures:
    """``asked``: the features, in the order in which the selector reads them. ``spaces``: vectors
    [n, d] of the examples in each space in which a feature compares them, in their order.
    ``votes``: whether it also reads the votes of the pool."""

    asked: tuple[Relation, ...]
    spaces: Mapping[str, Tensor]
    votes: bool = False
    _said: Answers | None = field(default=None, init=False, repr=False, compare=False)
    _last: Pools | None = field(default=None, init=False, repr=False, compare=False)

    def definitions(self) -> dict[str, str]:
        """The SQL of each feature, by its name and digest."""
        return {f"{feature.name}@{sql.sha256(feature)}": feature.sql for feature in self.asked}

    @classmethod
    def read(
        cls, config: ModelConfig, definitions: Mapping[str, str], spaces: Mapping[str, Tensor]
    ) -> PackedFeatures:
        """The features that a selector of this kind reads, from their SQL.

        Raises:
            LeverError: one is missing, or is not the one of the training.
        """
        asked = []
        for name in config.pair_features:
            found = catalog.parse(name.partition("@")[0], "features", definitions.get(name, ""))
            if f"{found.name}@{sql.sha256(found)}" != name:
                raise LeverError("the pack lacks a feature as it was trained with", value=name)
            asked.append(found)
        return cls(tuple(asked), spaces, config.votes)

    def with_more(self, given: Vectors, count: int, order: np.ndarray) -> PackedFeatures:
        """The same with ``count`` more examples, then all of them in this order.

        Raises:
            UsageError: their vectors are not given.
        """
        at = torch.from_numpy(order)
        spaces = {
            name: torch.cat([vectors, _space(given, name, vectors, count)])[at]
            for name, vectors in self.spaces.items()
        }
        return replace(self, spaces=spaces)

    def of_queries(self, given: Vectors, count: int) -> dict[str, Tensor]:
        """The vectors [count, d] of queries in every space that a feature reads.

        Raises:
            UsageError: a space is not given, or not in this shape.
        """
        return {
            left: _space(given, left, self.spaces[right], count) for left, right in self._compared
        }

    def values(
        self,
        queries: Tensor,
        rows: np.ndarray,
        examples: pa.Table,
        vectors: Tensor,
        given: Vectors,
    ) -> Tensor:
        """Values [B, K, F] of queries [B, d] and the ``rows`` [B, K] of their pools, -1 where
        padded.

        Args:
            examples: of the pack, with their ``vectors`` [n, d].
            given: vectors of the queries in each space in which a feature compares them.

        Raises:
            UsageError: a space is not given.
        """
        pools = self._pools(rows, examples, vectors)
        asked = {("", ""): queries} | {
            (left, right): _space(given, left, self.spaces[right], len(queries))
            for left, right in self._compared
        }
        if not self._have_twins:
            return torch.from_numpy(self._by_sql(pools, asked, examples, vectors))
        near = {
            name: _cosines(normalize(vectors, dim=-1), pools.tables[name], pools)
            for name, vectors in asked.items()
        }
        values = twin_values(self.asked, PoolArrays(pools.said, near)).round(sql.DECIMALS)
        found = np.zeros((*rows.shape, values.shape[1]), np.float32)
        found[pools.real] = values
        if pools.votes is not None:
            votes = np.broadcast_to(pools.votes, (*rows.shape, rows.shape[1]))
            found = np.concatenate([found, votes], axis=-1)
        return torch.from_numpy(found)

    @cached_property
    def _have_twins(self) -> bool:
        return have_twins(self.asked)

    @cached_property
    def _compared(self) -> list[tuple[str, str]]:
        return sql.cosines_read(self.asked)

    def _pools(self, rows: Ids, examples: pa.Table, vectors: Tensor) -> Pools:
        """What these pools bring; of one pool it is kept until another is asked for: a question at
        a time it is half of the work."""
        last = self._last
        if last is not None and np.array_equal(last.rows, rows):
            return last
        real = rows >= 0
        used, at = np.unique(rows[real], return_inverse=True)
        index = np.full(rows.shape, -1, dtype=np.int64)
        index[real] = at
        here = torch.from_numpy(used)
        tables = {("", ""): vectors[here]}
        tables |= {(left, right): self.spaces[right][here] for left, right in self._compared}
        answers, numbers = self._answers(examples), np.arange(len(rows))
        pair, said = answers.said(rows[real], np.ones(len(at), dtype=bool))
        votes = None
        if self.votes:
            places = numbers[:1] if is_one_pool(rows) else numbers
            pairs = Pairs(None, _PLACE, numbers, rows, _NONE, _NONE, [""] * len(rows), {})
            votes = answers.among(pairs).votes(places)
        found = Pools(
            rows,
            used,
            index,
            {name: normalize(table, dim=-1) for name, table in tables.items()},
            PoolAnswers(
                np.nonzero(real)[0],
                answers.of[rows[real]],
                pair,
                answers.code[said],
                answers.share[said],
            ),
            votes,
        )
        if len(rows) == 1:
            object.__setattr__(self, "_last", found)
        return found

    def _by_sql(
        self,
        pools: Pools,
        asked: Mapping[tuple[str, str], Tensor],
        examples: pa.Table,
        vectors: Tensor,
    ) -> Values:
        """Values by DuckDB, for features that have no twin."""
        numbers, here = np.arange(len(pools.rows)), torch.from_numpy(pools.used)
        pairs = Pairs(
            None,
            _PLACE,
            numbers,
            pools.index,
            asked["", ""],
            vectors[here],
            [""] * len(numbers),  # words of the questions, which no feature reads
            _items(examples.take(pa.array(pools.used))),
        )
        spaces = {
            (left, right): (asked[left, right], self.spaces[right][here])
            for left, right in self._compared
        }
        return pair_values(pairs, self.asked, spaces, votes=self.votes)

    def _answers(self, examples: pa.Table) -> Answers:
        """What was said of all examples, counted when the first question is asked."""
        if self._said is None:
            object.__setattr__(self, "_said", Answers.of_rows(examples, _PLACE))
        assert self._said is not None
        return self._said


def _cosines(query: Tensor, table: Tensor, pools: Pools) -> Values:
    """Cosines [R] of unit vectors; one product where all share a pool."""
    if not pools.are_one:
        return cosines(query, table, pools.index)[pools.real]
    near = query.double() @ table[torch.from_numpy(pools.index[0])].double().T
    return np.asarray(near.round(decimals=sql.DECIMALS).numpy()[pools.real])


def _space(given: Vectors, name: str, like: Tensor, count: int) -> Tensor:
    """``count`` vectors in a space that a feature reads, as wide as ``like``."""
    if name not in given:
        raise UsageError(
            f"the selector also reads vectors in the space {name!r}",
            hint=f"spaces={{{name!r}: vectors}}",
        )
    found = torch.as_tensor(np.asarray(given[name]), dtype=torch.float32)
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or tuple(found.shape) != (count, like.shape[1]):
        raise UsageError(
            f"{count} vectors of width {like.shape[1]} are wanted in the space {name!r}",
            value=list(found.shape),
        )
    if not bool(found.isfinite().all()):
        raise UsageError(f"a vector in the space {name!r} holds NaN or infinity")
    return found


def _items(examples: pa.Table) -> dict[int, Item]:
    found = {}
    rows = examples.select(["question", "answers", "answer"]).to_pylist()
    for number, row in enumerate(rows):
        question, answers, answer = row.values()
        said = tuple(answers or ())
        shown = majority(said) if answer is None else answer
        found[number] = Item("", "examples", number, question or "", said, shown)
    return found
