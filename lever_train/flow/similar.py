"""Pools of the most similar train items, where a data set comes without.

In go query and candidate vectors; out comes an int array [n, K] of candidate rows, most similar
first. Cosine similarity; ties go to the lower row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lever_data.errors import UsageError

_BLOCK = 1024  # queries at a time: the similarities of one block are in memory


def similar_pools(
    queries: Tensor, candidates: Tensor, size: int, *, leave_out_self: bool
) -> np.ndarray:
    """The ``size`` most similar candidates of every query, int32 [n, size].

    Args:
        queries: [n, d] float.
        candidates: [m, d] float.
        size: at most m, less one where the query itself is left out.
        leave_out_self: queries and candidates are the same items.

    Raises:
        UsageError: there are fewer candidates.
    """
    room = len(candidates) - int(leave_out_self)
    if size > room:
        raise UsageError("a pool cannot be larger than the data", value=f"{size} of {room}")
    left, right = normalize(queries, dim=-1), normalize(candidates, dim=-1)
    found = np.empty((len(queries), size), dtype=np.int32)
    for start in range(0, len(queries), _BLOCK):
        block = (left[start : start + _BLOCK] @ right.T).round(decimals=6)
        if leave_out_self:
            rows = torch.arange(len(block))
            block[rows, rows + start] = float("-inf")
        order = block.sort(dim=-1, descending=True, stable=True).indices
        found[start : start + _BLOCK] = order[:, :size].numpy()
    return found
