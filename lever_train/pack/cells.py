"""Examples in cells of similar ones, so that a query of a million looks through some thousands.

In go unit vectors; out come, for a query, the rows of the cells whose centres are nearest. What
lies near the query in a cell further off is missed: docs/use.md says how often. Centres are those
of spherical k-means (Dhillon and Modha 2001), of a sample, with a fixed seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

PROBES = 16  # cells that a query looks through, more where they hold fewer than a pool
_SAMPLE = 50  # vectors a cell from which centres are made
_TURNS = 6
_ROWS = 1 << 14  # vectors compared with all centres at once

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """``centres`` [C, d], of length 1; ``cell`` [n], that of each row; ``order`` [n]: the rows, by
    cell, so that what a query looks through lies side by side."""

    centres: Tensor
    cell: Tensor
    order: Ids = field(init=False, repr=False)
    _stops: Ids = field(init=False, repr=False)

    def __post_init__(self) -> None:
        cell, count = self.cell.numpy(), len(self.centres)
        object.__setattr__(self, "order", np.argsort(cell, kind="stable"))
        object.__setattr__(self, "_stops", np.bincount(cell, minlength=count).cumsum())

    @classmethod
    def of(cls, units: Tensor) -> Cells:
        """2 √n cells of unit vectors [n, d]."""
        count = max(1, round(2 * math.sqrt(len(units))))
        draw = torch.randperm(len(units), generator=torch.Generator().manual_seed(0))
        sample = units[draw[: count * _SAMPLE]]
        centres = sample[:count]
        for _ in range(_TURNS):
            sums = torch.zeros_like(centres).index_add_(0, nearest(sample, centres), sample)
            is_empty = sums.norm(dim=1) == 0
            centres = torch.where(is_empty[:, None], centres, normalize(sums, dim=1))
        return cls(centres, nearest(units, centres))

    def with_more(self, units: Tensor, order: Ids) -> Cells:
        """The same with more vectors, then all of them in this order; centres stay."""
        cell = torch.cat([self.cell, nearest(units, self.centres)])
        return Cells(self.centres, cell[torch.from_numpy(order)])

    def near(self, unit: Tensor, count: int) -> list[slice]:
        """Parts of ``order``, at least ``count`` rows: the cells nearest to a unit vector [d]."""
        at = (self.centres @ unit).argsort(descending=True, stable=True).numpy()
        stops = self._stops[at]
        starts = np.where(at > 0, self._stops[at - 1], 0)
        enough = int(np.searchsorted((stops - starts).cumsum(), count)) + 1
        probed = max(PROBES, enough)
        return [slice(a, b) for a, b in zip(starts[:probed], stops[:probed], strict=True)]


def nearest(units: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre [n] int64 of each unit vector."""
    return torch.cat([(part @ centres.T).argmax(1) for part in torch.split(units, _ROWS)])
