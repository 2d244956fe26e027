"""Gates over an audit's figures: what holds, what is none, what is refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.report.audit import audit
from lever_data.report.gate import (
    NUMBERS,
    TABLES,
    failing,
    parse_gate,
    require_known,
    require_passed,
)
from lever_data.report.options import AuditRequest
from tests.audits import rows
from tests.stores import commit, new_store

FIGURES = {
    "view": "v",
    "fallback_share": 0.07,
    "classes": {"mixed": 3},
    "by_gen_method": [{"gen_method": "beam", "right_share": 0.2}],
    "oracle_gap": None,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("fallback_share > 0.05", True),
        ("fallback_share>5%", True),
        ("fallback_share > 7e-2", False),
        ("fallback_share >= .07", True),
        ("classes.mixed == 3", True),
        ("classes.mixed != 3", False),
        (" by_gen_method.beam.right_share <= 0.1 ", False),
        ("classes.mixed < -1", False),
    ],
)
def test_gates(text: str, holds: bool) -> None:
    assert bool(failing([parse_gate(text)], FIGURES)) is holds


@pytest.mark.parametrize("text", ["", "fallback_share", "fallback_share > x", "1 > 0 > 1", "a;b>1"])
def test_gates_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="a figure, a comparison and a number"):
        parse_gate(text)


def test_gates_over_figures_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="no such figure") as caught:
        failing([parse_gate("fallback_shar > 0")], FIGURES)
    assert "did you mean fallback_share?" in str(caught.value.hint)
    with pytest.raises(LeverError, match="has no value in this audit"):
        failing([parse_gate("oracle_gap > 0")], FIGURES)


@pytest.mark.slow
def test_gates_are_refused_before_the_work(tmp_path: Path) -> None:
    made = new_store(tmp_path)
    commit(made, rows())
    figures = audit(made, AuditRequest()).figures
    texts = {"view", "reward_mode", "reward", "places", "runs", "inputs", "scorers"}
    assert {*NUMBERS, *TABLES} == set(figures) - texts
    assert set(NUMBERS) == {n for n in figures if n not in texts and "." not in n} - set(TABLES)
    require_known([parse_gate("classes.mixed < 1"), parse_gate("mean_reward < 0")])
    for name in ("fallback_shar", "view", "classes", "mean_reward.x", "nothing.mixed"):
        with pytest.raises(UsageError, match="no such figure"):
            require_known([parse_gate(f"{name} > 0")])


def test_a_failing_gate_names_value_and_view() -> None:
    gates = [parse_gate("fallback_share > 0.05"), parse_gate("classes.mixed > 9")]
    with pytest.raises(LeverError) as caught:
        require_passed(gates, [FIGURES])
    assert caught.value.what == "the audit gate failed: fallback_share > 0.05 in v (it is 0.07)"
