"""What an evaluation found, as values: read by pages and reports, which need nothing else of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


def shots_said(number: int) -> str:
    """A number of demonstrations in words."""
    return "1 shot" if number == 1 else f"{number} shots"


@dataclass(frozen=True)
class Row:
    """One selector at one shot number over the first ``n + failed`` queries.

    ``accuracy`` in [0, 1] over the ``n`` queries answered; ``low`` and ``high`` its 95 % bootstrap
    interval; ``failed``: queries the answerer failed on; ``copied``: share of the wrong answers
    that are the answer of a demonstration shown, ``None`` where none was shown or nothing is wrong.
    ``shown``: demonstrations shown on average, ``None`` where that is ``shots`` on every query.
    """

    selector: str
    shots: int
    accuracy: float
    low: float
    high: float
    n: int
    failed: int
    copied: float | None = None
    shown: float | None = None


@dataclass(frozen=True)
class PairTest:
    """How selector ``a`` differs from ``b`` at one shot number, on the n queries both answered;
    where ``a`` ends pointers early, ``b`` may be zero-shot.

    ``difference``: mean accuracy of a minus that of b, with its 95 % interval and ``p``, that of
    no difference (sign-flip test). Of right or wrong alone: ``only_a`` and ``only_b``, queries only
    one of them gets right, with ``mcnemar_p``.
    """

    a: str
    b: str
    shots: int
    difference: float
    low: float
    high: float
    p: float
    only_a: int
    only_b: int
    mcnemar_p: float
    n: int


@dataclass(frozen=True)
class Scoreboard:
    """What an evaluation found; ``run`` is its id in the store, where it went there, and ``about``
    says what it is of: dataset, split, checkpoints, answerer, date, by name."""

    rows: tuple[Row, ...]
    paired: tuple[PairTest, ...]
    run: str | None = None
    about: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """What its figures are."""
        return self.about.get("metric", "VQA accuracy")

    def to_json(self) -> dict[str, Any]:
        """The scoreboard as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """The scoreboard whose :meth:`to_json` this is."""
        return cls(
            tuple(Row(**row) for row in found["rows"]),
            tuple(PairTest(**pair) for pair in found["paired"]),
            found["run"],
            found["about"],
        )


def read_json(path: Path) -> Scoreboard:
    """A scoreboard that `lever eval --json` wrote."""
    return Scoreboard.of(json.loads(path.read_bytes()))
