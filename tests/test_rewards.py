"""The reward macros against the legacy code's figures and against formulas written out here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import duckdb
import pytest

from lever_data import connect
from lever_data.catalog import macros, reward_modes
from lever_data.errors import LeverError, UsageError
from lever_data.older import NAMES
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import require_scores, reward_sql
from tests.stores import candidate, commit, new_store

CASES = json.loads((Path(__file__).parent / "data" / "rewards.json").read_text())["cases"]


def _con(tmp_path: Path, rows: list[dict[str, Any]], **connect_options: Any) -> Any:
    store = new_store(tmp_path)
    commit(store, [candidate(0, i, [i], **row) for i, row in enumerate(rows)])
    return connect(store, only=["all_candidates", "candidate_info"], **connect_options)


def _rewards(con: duckdb.DuckDBPyConnection, spec: RewardSpec) -> list[float]:
    sql = f"select {reward_sql(spec)} from candidates as v order by candidate"
    return [row[0] for row in con.execute(sql).fetchall()]


@pytest.mark.slow
def test_every_golden_case_is_equal_to_the_last_bit(tmp_path: Path) -> None:
    columns = ("beam_score", "logprob_score", "vqa_correct", "vqa_acc_score")
    con = _con(tmp_path, [{NAMES.get(c, c): case[c] for c in columns} for case in CASES])
    con.execute("create table golden as select * from candidates")  # 360 scans of Parquet are slow
    wrong = []
    for index, case in enumerate(CASES):
        spec = RewardSpec(
            mode=case["reward_mode"],
            hard_weight=case["hard_weight"],
            soft_weight=case["soft_weight"],
            reward_alpha=case.get("alpha", 0.0),
            reward_beta=case.get("beta", 0.0),
            correctness_mode=case.get("correctness_mode", "01"),
            use_logprob=case.get("use_logprob", False),
        )
        sql = f"select {reward_sql(spec)} from golden as v where candidate = {index}"
        found = con.execute(sql).fetchall()[0][0]
        if found != case["expected"]:
            wrong.append((index, found, case))
    assert len(CASES) == 360
    assert not wrong


def _gt_rows() -> list[dict[str, Any]]:
    draw = random.Random(7)
    return [
        {
            "correct": draw.choice([0, 1, None]),
            "expected_score": draw.choice([None, draw.random()]),
            "similarity": draw.choice([None, draw.random()]),
        }
        for _ in range(60)
    ]


@pytest.mark.parametrize("mode", [m for m in reward_modes() if "gtprob" in m])
def test_gt_prob_modes_against_the_formula(tmp_path: Path, mode: str) -> None:
    rows = _gt_rows()
    spec = RewardSpec(mode=mode, hard_weight=0.7, soft_weight=1.3, rel_weight=0.4)
    expected = []
    for row in rows:
        hard, gt = row["correct"] or 0, row["expected_score"] or 0.0
        rel = row["similarity"] or 0.0
        expected.append(
            {
                "hard01_plus_gtprob": 0.7 * hard + 1.3 * gt,
                "hard01_plus_gtprob_separated": (1.4 if hard else 0.0) + 1.3 * gt,
                "hard_plus_gtprob_plus_rel": 0.7 * hard + 1.3 * gt + 0.4 * (1 - hard) * rel,
            }[mode]
        )
    assert _rewards(_con(tmp_path, rows), spec) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_hybrid_joins_the_info_score_of_the_ordered_pointer(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(
        store,
        [
            candidate(0, 0, [1, 2], beam_score=5.0, correct=1, score=0.6),
            candidate(0, 1, [2, 1], beam_score=3.0, correct=0, score=0.0),
            candidate(0, 2, [3, 4], correct=0, score=0.0),
        ],
    )
    commit(store, [candidate(0, 0, [1, 2], info_score=-1.0, beam_rank=0)], kind="beam", name="b")
    con = connect(store)
    # raw info: -1 (joined), 3 (beam score), unknown; normalised to 0, 1 and nothing.
    found = _rewards(con, RewardSpec(mode="hybrid", hybrid_alpha=0.25))
    assert found == pytest.approx([0.75 * 1.6, 0.25, 0.0])


@pytest.mark.slow
def test_multi_shot_weighs_every_prefix_and_refuses_a_missing_one(tmp_path: Path) -> None:
    def shot(k: int, right: int, soft: float) -> dict[str, Any]:
        return {"shot": k, "correct": right, "score": soft}

    store = new_store(tmp_path)
    rows = [
        candidate(0, 0, [1, 2], shot_scores=[shot(1, 0, 0.0), shot(2, 1, 0.6)]),
        candidate(0, 1, [1], shot_scores=[shot(1, 1, 1.0)]),
    ]
    commit(store, rows)
    con = connect(store)
    assert _rewards(con, RewardSpec(mode="multi_shot")) == pytest.approx([0.8, 2.0])
    weighted = RewardSpec(mode="multi_shot", shot_weights=(0.25, 0.75))
    assert _rewards(con, weighted) == pytest.approx([1.2, 0.5])
    commit(store, [candidate(1, 0, [1, 2], shot_scores=[shot(2, 1, 1.0)])], name="b")
    with pytest.raises(duckdb.InvalidInputException, match="lack a prefix"):
        _rewards(connect(store), RewardSpec(mode="multi_shot"))


@pytest.mark.slow
def test_an_expression_is_cast_clipped_and_refused_where_it_is_none(tmp_path: Path) -> None:
    con = _con(tmp_path, [{"correct": 1, "expected_score": 0.5}, {"correct": 0}])
    spec = RewardSpec(expression="correct + 0.5*expected_score -- halved")
    assert _rewards(con, spec) == [1.25, None]
    assert _rewards(con, RewardSpec(expression="(select count(*) from (select 1))")) == [1.0, 1.0]
    assert _rewards(con, RewardSpec(expression="100 * correct - 50")) == [5.0, -5.0]
    several = ("*", "v.*", "columns('vqa_.*')", "coalesce(*columns('vqa_.*'))")
    for bad in (
        "1) from runs; select (1",
        "correct, 1",
        "select",
        "",
        "1; drop table x",
        *several,
    ):
        with pytest.raises(UsageError, match="not one SQL expression"):
            reward_sql(RewardSpec(expression=bad))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("random()", "random"),
        ("correct + (select random())", "random"),
        ("epoch(now())", "now"),
        ("epoch(current_timestamp)", "current_timestamp"),
        ("epoch(ago(interval 1 day))", "ago"),
        ("nextval('s')", "nextval"),
        ("(select avg(v2.correct) from candidates as v2 using sample 10)", "a sample"),
    ],
)
def test_an_expression_of_chance_or_of_the_clock_is_refused(text: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"the same every time, and {name} is not"):
        reward_sql(RewardSpec(expression=text))


def test_several_columns_in_a_subquery_are_refused() -> None:
    with pytest.raises(UsageError, match="not one SQL expression"):
        reward_sql(RewardSpec(expression="(select max(columns('vqa_.*')) from candidates)"))


# Every score at its worst and its best: weights may be negative, so any corner may be the largest.
_CORNERS = """
    select correct::tinyint as correct, score, expected_score, similarity
    from range(2) as a(correct), range(2) as b(score),
        range(2) as c(expected_score), range(2) as d(similarity)
"""


@pytest.mark.parametrize("mode", sorted(reward_modes()))
def test_the_largest_reward_of_a_file_is_that_of_its_macro(mode: str) -> None:
    """At random weights: what the header says is what the formula gives at its best corner."""
    if reward_modes()[mode].largest is None or {"info", "shot_scores"} & {
        *reward_modes()[mode].parameters
    }:
        return  # unbounded, or over values that no column holds; test_audit.py has their figures
    con = duckdb.connect()
    for text in macros().values():
        con.execute(text)
    draw = random.Random(mode)
    for _ in range(20):
        weights = [draw.choice([-1.5, 0.0, 0.3, 1.0, 2.0]) for _ in range(3)]
        hard, soft, rel = weights
        spec = RewardSpec(mode=mode, hard_weight=hard, soft_weight=soft, rel_weight=rel)
        sql = f"select max({reward_sql(spec)}) from ({_CORNERS}) as v"
        (best,) = con.execute(sql).fetchall()[0]
        (said,) = con.execute(
            f"select reward_clip({reward_modes()[mode].largest}) from (select "
            "$1::double as hard_weight, $2::double as soft_weight, $3::double as rel_weight)",
            weights,
        ).fetchall()[0]
        assert said == best, weights


def test_unknown_modes_and_weights_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="unknown reward mode") as caught:
        reward_sql(RewardSpec(mode="hard_plus_sofft"))
    assert "did you mean hard_plus_soft?" in str(caught.value.hint)
    with pytest.raises(UsageError, match="sum to 1"):
        reward_sql(RewardSpec(mode="multi_shot", shot_weights=(1.0, 1.0)))
    with pytest.raises(UsageError, match="soft_only has no shot weights"):
        reward_sql(RewardSpec(mode="soft_only", shot_weights=(0.5, 0.5)))
    with pytest.raises(UsageError, match="should be '01' or 'pm1'"):
        RewardSpec(mode="legacy", correctness_mode="x")


def test_a_mode_whose_column_is_all_null_says_which_and_how(tmp_path: Path) -> None:
    con = _con(tmp_path, [{"correct": 1, "score": 1.0}])
    require_scores(con, "candidates", RewardSpec())
    with pytest.raises(LeverError, match="expected_score") as caught:
        require_scores(con, "candidates", RewardSpec(mode="hard01_plus_gtprob"))
    assert "log-probabilities" in str(caught.value.hint)
    with pytest.raises(LeverError, match="null in every row"):
        require_scores(con, "candidates", RewardSpec(expression="expected_score"))


@pytest.mark.slow
def test_an_expression_over_an_all_null_column_names_it_and_says_how(tmp_path: Path) -> None:
    con = _con(tmp_path, [{"correct": 1}, {"correct": 0, "expected_score": 0.5,
                                               "eval_failed": True}])  # fmt: skip
    for text in ("correct + 0.5*expected_score", "correct * V.Expected_Score -- halved"):
        with pytest.raises(LeverError, match="reads a column that is null in every row") as caught:
            require_scores(con, "candidates", RewardSpec(expression=text))
        assert caught.value.value == "expected_score"
        assert "answerer that gives log-probabilities" in str(caught.value.hint)
    text = "list_sum([s.correct for s in shot_scores]) + v.similarity"
    with pytest.raises(LeverError) as caught:
        require_scores(con, "candidates", RewardSpec(expression=text))
    assert set(str(caught.value.value).split(", ")) == {"shot_scores", "similarity"}
    with pytest.raises(LeverError, match=r"correct . null is null in every row") as caught:
        require_scores(con, "candidates", RewardSpec(expression="correct + null"))
    assert (caught.value.value, caught.value.hint) == (None, None)
    require_scores(con, "candidates", RewardSpec(expression="coalesce(expected_score, correct)"))
    with pytest.raises(LeverError, match="cannot be computed"):
        require_scores(con, "candidates", RewardSpec(expression="vqa_corect"))


def test_a_mode_needs_what_its_weights_weigh(tmp_path: Path) -> None:
    con = _con(tmp_path, [{"correct": 1, "logprob_score": -1.0}])
    require_scores(con, "candidates", RewardSpec(soft_weight=0))
    quality = RewardSpec(mode="legacy", reward_alpha=1, use_logprob=True)
    require_scores(con, "candidates", quality)
    with pytest.raises(LeverError, match="beam_score"):
        require_scores(con, "candidates", RewardSpec(mode="legacy", reward_alpha=1))
    with pytest.raises(LeverError, match="value 'info, score'") as caught:
        require_scores(con, "candidates", RewardSpec(mode="hybrid", soft_weight=0))
    assert "InfoScore" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"finite number; at RewardSpec\.hard_weight"):
        RewardSpec(hard_weight=float("nan"))
