"""Candidates of a batch: every distinct example once, and where each query's pool points.

In go candidate vectors as [K, d] (one pool for all queries), [B, K, d] (one pool a query) or
distinct examples with an index; out comes a :class:`Pool`, which every selector reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pool:
    """The candidates of B queries.

    ``vectors`` [U, d] float: distinct examples, each once.
    ``index`` [B, K] int64 into ``vectors``; ``None``: every query's pool is all of ``vectors``
    in order, and nothing of size [B, K, d] is ever made.
    ``mask`` [B, K] bool, False where a pool is padded; ``None``: nothing is padded.
    """

    vectors: Tensor
    index: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, candidates: Tensor | Pool, mask: Tensor | None = None) -> Pool:
        """A pool from vectors [K, d] or [B, K, d] (or a pool already made)."""
        if isinstance(candidates, Pool):
            return candidates
        if candidates.dim() == 2:
            return cls(candidates, None, mask)
        B, K, d = candidates.shape
        index = torch.arange(B * K, device=candidates.device).view(B, K)
        return cls(candidates.reshape(B * K, d), index, mask)

    @classmethod
    def distinct(cls, table: Tensor, ids: Tensor) -> Pool:
        """A pool of rows of ``table`` [n, d]; ``ids`` [B, K] int64, -1 where padded.

        Rows that several pools share are gathered, and later projected, once.
        """
        real = ids >= 0
        used = torch.zeros(table.shape[0], dtype=torch.bool, device=ids.device)
        used[ids[real]] = True
        place = used.cumsum(0) - 1
        index = place[ids.clamp(min=0)].masked_fill(~real, 0)
        rows = used.nonzero().squeeze(1)
        return cls(table.index_select(0, rows.to(table.device)), index, _or_none(real))

    @property
    def size(self) -> int:
        """K, the padded size of the pools."""
        return self.vectors.shape[0] if self.index is None else self.index.shape[1]

    def gathered(self, values: Tensor) -> Tensor:
        """Rows of ``values`` [U, …] as [B, K, …]; only for pools with an index."""
        if self.index is None:
            raise AssertionError("a shared pool is never copied per query")
        return torch.nn.functional.embedding(self.index, values)

    def at(self, positions: Tensor) -> Tensor:
        """The vectors at pool ``positions`` [B, N]: [B, N, d]."""
        rows = positions if self.index is None else self.index.gather(1, positions)
        return torch.nn.functional.embedding(rows, self.vectors)


def _or_none(mask: Tensor) -> Tensor | None:
    return None if bool(mask.all()) else mask
