"""Diagnostics: rows in → rows out on tiny stores with ties, nulls and groups of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_data.catalog import body, builtin, macros
from lever_data.items.vqa_metric import fallback_match
from lever_data.relations.db import open_session
from tests.cases import long
from tests.stores import candidate, commit, commit_examples, new_store

Rows = Sequence[dict[str, Any]]


def scored(query: int, ordinal: int, soft: float | None, **columns: Any) -> dict[str, Any]:
    """A candidate with accuracy ``soft`` and a pointer of its own."""
    pointer = columns.pop("pointer", [10 + ordinal, 30])
    hard = None if soft is None else int(soft > 0)
    columns = {"eval_mode": "file", "correct": hard, "score": soft, **columns}
    return candidate(query, ordinal, pointer, **columns)


def open_rows(path: Path, rows: Rows, examples: Rows = ()) -> duckdb.DuckDBPyConnection:
    store = new_store(path)
    commit(store, rows)
    if examples:
        commit_examples(store, examples)
    return open_session(store, only=DIAGNOSTICS).con


DIAGNOSTICS = [r.name for r in builtin().values() if r.folder == "diagnostics"]


def ask(con: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[Any, ...]]:
    return con.cursor().execute(sql).fetchall()


@pytest.mark.slow
def test_query_classes(tmp_path: Path) -> None:
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 0.0), scored(0, 1, 0.3),  # mixed
            scored(1, 0, 0.0), scored(1, 1, None),  # all wrong: a missing score counts as 0
            scored(2, 0, 1.0), scored(2, 1, 1.0),  # all right
            scored(3, 0, 0.6), scored(3, 1, 0.6),  # tied
            scored(4, 0, 1.0),  # a group of one
            scored(5, 0, 0.3),
        ],
    )  # fmt: skip
    assert ask(
        con,
        "select query_id, class, num_candidates, num_right, num_wrong, num_unscored, mean_reward, "
        "reward_variance, min_reward, max_reward from query_rewards order by query_id",
    ) == [
        (0, "mixed", 2, 1, 1, 0, 0.65, 0.65**2, 0.0, 1.3),
        (1, "all_wrong", 2, 0, 1, 1, 0.0, 0.0, 0.0, 0.0),
        (2, "all_right", 2, 2, 0, 0, 2.0, 0.0, 2.0, 2.0),
        (3, "tied", 2, 2, 0, 0, 1.6, 0.0, 1.6, 1.6),
        (4, "all_right", 1, 1, 0, 0, 2.0, 0.0, 2.0, 2.0),
        (5, "tied", 1, 1, 0, 0, 1.3, 0.0, 1.3, 1.3),
    ]


@pytest.mark.slow
def test_spread_has_a_bar_of_its_own_for_flat_queries(tmp_path: Path) -> None:
    rows = [scored(0, 0, 0.0), scored(0, 1, 0.3), scored(1, 0, 0.6), scored(2, 0, 0.0)]
    con = open_rows(tmp_path, rows)
    assert ask(con, "from reward_spread") == [(0.0, 0.0, 2), (0.6, 0.7, 1)]


@pytest.mark.slow
def test_the_picks_and_the_oracle(tmp_path: Path) -> None:
    beams = {"gen_method": "beam"}
    drawn = {"gen_method": "sample", "temperature": 1.0}
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 0.0, beam_rank=0, logprob_score=-9.0, **beams),
            scored(0, 1, 1.0, beam_rank=1, logprob_score=-1.0, **beams),
            scored(1, 0, 0.3, logprob_score=-3.0, **drawn),
            scored(1, 1, 0.0, logprob_score=-2.0, **drawn),
            scored(1, 2, 0.6, logprob_score=-2.0, **drawn),  # two likeliest: their mean
            scored(2, 0, 1.0, gen_method="random"),  # no pick
        ],
    )
    assert ask(con, "select query_id, picked_reward from query_rewards order by 1") == [
        (0, 0.0),
        (1, 0.8),
        (2, None),
    ]
    assert ask(
        con,
        "select num_queries, num_without_pick, best_reward, picked_reward, gap, best_accuracy, "
        "picked_accuracy from oracle_gap",
    ) == [(2, 1, 1.8, 0.4, 1.4, 0.8, 0.15)]


@pytest.mark.long
def test_what_each_source_contributes(tmp_path: Path) -> None:
    beam, sample = {"gen_method": "beam", "beam_rank": 0}, {"gen_method": "sample"}
    con = open_rows(
        tmp_path,
        [
            # 0: only the samples differ; without them one beam is left
            scored(0, 0, 0.0, **beam),
            scored(0, 1, 0.0, temperature=1.0, **sample),
            scored(0, 2, 1.0, temperature=1.3, **sample),
            # 1: beam against sample: both are needed
            scored(1, 0, 1.0, **beam),
            scored(1, 1, 0.0, temperature=1.0, **sample),
            # 2: three sources that all differ: none is needed
            scored(2, 0, 0.3, **beam),
            scored(2, 1, 0.6, temperature=1.0, **sample),
            scored(2, 2, 1.0, gen_method="random"),
            # 3: flat
            scored(3, 0, 0.0, gen_method=None),
            # 4: a middle value is all the others hold
            scored(4, 0, 0.6, **beam),
            scored(4, 1, 0.0, temperature=1.0, **sample),
            scored(4, 2, 1.0, temperature=1.0, **sample),
            scored(4, 3, 0.6, gen_method="random"),
        ],
    )
    rows = ask(
        con,
        "select gen_method, num_candidates, right_share, num_queries_needing, "
        "round(within_query_variance, 6) from reward_by_gen_method",
    )
    assert rows == [
        ("beam", 4, 0.75, 1, 0.0),
        ("random", 2, 1.0, 0, 0.0),
        ("sample", 6, 0.5, 3, round((2 * 1.0 + 2 * 1.0) / 6, 6)),
        (None, 1, 0.0, 0, 0.0),
    ]
    assert ask(con, "select temperature, num_candidates from reward_by_temperature") == [
        (1.0, 5),
        (1.3, 1),
        (None, 7),
    ]
    assert ask(con, "select beam_rank, num_queries_needing from reward_by_beam_rank") == [
        (0, 1),
        (None, 4),  # also query 2, where rank 0 alone is one candidate
    ]
    assert ask(con, "select shot_num, num_queries_needing from reward_by_shot") == [(2, 4)]


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["beam", "sample", "random"]),
            st.sampled_from([0.0, 1.3, 2.0]),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_needed_sources_agree_with_leaving_them_out(drawn: list[tuple[int, str, float]]) -> None:
    SOURCES.execute("delete from scores")
    SOURCES.executemany(
        "insert into scores (dataset, split, query_id, gen_method, reward, pointer) "
        "values ('d', 'train', ?, ?, ?, [1])",
        drawn,
    )
    found = ask(
        SOURCES,
        "select query_id, gen_method from source_rewards "
        "where dimension = 'gen_method' and is_needed",
    )
    expected = set()
    for query, method in {(q, m) for q, m, _ in drawn}:
        every = {r for q, _, r in drawn if q == query}
        rest = {r for q, m, r in drawn if q == query and m != method}
        if len(every) > 1 and len(rest) < 2:
            expected.add((query, method))
    assert set(found) == expected


def _sources() -> duckdb.DuckDBPyConnection:
    """A table of scores to fill, with the two relations over it."""
    con = duckdb.connect()
    columns = ", ".join(f"{c.name} {c.type}" for c in builtin()["scores"].columns)
    con.execute(f"create table scores ({columns})")
    for name in ("audit_settings", "query_sums", "query_rewards", "source_rewards"):
        con.execute(f"create view {name} as {body(builtin()[name])}")
    return con


SOURCES = _sources()


@pytest.mark.slow
def test_eval_modes_count_failures_apart(tmp_path: Path) -> None:
    gold = [{"dataset": "d", "split": "train", "example_id": 0, "question_id": 5, "question": "?",
             "answers": ["red", "dark red"]}]  # fmt: skip
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 1.0, answer="red", shot_scores=[_shot(1, "fallback")]),
            scored(0, 1, 0.0, answer="dark", shot_scores=[_shot(1, "file")]),  # string match: 0.5
            scored(0, 2, 0.3, answer="Dark Red"),  # string match: 1
            scored(0, 3, 0.5, eval_mode="fallback", answer="red"),
            scored(0, 4, None, eval_mode=None),
            scored(0, 5, 0.0, eval_mode="fallback", eval_failed=True),
        ],
        gold,
    )
    assert ask(con, "select * exclude (run) from eval_modes") == [
        ("beam", 6, 3, 1, 1, 1, 1, 1, 3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    ]


def _shot(shot: int, mode: str) -> dict[str, object]:
    scores = {"correct": 1, "score": 1.0, "expected_score": None, "answer": "red"}
    return {"shot": shot, **scores, "eval_mode": mode}


words = st.text(alphabet="aB \n", max_size=4)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(words, st.lists(words, max_size=4))
def test_string_match_in_sql_is_the_one_in_python(prediction: str, answers: list[str]) -> None:
    found = ask(MATCHER, f"select fallback_match({_text(prediction)}, {_texts(answers)})")
    assert found == [(fallback_match(prediction, answers),)]


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _texts(values: list[str]) -> str:
    return f"[{', '.join(map(_text, values))}]::varchar[]"


def _matcher() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute(macros()["fallback_match"])
    return con


MATCHER = _matcher()


@pytest.mark.slow
def test_logprob_orders_within_a_query_only(tmp_path: Path) -> None:
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 1.0, logprob_score=-1.0),
            scored(0, 1, 0.0, logprob_score=-2.0),
            scored(0, 2, 0.0, logprob_score=-3.0),  # ties in reward with the one before
            scored(1, 0, 0.0, logprob_score=-0.1),  # another query: compared with no one
            scored(1, 1, 1.0, logprob_score=None),
        ],
    )
    tau = 2 / (2 * 3) ** 0.5
    assert ask(con, "from logprob_vs_reward") == [("beam", None, 3, 1, pytest.approx(tau))]


@pytest.mark.slow
def test_importance_weights_of_the_stored_policy(tmp_path: Path) -> None:
    hot = {"gen_method": "sample", "temperature": 1.3}
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 0.0, pointer=[1, 2], logprob_score=-1.0, gen_method="beam"),
            scored(0, 1, 0.0, pointer=[3, 4], logprob_score=-3.0, gen_method="beam"),
            scored(0, 2, 0.0, pointer=[1, 2], logprob_score=-2.0, **hot),
            scored(0, 3, 0.0, pointer=[3, 4], logprob_score=-2.0, **hot),
            scored(0, 4, 0.0, pointer=[5, 6], logprob_score=-2.0, **hot),  # policy unknown
        ],
    )
    w = [2.718281828459045, 1 / 2.718281828459045]
    size = sum(w) ** 2 / sum(x * x for x in w)
    assert ask(con, "from importance_weights") == [
        ("sample", 1.3, 3, 2, 1, pytest.approx(size), pytest.approx(size / 2))
    ]


@pytest.mark.long
def test_order_repeats_and_usage(tmp_path: Path) -> None:
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 1.0, pointer=[1, 2]),
            scored(0, 1, 0.0, pointer=[2, 1]),
            scored(0, 2, 0.6, pointer=[1, 2]),  # a repeat with another reward
            scored(9, 0, 0.3, pointer=[1, 2]),
            scored(9, 1, 0.3, pointer=[2, 1]),
            scored(9, 2, 0.3, pointer=[3]),
        ],
    )
    assert ask(con, "from order_sensitivity") == [(2, 2, 0.5, pytest.approx((1.8 - 0.0) / 2))]
    assert ask(con, "select * exclude (dataset, split) from duplicate_candidates") == [
        (0, [1, 2], 2, 1.6, 2.0)
    ]
    assert ask(con, "select query_id, num_pointers from query_rewards order by 1") == [
        (0, 2),
        (9, 3),
    ]
    assert ask(
        con, "select example_id, num_picks, round(reward_lift, 9), is_hub from demonstration_usage"
    ) == [(1, 5, 0.0, False), (2, 5, 0.0, False), (3, 1, 0.0, False)]


@pytest.mark.slow
def test_a_hub_is_picked_ten_times_as_often(tmp_path: Path) -> None:
    rows = [scored(q, 0, 0.0, pointer=[99, 40 + q]) for q in range(40)]
    con = open_rows(tmp_path, rows)
    assert ask(con, "select example_id from demonstration_usage where is_hub") == [(99,)]


@pytest.mark.slow
def test_answer_copying_needs_every_demonstration(tmp_path: Path) -> None:
    item = {"dataset": "d", "split": "train", "question": "?"}
    examples = [
        {**item, "example_id": 1, "question_id": 1, "answer": "Cat "},
        {**item, "example_id": 2, "question_id": 2, "answer": "dog"},
    ]
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 1.0, pointer=[1, 2], answer="cat"),
            scored(0, 1, 0.0, pointer=[2, 1], answer="bird"),
            scored(0, 2, 0.0, pointer=[1, 7], answer="cat"),  # 7 is not known
            scored(0, 3, 0.0, pointer=[1], answer=None),
        ],
        examples,
    )
    assert ask(con, "from answer_copying") == [("beam", 2, 0.5, 2.0, 0.0)]


@pytest.mark.slow
def test_reward_modes_that_cannot_be_computed_are_left_out(tmp_path: Path) -> None:
    con = open_rows(
        tmp_path, [scored(0, 0, 1.0), scored(0, 1, 0.0), scored(1, 0, 0.3), scored(1, 1, 0.6)]
    )
    rows = ask(
        con,
        "select reward_mode, num_queries, tied_share, round(right_wrong_gap, 6), "
        "round(rank_agreement, 6) from reward_modes",
    )
    third = (1.0 + 0.3 + 0.6) / 3
    assert rows == [
        ("hard_only", 2, 0.5, 1.0, round(0.5**0.5, 6)),
        ("hard_plus_soft", 2, 0.0, round(1 + third, 6), 1.0),
        ("hard_plus_soft_v2", 2, 0.0, round(2 + third, 6), 1.0),
        ("separated", 2, 0.0, round(2 + third, 6), 1.0),
        ("soft_only", 2, 0.0, round(third, 6), 1.0),
    ]


@pytest.mark.slow
def test_reward_modes_of_prefix_scores(tmp_path: Path) -> None:
    shots = [{"shot": 1, "correct": 1, "score": 1.0},
             {"shot": 2, "correct": 0, "score": 0.0}]  # fmt: skip
    con = open_rows(tmp_path, [scored(0, 0, 0.0, pointer=[1, 2], shot_scores=shots)])
    found = ask(con, "select tied_share from reward_modes where reward_mode = 'multi_shot'")
    assert found == [(1.0,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shots",
    [
        long([{"shot": 2, "correct": 1, "score": 1.0}]),
        [{"shot": 1, "correct": None}, {"shot": 2, "correct": 1, "score": 1.0}],
        long(None),
    ],
)
def test_prefixes_without_a_score_leave_multi_shot_out(tmp_path: Path, shots: Any) -> None:
    whole = [{"shot": 1, "correct": 1, "score": 1.0}]
    con = open_rows(
        tmp_path,
        [
            scored(0, 0, 1.0, pointer=[1], shot_scores=whole),
            scored(0, 1, 0.0, pointer=[1, 2], shot_scores=shots),
        ],
    )
    found = [mode for (mode,) in ask(con, "select reward_mode from reward_modes")]
    assert "hard_only" in found
    assert "multi_shot" not in found


@pytest.mark.slow
def test_a_sample_is_whole_queries(tmp_path: Path) -> None:
    con = open_rows(tmp_path, [scored(q, i, 0.0) for q in range(5) for i in range(3)])
    assert ask(con, "select count(*), count(distinct query_id) from scored_sample") == [(15, 5)]
