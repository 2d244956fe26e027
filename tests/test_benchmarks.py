"""The benches measure what they say: contenders agree, ratios and exponents are computed right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import audit_peers, features, metric, pack, proposals, synthetic, train
from benchmarks.measure import Figure, against, exponents, in_turns
from benchmarks.run import alone, growth, markdown
from lever_data.report.audit import audit
from lever_data.report.options import AuditRequest
from lever_data.store.store import Store

TEN = Figure("ingest", "lever", 10, "MB", 2.0, 3, peak_mb=100.0, cpu=1.5)
HUNDRED = replace(TEN, size=100, seconds=8.0, cpu=15.0, note="goal 5 s")
PEER = replace(HUNDRED, case="peer", seconds=24.0, peak_mb=None, cpu=None)


def test_a_ratio_says_how_many_times_faster_lever_is() -> None:
    ours, peer = against(HUNDRED, [PEER])
    assert (ours.ratio, peer.ratio) == (None, 3.0)
    few = replace(PEER, size=10, seconds=24.0)  # does less, so its rate counts
    assert [f.ratio for f in against(HUNDRED, [few])] == [None, 30.0]


def test_the_exponent_says_how_seconds_grow_with_the_size() -> None:
    assert exponents(TEN, replace(HUNDRED, seconds=20.0)) == pytest.approx((1.0, 1.0))
    by_clock, by_cpu = exponents(TEN, replace(HUNDRED, seconds=200.0, cpu=None))
    assert by_clock == pytest.approx(2.0)
    assert by_cpu is None
    assert list(growth([HUNDRED, PEER, TEN])) == [(TEN, HUNDRED)]


def test_a_figure_that_is_compared_with_nothing_is_found() -> None:
    lonely = replace(TEN, case="lonely")
    assert alone([TEN, HUNDRED, *against(replace(TEN, case="x"), [PEER]), lonely]) == [lonely]


def test_one_table_holds_every_figure() -> None:
    lines = markdown([TEN, *against(HUNDRED, [PEER])]).splitlines()
    assert "| ingest | lever | 10 MB | 2.00 | 1.50 | 5.00 | 100 |  |  |" in lines
    assert "| ingest | lever | 100 MB | 8.00 | 15.00 | 12.50 | 100 |  | goal 5 s |" in lines
    assert "| ingest | peer | 100 MB | 24.00 |  | 4.17 |  | 3.00 × | goal 5 s |" in lines
    assert "| ingest: lever | 10 | 100 MB | 0.60 | 1.00 |" in lines


def test_calls_take_turns_and_the_first_turn_is_not_counted() -> None:
    seen: list[str] = []
    work = [("a", 5.0, lambda: seen.append("a")), ("b", 7.0, lambda: seen.append("b"))]
    first, second = in_turns("bench", "things", work, repeats=2)
    assert seen == ["a", "b"] * 3
    assert (first.case, first.size, second.case, second.size) == ("a", 5.0, "b", 7.0)


@pytest.mark.long
def test_the_peers_of_the_audit_find_what_it_finds(tmp_path: Path) -> None:
    run = synthetic.make_store(tmp_path / "s", 1_000)
    figures = audit(Store.open(tmp_path / "s"), AuditRequest()).figures
    for contender in (audit_peers.polars, audit_peers.rows):
        found = contender(tmp_path / "s")
        assert found["candidates"] == figures["candidates"]
        assert found["mean_reward"] == pytest.approx(figures["mean_reward"])
        assert found["mixed"] == figures["classes"]["mixed"] > 0
        assert found["sources"] == len(figures["by_gen_method"]) == 3
    assert audit_peers.duckdb_rows(tmp_path / "s")["rows"] == [(run.num_rows,)]
    assert audit_peers.duckdb_count(tmp_path / "s")["rows"] == [(figures["candidates"],)]


@pytest.mark.long
def test_the_programs_of_their_own_measure_both_sides() -> None:
    small, ours, peer = metric.figures(2_000)
    assert (small.size, ours.size) == (200, 2_000)
    assert peer.ratio == pytest.approx(ours.rate / peer.rate)
    found = {f.case: f for f in proposals.cache(5_000)}
    assert list(found) == ["put", "SQLite, put", "found", "SQLite, found"]
    assert found["SQLite, found"].ratio == pytest.approx(
        found["found"].rate / found["SQLite, found"].rate
    )
    rows = list(proposals.proposals(40))
    assert [f.size for f in rows] == [40, 8, 4] * 4  # two policies, 2 and 4 shots
    assert all(f.ratio is not None and f.ratio > 1 for f in rows[1::3])
    sizes = [(f.case, f.size) for f in pack.figures(100, questions=5)]
    kinds, pools = ("static", "gru", "gated", "features"), (64, 100)
    cases = [f"{kind}, of {n} examples" for kind in kinds for n in pools]
    assert sizes == [(case, size) for case in cases for size in (1, 5)]
    ours, legacy, loading, tenth = train.compare("tiny", 200, 150, 8, "goal")
    assert legacy.ratio is not None and legacy.ratio > 1
    assert loading.ratio is not None and loading.ratio < 1  # a part of the epoch
    assert (ours.size, tenth.size, loading.size) == (200, 20, 200)
    sizes = [(f.case, f.size) for f in features.figures(700)]
    groups = [("whole training", 3 * 70), ("whole training", 3 * 700)]  # of three epochs
    assert sizes == [("features of pairs", 64 * 70), ("features of pairs", 64 * 700), *groups]
