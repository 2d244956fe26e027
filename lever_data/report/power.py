"""What a comparison of two selectors can show: smallest difference, queries needed, early looks.

In go paired differences in [-1, 1] and the groups that share their luck (questions on one image);
out come plain floats. Normal approximation of a mean of many queries throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, erfc, sqrt
from statistics import NormalDist

import numpy as np

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]

_NORMAL = NormalDist()
_POINTS = 401  # of the grid between two bounds: bounds are right to four decimals
_FARTHEST = 8.0  # in standard deviations; beyond it lies 1e-15 of a normal distribution
_upper_tail = np.vectorize(lambda z: erfc(z / sqrt(2)) / 2, otypes=[np.float64])


@dataclass(frozen=True)
class Spread:
    """How much a paired difference varies.

    Attributes:
        deviation: σ such that the mean of n queries has the standard error σ / √n.
        design_effect: variance of the mean over what it were if no two queries shared an image.
        n: queries it was measured on.
    """

    deviation: float
    design_effect: float
    n: int


@dataclass(frozen=True)
class Look:
    """One look of a sequential test: stop there where p is at most ``p`` (|z| at least ``z``)."""

    share: float
    z: float
    p: float


def spread_of(differences: np.ndarray, clusters: np.ndarray | None = None) -> Spread:
    """The spread of paired differences whose clusters are drawn whole.

    Var(mean) = C / (C - 1) · Σ_c (Σ_{i in c} (d_i - mean))² / n² (Cochran 1977, section 9A.5, for
    clusters of unequal size).

    Args:
        differences: float [n], A minus B, one per query.
        clusters: int [n], what each query shares its luck with; ``None``: every query is its own.

    Raises:
        ValueError: fewer than two clusters.
    """
    centred = np.asarray(differences, np.float64) - np.mean(differences)
    n = len(centred)
    _, index = np.unique(np.arange(n) if clusters is None else clusters, return_inverse=True)
    sums = np.bincount(index, weights=centred)
    if len(sums) < 2:
        raise ValueError("a spread takes at least two clusters")
    variance = len(sums) / (len(sums) - 1) * float(sums @ sums) / n
    apart = n / (n - 1) * float(centred @ centred) / n
    return Spread(sqrt(variance), variance / apart if apart else 1.0, n)


def smallest_difference(
    deviation: float, n: int, *, power: float = 0.8, confidence: float = 0.95, inflation: float = 1
) -> float:
    """The true difference that n queries show with this power: (z_{1-α/2} + z_power) · σ / √n."""
    return _z(power, confidence) * deviation * sqrt(inflation / n)


def queries_needed(
    deviation: float,
    difference: float,
    *,
    power: float = 0.8,
    confidence: float = 0.95,
    inflation: float = 1,
) -> int:
    """The queries that show a true difference with this power, rounded up, at least 2."""
    return max(2, ceil(inflation * (_z(power, confidence) * deviation / difference) ** 2))


def _z(power: float, confidence: float) -> float:
    return _NORMAL.inv_cdf((1 + confidence) / 2) + _NORMAL.inv_cdf(power)


def looks(shares: Sequence[float], confidence: float = 0.95) -> list[Look]:
    """Bounds of a two-sided test that may stop at each look and errs once in 1 / (1 - confidence).

    On either side the error is spent as O'Brien and Fleming's bounds do: α(t) is
    2 · (1 - Φ(z_{1-α/4} / √t)) at the share t of the queries (Lan & DeMets 1983), little while the
    data are few. Between looks the sum of what was seen is a Brownian motion; its density below
    the bounds is integrated from look to look (Armitage, McPherson & Rowe 1969).

    Args:
        shares: of all queries that are in at each look, ascending, the last one 1.

    Raises:
        ValueError: the shares do not ascend to 1.
    """
    if not shares or sorted(set(shares)) != list(shares) or shares[0] <= 0 or shares[-1] != 1:
        raise ValueError(f"looks take ascending shares up to 1, not {list(shares)}")
    end = _NORMAL.inv_cdf(1 - (1 - confidence) / 4)
    spent = [float(4 * _upper_tail(end / sqrt(t))) for t in shares]
    found: list[Look] = []
    walk = _Walk()
    for share, upto, before in zip(shares, spent, [0.0, *spent], strict=False):
        bound = _bisect(partial(walk.beyond, share), upto - before)
        walk = walk.kept(share, bound)
        found.append(Look(share, bound, float(2 * _upper_tail(bound))))
    return found


def inflation(bounds: Sequence[Look], *, power: float = 0.8, confidence: float = 0.95) -> float:
    """How many times the queries of a single look a sequential test needs for the same power."""
    if len(bounds) == 1:
        return 1.0

    def missed(drift: float) -> float:
        walk = _Walk(drift)
        for look in bounds:
            walk = walk.kept(look.share, look.z)
        return walk.mass

    drift = _bisect(missed, 1 - power)
    return (drift / _z(power, confidence)) ** 2


class _Walk:
    """A Brownian motion with drift, as far as it stayed between the bounds of the looks so far."""

    def __init__(
        self, drift: float = 0.0, share: float = 0.0, at: FloatArray | None = None,
        weight: FloatArray | None = None,
    ) -> None:  # fmt: skip
        self.drift, self.share = drift, share
        self.at = np.zeros(1) if at is None else at
        self.weight = np.ones(1) if weight is None else weight  # probability of each grid point

    @property
    def mass(self) -> float:
        """The probability to have stayed between all bounds."""
        return float(self.weight.sum())

    def beyond(self, share: float, z: float) -> float:
        """The probability to leave at ``share`` of the information, by |z| on either side."""
        step = sqrt(share - self.share)
        edge, mean = z * sqrt(share), self.at + self.drift * (share - self.share)
        above, below = _upper_tail((edge - mean) / step), _upper_tail((edge + mean) / step)
        return float((above + below) @ self.weight)

    def kept(self, share: float, z: float) -> _Walk:
        """The walk that stayed within |z| at ``share``."""
        step, edge = sqrt(share - self.share), min(z, _FARTHEST + abs(self.drift)) * sqrt(share)
        at = np.linspace(-edge, edge, _POINTS)
        mean = self.at + self.drift * (share - self.share)
        density = np.exp(-(((at[:, None] - mean) / step) ** 2) / 2) @ self.weight
        simpson = np.full(_POINTS, 2.0)
        simpson[1::2], simpson[[0, -1]] = 4.0, 1.0
        width = (at[1] - at[0]) / 3 / (step * sqrt(2 * np.pi))
        return _Walk(self.drift, share, at, density * simpson * width)


def _bisect(falling: Callable[[float], float], wanted: float) -> float:
    """Where a falling function of [0, 40] takes the wanted value."""
    low, high = 0.0, 40.0
    for _ in range(50):
        middle = (low + high) / 2
        if falling(middle) > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
