"""The examples most similar to a query: of all of them, or of the nearest cells.

In go unit vectors; out come rows, the most similar first. Similarities are compared as where pools
are made, rounded, so that ties go to the earlier example.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lever_train.pack.cells import Cells

_BLOCK = 1 << 20  # similarities in memory at once: 4 MB, which a cache holds
_STRIDES = 16  # similarities of which the highest is looked at first
_ROUNDED = 6  # decimals of a similarity

Ids = npt.NDArray[np.int64]


class Near:
    """Where similar examples are looked for: among ``units`` [n, d], by ``cells`` where given."""

    def __init__(self, units: Tensor, cells: Cells | None) -> None:
        # what a query looks through lies side by side: an eighth of the time of gathering it
        self._units = units if cells is None else units[torch.from_numpy(cells.order)]
        self._cells = cells

    def rows(self, queries: Tensor, count: int) -> Ids:
        """Rows [B, count] of the examples most similar to unit vectors [B, d]."""
        found = np.empty((len(queries), count), dtype=np.int64)
        if self._cells is not None:
            for place, query in enumerate(queries):
                parts = self._cells.near(query, count)
                near = torch.cat([self._units[part] @ query for part in parts])
                rows = np.concatenate([self._cells.order[part] for part in parts])
                found[place] = largest(near[None], rows, count)
            return found
        every, step = np.arange(len(self._units)), max(1, _BLOCK // len(self._units))
        for start in range(0, len(queries), step):
            block = queries[start : start + step] @ self._units.T
            found[start : start + step] = largest(block, every, count)
        return found


def largest(values: Tensor, rows: Ids, count: int) -> Ids:
    """The ``rows`` [m] of the largest values of each line of [B, m], largest first, ties by the
    lower row: [B, count].

    Values count as rounded: only those that may be among the largest then are looked at. These are
    no lower than the ``count`` highest of all strides of values, which are found in a fifth of the
    time of the ``count`` highest values.
    """
    strides = values.shape[1] // _STRIDES
    highest = values
    if strides >= count:
        highest = values[:, : strides * _STRIDES].view(-1, _STRIDES, strides).amax(1)
    floor = highest.topk(count, sorted=False).values.amin(1, keepdim=True)
    line, at = (values >= floor - 2 * 10.0**-_ROUNDED).nonzero(as_tuple=True)
    keys = (values[line, at] * 10**_ROUNDED).round().numpy()
    lines, found = line.numpy(), rows[at.numpy()]
    order = np.lexsort((found, -keys, lines))
    first = np.searchsorted(lines, np.arange(len(values)))
    best: Ids = found[order[first[:, None] + np.arange(count)]]
    return best


def is_one_pool(rows: Ids) -> bool:
    """Whether all queries share one pool, of rows [B, K]."""
    return len(rows) == 1 or bool((rows == rows[:1]).all())
