"""`lever diff`: pairs, what only one side has, the interval, McNemar's test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.report.diff import Difference, diff
from lever_data.report.options import DiffRequest
from lever_data.store.schema import CANDIDATES, EVALUATIONS
from lever_data.store.store import Run, RunSpec, Store
from tests.commands import lever
from tests.stores import candidate, commit, new_store, table


def row(query: int, ordinal: int, pointer: list[int], accuracy: float, **more: Any) -> Any:
    right = int(accuracy > 0)
    return candidate(query, ordinal, pointer, correct=right, score=accuracy, **more)


def commit_evaluation(
    store: Store, name: str, picks: list[tuple[str, int, int, float | None]]
) -> Run:
    """Picks: selector, shots, query, accuracy (none: the answerer failed)."""
    rows = [
        {"dataset": "d", "split": "val", "query_id": query, "selector": selector, "shots": shots,
         "pointer": list(range(shots)), "accuracy": accuracy,
         "correct": None if accuracy is None else int(accuracy > 0),
         "scorer": "nearest", "metric": "1"}
        for selector, shots, query, accuracy in sorted(picks, key=lambda pick: pick[2])
    ]  # fmt: skip
    with store.begin(RunSpec("evaluation", "d", "val", source_sha256=name)) as writer:
        writer.write("evaluations", table(EVALUATIONS, rows))
        return writer.commit()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def compare(store: Store, a: Run | str, b: Run | str) -> Difference:
    name_a, name_b = (side if isinstance(side, str) else side.run for side in (a, b))
    return diff(store, DiffRequest(a=name_a, b=name_b))


def test_two_runs(store: Store) -> None:
    a = commit(
        store,
        [
            row(0, 0, [1, 2], 0.0, beam_rank=0),
            row(0, 1, [2, 1], 0.3),  # only in A: order matters
            row(1, 0, [1, 2], 1.0, logprob_score=-5.0),
            row(1, 1, [3, 4], 0.0, logprob_score=-1.0),  # A's pick
            row(1, 2, [5, 6], 1.0, eval_failed=True),
            row(2, 0, [1, 2], 0.6),
        ],
        name="a",
    )
    b = commit(
        store,
        [
            row(0, 0, [1, 2], 1.0, beam_rank=0),
            row(1, 0, [1, 2], 0.6, logprob_score=-1.0),
            row(1, 1, [3, 4], 0.0, logprob_score=-5.0),
            row(1, 2, [3, 4], 0.6, logprob_score=-6.0),  # a repeat: the mean counts
            row(3, 0, [1, 2], 0.0),
        ],
        name="b",
    )
    found = compare(store, a, b)
    assert (found.pairs, found.only_a, found.only_b, found.changed) == (3, 2, 1, 3)
    assert found.mean_change == pytest.approx((1.0 - 0.4 + 0.3) / 3)
    assert found.mean_change is not None and found.low is not None and found.high is not None
    assert found.low <= found.mean_change <= found.high
    assert (found.picks, found.mcnemar_only_a, found.mcnemar_only_b) == (2, 0, 2)
    assert found.mcnemar_p == pytest.approx(0.5)
    assert (found.picks_right_a, found.picks_right_b) == (0.0, 1.0)


def test_a_run_against_itself(store: Store) -> None:
    run = commit(store, [row(q, 0, [1, 2], q % 2) for q in range(10)])
    found = compare(store, run, run)
    assert (found.pairs, found.changed, found.mean_change) == (10, 0, 0.0)
    assert (found.low, found.high, found.mcnemar_p) == (0.0, 0.0, 1.0)


def test_nothing_in_common(store: Store) -> None:
    a = commit(store, [row(0, 0, [1, 2], 1.0)], name="a")
    b = commit(store, [row(1, 0, [1, 2], 1.0)], name="b")
    found = compare(store, a, b)
    assert (found.pairs, found.only_a, found.only_b, found.picks) == (0, 1, 1, 0)
    assert found.mean_change is found.low is found.high is found.mcnemar_p is None


def test_one_pair_has_no_interval(store: Store) -> None:
    a = commit(store, [row(0, 0, [1, 2], 0.0)], name="a")
    b = commit(store, [row(0, 0, [1, 2], 1.0)], name="b")
    found = compare(store, a, b)
    assert (found.pairs, found.mean_change, found.low, found.high) == (1, 1.0, None, None)


@pytest.mark.slow
def test_two_views(store: Store) -> None:
    commit(store, [row(0, 0, [1, 2], 0.3), row(0, 1, [3, 4], 0.6, gen_method="random")])
    found = compare(store, "beam", "all_candidates")
    assert (found.pairs, found.only_a, found.only_b) == (1, 0, 1)


@pytest.mark.slow
def test_a_run_wins_over_a_view_by_its_id_and_a_view_over_a_prefix(store: Store) -> None:
    """Runs of InfoScore data are called beam-…, like the view."""
    run = commit(store, [row(0, 0, [1, 2], 0.3)])
    spec = RunSpec("beam", "d", "train", source_sha256="x")
    with store.begin(spec) as writer:
        writer.write("candidates", table(CANDIDATES, [candidate(0, 0, [1, 2])]))
        beams = writer.commit()
    assert compare(store, "beam", run).pairs == 1
    with pytest.raises(UsageError, match="kind beam"):
        compare(store, beams, run)
    (store.path / "views").mkdir()
    (store.path / "views" / "mine.sql").write_text("select * from all_candidates")
    assert compare(store, "mine", "rl_data-d").pairs == 1


@pytest.mark.slow
def test_evaluations_pair_by_query_and_shots(store: Store) -> None:
    base = [("random", 1, q, 0.0) for q in range(4)]
    a = commit_evaluation(
        store,
        "a",
        [*base, *(("sft", 1, q, 0.0) for q in range(4)), *(("sft", 2, q, 1.0) for q in range(4))],
    )
    b = commit_evaluation(store, "b", [("rce", 1, q, 0.5) for q in range(5)])
    found = compare(store, a, b)
    assert found.kind == "evaluations"
    assert (found.pairs, found.only_a, found.only_b) == (4, 4, 1)
    assert found.mean_change == 0.5
    assert (found.picks, found.mcnemar_only_b) == (4, 4)
    assert found.mcnemar_p == pytest.approx(0.125)
    assert compare(store, f"{a.run}:random", f"{a.run}:sft").pairs == 4
    with pytest.raises(UsageError, match="which selector") as caught:
        compare(store, f"{a.run}:grpo", b)
    assert "one of random, sft" in str(caught.value.hint)


def test_an_evaluation_is_not_compared_with_candidates(store: Store) -> None:
    run = commit(store, [row(0, 0, [1, 2], 0.3)])
    evaluation = commit_evaluation(store, "a", [("sft", 1, 0, 0.0)])
    with pytest.raises(UsageError, match="cannot be compared with candidates"):
        compare(store, run, evaluation)


@pytest.mark.long
def test_names_that_are_nothing(store: Store) -> None:
    commit(store, [row(0, 0, [1, 2], 0.3)])
    with pytest.raises(UsageError, match="neither a run nor a view") as caught:
        compare(store, "baem", "beam")
    assert "did you mean beam?" in str(caught.value.hint)
    with pytest.raises(LeverError, match="no column pointer, correct, score"):
        compare(store, "queries", "beam")
    run = commit(store, [row(1, 0, [1, 2], 0.3)], name="other")
    with pytest.raises(UsageError, match="only a run of kind evaluation"):
        compare(store, f"{run.run}:sft", "beam")
    with pytest.raises(LeverError, match="neither side holds anything"):
        compare(new_store(store.path / "empty"), "beam", "all_candidates")


@pytest.mark.slow
def test_the_command(store: Store, tmp_path: Path) -> None:
    a = commit(store, [row(q, 0, [1, 2], 0.0) for q in range(3)], name="a")
    b = commit(store, [row(q, 0, [1, 2], 1.0) for q in range(3)], name="b")
    out = tmp_path / "d.json"
    done = lever("diff", a.run, b.run, "--store", store.path, "--json", out)
    assert "mean change, B - A" in done.stdout
    found = json.loads(out.read_text())
    assert {"pairs", "only_a", "only_b", "mean_change", "low", "high", "mcnemar_p"} <= set(found)
    assert (found["pairs"], found["mean_change"], found["mcnemar_p"]) == (
        3,
        1.0,
        pytest.approx(0.25),
    )
    failed = lever("diff", a.run, "nix", "--store", store.path, check=False)
    assert failed.returncode == 2
    assert "Error: there is neither a run nor a view of this name; value 'nix'" in failed.stderr


@pytest.mark.long
def test_the_interval_has_its_seed(store: Store) -> None:
    a = commit(store, [row(q, 0, [1, 2], 0.0) for q in range(20)], name="a")
    b = commit(store, [row(q, 0, [1, 2], (q * 7 % 10) / 10) for q in range(20)], name="b")
    one, same, other = (diff(store, DiffRequest(a=a.run, b=b.run, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert (one.low, one.high) != (other.low, other.high)


def test_a_failed_answer_is_no_wrong_one(store: Store) -> None:
    a = commit_evaluation(store, "a", [("s.pt", 1, query, 1.0) for query in range(4)])
    b = commit_evaluation(
        store, "b", [("s.pt", 1, query, [1.0, None][query % 2]) for query in range(4)]
    )
    found = compare(store, a, b)
    assert (found.pairs, found.only_a, found.only_b, found.changed) == (2, 2, 0, 0)
    assert (found.mean_change, found.picks, found.mcnemar_p) == (0.0, 2, 1.0)


@pytest.mark.slow
def test_candidates_without_a_score_are_not_there(store: Store) -> None:
    a = commit(store, [row(0, 0, [1], 1.0), row(1, 0, [1], 1.0)], name="a")
    b = commit(store, [row(0, 0, [1], 1.0), candidate(1, 0, [1])], name="b")
    assert (compare(store, a, b).pairs, compare(store, a, b).only_a) == (1, 1)


def test_a_negative_seed_is_a_usage_error(store: Store) -> None:
    failed = lever("diff", "a", "b", "--store", store.path, "--seed", -1, check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr


@pytest.mark.slow
def test_what_is_compared_with_itself_is_said_to_be(store: Store) -> None:
    """Under a shorter name, or as a view, too: a change of 0 would look like a finding."""
    run = commit(store, [row(0, 0, [1, 2], 1.0)]).run
    for a, b, is_same in ((run, run[:-2], True), ("beam", "beam", True), (run, "beam", False)):
        said = lever("diff", a, b, "--store", store.path).stderr
        assert ("A and B are the same" in said) == is_same
