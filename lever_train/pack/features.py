"""What a packed selector reads of pairs: the SQL it was trained with, over the pack's own examples.

In go queries and the rows of their pools; out come values [B, K, F], with the votes of the pool
behind them where they are read: those of ``lever eval``. DuckDB runs the SQL of features that have
no twin in ``twins.py``, and only packs of selectors that read features import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
from lever_train.pack.twins import PoolArrays, have_twins, twin_values

Vectors = Mapping[str, npt.ArrayLike | Tensor]  # by the name of their space
_PLACE = ("", "questions", "examples")  # two splits: no question is one of the examples


@dataclass(frozen=True)
class PackedFeatures:
    """``asked``: the features, in the order in which the selector reads them. ``spaces``: vectors
    [n, d] of the examples in each space in which a feature compares them, in their order.
    ``votes``: whether it also reads the votes of the pool."""

    asked: tuple[Relation, ...]
    spaces: Mapping[str, Tensor]
    votes: bool = False
    _said: Answers | None = field(default=None, init=False, repr=False, compare=False)

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
        real = rows >= 0
        used, index = np.unique(rows[real], return_inverse=True)
        pool = np.full(rows.shape, -1, dtype=np.int64)
        pool[real] = index
        at = torch.from_numpy(used)
        spaces = {
            (left, right): (
                _space(given, left, self.spaces[right], len(queries)), self.spaces[right][at]
            )
            for left, right in sql.cosines_read(self.asked)
        }  # fmt: skip
        words = [""] * len(queries)  # which no feature reads
        pairs = Pairs(None, _PLACE, np.arange(len(queries)), pool, queries, vectors[at], words, {})
        if not have_twins(self.asked):
            pairs = replace(pairs, examples=_items(examples.take(pa.array(used))))
            return torch.from_numpy(pair_values(pairs, self.asked, spaces, votes=self.votes))
        answers = self._answers(examples).among(replace(pairs, pool=rows))
        near = {("", ""): (queries, vectors[at])} | spaces
        pair, said = answers.said(rows[real], np.ones(len(index), dtype=bool))
        arrays = PoolArrays(
            np.nonzero(real)[0],
            answers.of[rows[real]],
            {
                name: cosines(normalize(asked, dim=-1), normalize(shown, dim=-1), pool)[real]
                for name, (asked, shown) in near.items()
            },
            pair,
            answers.code[said],
            answers.share[said],
        )
        values = twin_values(self.asked, arrays).round(sql.DECIMALS)
        found = np.zeros((*rows.shape, values.shape[1]), np.float32)
        found[real] = values
        if self.votes:
            found = np.concatenate([found, answers.votes(np.arange(len(rows)))], axis=-1)
        return torch.from_numpy(found)

    def _answers(self, examples: pa.Table) -> Answers:
        """What was said of all examples, counted when the first question is asked."""
        if self._said is None:
            every = np.zeros((0, 1), dtype=np.int64)
            none = torch.zeros(0, 0)
            pairs = Pairs(None, _PLACE, every[:, 0], every, none, none, [], _items(examples))
            object.__setattr__(self, "_said", Answers(pairs))
        assert self._said is not None
        return self._said


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
