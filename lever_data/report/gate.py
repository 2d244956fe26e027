"""Gates over an audit's figures: ``fallback_share > 0.05`` fails a build.

In go expressions ``name op number`` and the figures; out come those that hold. A name is a key of
the figures, with dots into what lies below (``classes.mixed``); rows of a table are named by their
first column (``by_gen_method.beam.right_share``). Nothing is evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lever_data.errors import LeverError, UsageError

_GATE = re.compile(
    r"\s*(?P<name>[\w.\- ]+?)\s*(?P<op>>=|<=|==|!=|>|<)\s*"
    r"(?P<number>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<percent>%?)\s*",
    re.IGNORECASE,
)
NUMBERS = (  # figures that are one number each
    "queries",
    "candidates",
    "teachable_share",
    "mean_reward",
    "mixed_deviation",
    "fallback_share",
    "fallback_shots_share",
    "unknown_share",
    "failed_share",
    "missing_share",
    "oracle_gap",
)
TABLES = (  # figures with numbers below them
    "classes",
    "oracle",
    "duplicates",
    "few_annotators",
    "demonstrations",
    "by_gen_method",
    "by_temperature",
    "by_beam_rank",
    "by_shot",
    "eval_modes",
    "logprob_vs_reward",
    "importance_weights",
    "order_sensitivity",
    "answer_copying",
    "reward_modes",
    "reward_spread",
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Gate:
    """One condition that must not hold."""

    text: str
    name: str
    op: str
    number: float


def parse_gate(text: str) -> Gate:
    """Read ``name op number``; the number may end in ``%``.

    Raises:
        UsageError: the text is anything else.
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise UsageError(
            "a gate is a figure, a comparison and a number",
            value=text,
            hint=f'for example --fail-on "fallback_share > 0.05"; one of {" ".join(_COMPARE)}',
        )
    number = float(match["number"]) / (100 if match["percent"] else 1)
    return Gate(text.strip(), match["name"], match["op"], number)


def require_known(gates: Sequence[Gate]) -> None:
    """Refuse gates over figures that no audit has, before the figures take their time.

    What lies below a name (``by_gen_method.beam``) depends on the data; :func:`failing` sees it.

    Raises:
        UsageError: there is no such figure; it suggests the nearest.
    """
    for gate in gates:
        name, dot, _ = gate.name.partition(".")
        if name not in (TABLES if dot else NUMBERS):
            raise _unknown(gate, [*NUMBERS, *(f"{table}.…" for table in TABLES)])


def failing(gates: Sequence[Gate], figures: Mapping[str, Any]) -> list[tuple[Gate, float]]:
    """The gates whose condition holds, with the figure's value.

    Raises:
        UsageError: there is no such figure; it suggests the nearest.
        LeverError: the figure has no value here.
    """
    known = dict(_numbers(figures))
    found = []
    for gate in gates:
        if gate.name not in known:
            raise _unknown(gate, list(known))
        value = known[gate.name]
        if value is None:
            raise LeverError(
                "the figure of a gate has no value in this audit",
                where=str(figures["view"]),
                value=gate.text,
            )
        if _COMPARE[gate.op](value, gate.number):
            found.append((gate, value))
    return found


def _unknown(gate: Gate, known: Sequence[str]) -> UsageError:
    near = get_close_matches(gate.name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    top = ", ".join(name for name in known if "." not in name)
    return UsageError(
        "the audit has no such figure", value=gate.name, hint=f"{hint}figures: {top}, …"
    )


def require_passed(gates: Sequence[Gate], audits: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a gate's condition holds in one of the audits.

    Raises:
        LeverError: names every failing gate, the value and the view.
    """
    found = [
        f"{gate.text} in {figures['view']} (it is {value:.6g})"
        for figures in audits
        for gate, value in failing(gates, figures)
    ]
    if found:
        raise LeverError("the audit gate failed: " + "; ".join(found))


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number below ``value`` by its dotted name."""
    if value is None or isinstance(value, int | float):
        yield path, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _numbers(below, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for row in value:
            if isinstance(row, Mapping):
                first, *rest = row.items()
                for key, below in rest:
                    yield from _numbers(below, f"{path}.{first[1]}.{key}")
