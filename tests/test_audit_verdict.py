"""The verdict's sentences: praise only where something is good, advice that fits the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lever_data.relations.reward_spec import RewardSpec
from lever_data.report.audit import audit
from lever_data.report.options import AuditRequest
from lever_data.report.page import percent
from lever_data.report.verdict import Finding, verdict
from tests.audits import rows
from tests.cases import long
from tests.stores import candidate, commit, new_store


def _verdict(path: Path, made: list[dict[str, Any]], reward: RewardSpec) -> list[Finding]:
    store = new_store(path)
    commit(store, made)
    return verdict(audit(store, AuditRequest(reward=reward)).figures)


def _scored(query: int, ordinal: int, right: int, method: str, *pointer: int) -> dict[str, Any]:
    scores = {"correct": right, "score": float(right), "eval_mode": "file"}
    return candidate(query, ordinal, pointer or (ordinal + 21,), gen_method=method, **scores)


@pytest.mark.slow
def test_it_opens_with_what_can_teach(tmp_path: Path) -> None:
    found = _verdict(tmp_path, rows(), RewardSpec())
    assert (
        found[0].text
        == "1 of 2 queries (50.0 %) can teach anything; the rest are flat: 1 all wrong."
    )
    assert found[1].level == "bad"
    assert found[1].advice == "`lever rescore` replaces them by the official metric."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixed", "level"), [long(0, "bad"), long(3, "fair"), (4, "fair"), (6, "good")]
)
def test_what_teaches_little_is_not_good(tmp_path: Path, mixed: int, level: str) -> None:
    made = [_scored(q, i, int(q < mixed and i == 0), "beam") for q in range(10) for i in range(2)]
    assert _verdict(tmp_path, made, RewardSpec())[0].level == level


def test_shares_as_people_read_them() -> None:
    shown = [percent(share) for share in (0.123, 0, 0.0001, None)]
    assert shown == ["12.3 %", "0.0 %", "< 0.1 %", "–"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rights", "reward", "advice"),
    [
        ((0, 0), RewardSpec(), "Propose more candidates"),
        long((1, 1), RewardSpec(), "nothing left to teach"),
        ((0, 1), RewardSpec(expression="1"), "does not tell the candidates of a query apart"),
        long((0, 1), RewardSpec(expression="query_id + 1"), "does not tell the candidates"),
    ],
)
def test_the_advice_fits_why_queries_are_flat(
    tmp_path: Path, rights: tuple[int, int], reward: RewardSpec, advice: str
) -> None:
    made = [_scored(q, i, right, "beam") for q in range(3) for i, right in enumerate(rights)]
    first, *others = _verdict(tmp_path, made, reward)
    assert first.level == "bad"
    assert advice in first.advice
    assert not [f for f in others if "teach" in f.text]


@pytest.mark.slow
def test_a_source_that_nothing_needs_is_not_praised(tmp_path: Path) -> None:
    made = [_scored(0, i, i % 2, method) for i, method in enumerate(["beam"] * 2 + ["sample"] * 2)]
    found = _verdict(tmp_path, made, RewardSpec())
    assert ("fair", "No source is needed") in [(f.level, f.text[:19]) for f in found]


@pytest.mark.slow
@pytest.mark.parametrize(("right", "level"), [long(0, "good"), (1, "fair")])
def test_a_reward_that_hangs_on_the_order_is_no_good_news(
    tmp_path: Path, right: int, level: str
) -> None:
    made = [_scored(0, 0, 0, "beam", 1, 2), _scored(0, 1, right, "beam", 2, 1)]
    found = [f for f in _verdict(tmp_path, made, RewardSpec()) if "Reordering" in f.text]
    assert [f.level for f in found] == [level]


@pytest.mark.long
def test_scores_of_several_models_are_named(tmp_path: Path) -> None:
    made = [_scored(0, i, i, "beam") | {"scorer": "ab"[i]} for i in range(2)]
    found = [f for f in _verdict(tmp_path, made, RewardSpec()) if "models" in f.text]
    assert [f.text for f in found] == ["The scores are those of 2 models: a, b."]
    assert "--scorer" in found[0].advice
    made = [row | {"scorer": "a"} for row in made]
    alone = _verdict(tmp_path / "one", made, RewardSpec())
    assert not [f for f in alone if "models" in f.text]
