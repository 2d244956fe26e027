"""`lever plan`: what n queries show, what they cost, where a test may stop; clustered intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.report.diff import diff
from lever_data.report.options import Cost, DiffRequest, PlanRequest
from lever_data.report.plan import plan
from lever_data.report.power import (
    inflation,
    looks,
    queries_needed,
    smallest_difference,
    spread_of,
)
from lever_data.report.statistics import bootstrap_mean, sign_flip_p
from lever_data.store.schema import EVALUATIONS
from lever_data.store.store import Run, RunSpec, Store
from tests.commands import lever
from tests.stores import candidate, commit, commit_examples, new_store, table

SCORES = np.array([0.0, 0.3, 0.6, 0.9, 1.0])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def commit_pair(store: Store, a: list[float], b: list[float]) -> Run:
    """An evaluation of two selectors, `a` and `b`, at one shot on queries 0, 1, …"""
    rows = [
        {"dataset": "d", "split": "train", "query_id": query, "selector": name, "shots": 1,
         "pointer": [9], "accuracy": accuracy, "correct": int(accuracy > 0), "scorer": "s",
         "metric": "1"}
        for query, pair in enumerate(zip(a, b, strict=True))
        for name, accuracy in zip("ab", pair, strict=True)
    ]  # fmt: skip
    with store.begin(RunSpec("evaluation", "d", "train", source_sha256="e")) as writer:
        writer.write("evaluations", table(EVALUATIONS, rows))
        return writer.commit()


def examples_on(store: Store, images: list[int | None]) -> None:
    commit_examples(
        store,
        [
            {"dataset": "d", "split": "train", "example_id": i, "question_id": i,
             "image_id": image, "question": "?", "answers": ["x"], "answer": "x"}
            for i, image in enumerate(images)
        ],
    )  # fmt: skip


def test_a_spread_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    apart = rng.choice(SCORES, 500) - rng.choice(SCORES, 500)
    alone = spread_of(apart)
    assert alone.deviation == pytest.approx(apart.std(ddof=1))
    assert alone.design_effect == pytest.approx(1)
    twice = spread_of(np.repeat(apart, 2), np.repeat(np.arange(500), 2))
    assert twice.design_effect == pytest.approx(2, rel=0.01)  # copies tell nothing new
    assert twice.deviation / np.sqrt(1000) == pytest.approx(alone.deviation / np.sqrt(500))
    assert spread_of(np.zeros(4)).design_effect == 1
    with pytest.raises(ValueError, match="two clusters"):
        spread_of(apart, np.zeros(500))


def test_needed_and_shown_are_each_other_s_inverse() -> None:
    # two-sided 0.05, power 0.8: (1.959964 + 0.841621)² = 7.84888
    assert queries_needed(0.5, 0.02) == int(np.ceil(7.8488797 * 625))
    n = queries_needed(0.37, 0.013, power=0.9, confidence=0.99)
    assert smallest_difference(0.37, n, power=0.9, confidence=0.99) == pytest.approx(
        0.013, rel=1e-3
    )
    assert queries_needed(0.0, 0.5) == 2


@pytest.mark.parametrize(
    ("number", "published"),
    [
        (2, [2.9626, 1.9686]),
        (3, [3.7103, 2.5114, 1.9930]),
        (5, [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]),
    ],
)
def test_bounds_are_the_published_ones(number: int, published: list[float]) -> None:
    """Two-sided 0.05, spending as O'Brien and Fleming do (Jennison & Turnbull 2000, chapter 7)."""
    found = looks([(k + 1) / number for k in range(number)])
    assert [look.z for look in found] == pytest.approx(published, abs=2e-4)
    assert sum(look.p for look in found) > 0.05 > found[-1].p


@pytest.mark.long
def test_looks_cost_little() -> None:
    assert inflation(looks([1.0])) == 1
    late = looks([0.01, 1.0])  # nothing can be seen at one in a hundred: as good as one look
    assert inflation(late) == pytest.approx(1, abs=1e-3)
    five = looks([0.2, 0.4, 0.6, 0.8, 1.0])
    assert 1.02 < inflation(five) < 1.04
    for shares in ([], [0.5], [0.5, 0.5, 1], [0, 1], [1, 0.5]):
        with pytest.raises(ValueError, match="ascending"):
            looks(shares)


def test_looking_five_times_errs_as_often_as_once() -> None:
    rng = np.random.default_rng(1)
    walks = rng.normal(size=(40_000, 5)).cumsum(1) / np.sqrt(np.arange(1, 6))
    bounds = np.array([look.z for look in looks([0.2, 0.4, 0.6, 0.8, 1.0])])
    assert (np.abs(walks) > bounds).any(1).mean() == pytest.approx(0.05, abs=0.003)
    assert (np.abs(walks) > 1.96).any(1).mean() > 0.13  # what stopping at any 0.05 does


def _simulated(rng: np.random.Generator, images: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Differences of two selectors on one to three questions an image, and their images."""
    size = rng.integers(1, 4, images)
    image = np.repeat(np.arange(images), size)
    mood = np.repeat(rng.choice([-0.3, 0.0, 0.3], images), size)
    base, better = (rng.choice(SCORES, len(image)) for _ in range(2))
    base = np.where(rng.random(len(image)) < 0.4, better, base)  # often they show the same
    return better - base + mood + gain, image


@pytest.mark.long
def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    covered, naive = 0, 0
    for turn in range(1000):
        values, image = _simulated(rng, 250, 0.03)
        found = bootstrap_mean(values, image, replicates=500, seed=turn)
        covered += found.low <= 0.03 <= found.high
        if turn % 5 == 0:
            alone = bootstrap_mean(values, replicates=500, seed=turn)
            naive += alone.low <= 0.03 <= alone.high
    assert 940 <= covered <= 960
    assert naive < 0.94 * 200  # why whole images are drawn


@pytest.mark.slow
def test_a_planned_number_of_queries_has_the_power_promised() -> None:
    rng = np.random.default_rng(3)
    gain, pilot = 0.05, _simulated(rng, 20_000, 0.0)
    spread = spread_of(*pilot)
    planned = queries_needed(spread.deviation, gain)

    def power(queries: int) -> float:
        seen = [_simulated(rng, queries // 2, gain) for _ in range(600)]
        z = [d.mean() / (spread_of(d, i).deviation / np.sqrt(len(d))) for d, i in seen]
        return float(np.mean(np.abs(z) > 1.96))

    assert power(round(planned * 0.9)) < 0.8 < power(round(planned * 1.1))


def test_an_evaluation_is_planned_by_image(store: Store) -> None:
    a, b = [1.0, 1.0, 0.0, 0.3], [0.0, 0.0, 0.0, 0.6]
    examples_on(store, [7, 7, 8, None])
    run = commit_pair(store, a, b)
    (only,) = plan(store, PlanRequest(source=run.run)).comparisons
    assert (only.name, only.shots, only.n) == ("a and b", 1, 4)
    expected = spread_of(np.subtract(a, b), np.array([0, 0, 1, 2]))
    assert only.deviation == pytest.approx(expected.deviation)
    assert only.design_effect == pytest.approx(expected.design_effect)
    assert only.needed == queries_needed(expected.deviation, 0.02)


def test_candidates_are_planned_as_independent_picks(store: Store) -> None:
    rows = [
        candidate(0, 0, [15], score=0.0, scorer="s"),
        candidate(0, 1, [25], score=1.0, scorer="s"),
        candidate(0, 2, [15], score=0.6, scorer="s"),  # once more: the model wavers
        candidate(1, 0, [15], score=1.0, scorer="s"),
        candidate(1, 1, [25], score=1.0, scorer="s"),
        candidate(2, 0, [25], score=1.0, scorer="s"),  # one alone tells nothing
    ]
    commit(store, rows)
    found = plan(store, PlanRequest(queries=(100,)))
    within = (np.var([0.0, 1.0, 0.6], ddof=1) + 0) / 2
    (only,) = found.comparisons
    assert (only.n, only.shots) == (2, None)
    assert only.deviation == pytest.approx(np.sqrt(2 * within))
    assert found.sizes[0].smallest == pytest.approx(smallest_difference(only.deviation, 100))
    assert found.noise is not None and found.noise.repeated == 1
    assert found.noise.variance == pytest.approx(0.18)
    assert found.noise.within == pytest.approx(within)


@pytest.mark.long
def test_an_answer_that_is_stored_again_is_no_noise(store: Store) -> None:
    """Another rollout takes it from the cache, a rescore and a copied file hold it once more."""
    row = candidate(0, 0, [15], score=0.6, scorer="s", metric="1")
    other = candidate(0, 1, [25], score=0.0, scorer="s", metric="1")
    for number, kind in enumerate(["rl_data", "rl_data", "rollout", "rollout", "rescore"]):
        commit(store, [row, other], kind=kind, name=str(number))
    noise = plan(store, PlanRequest()).noise
    assert noise is not None and (noise.repeated, noise.variance) == (0, None)


def test_a_price_is_of_tokens(store: Store) -> None:
    commit(store, [candidate(0, i, [i + 5], score=float(i)) for i in range(2)])
    cost = Cost(prompt_tokens=1000, answer_tokens=10, prompt_price=2.0, answer_price=8.0)
    (size,) = plan(store, PlanRequest(queries=(500,), cost=cost)).sizes
    assert (size.answers, size.tokens) == (1000, 1_010_000)
    assert size.cost == pytest.approx(2.0 + 0.08)
    with pytest.raises(UsageError, match="a price takes the tokens"):
        plan(store, PlanRequest(cost=Cost(prompt_price=1)))


@pytest.mark.slow
def test_a_plan_of_nothing_is_refused(store: Store) -> None:
    with pytest.raises(LeverError, match="two scored candidates"):
        plan(store, PlanRequest())
    with pytest.raises(UsageError, match="greater than or equal to 1"):
        PlanRequest(queries=(100, 0))
    run = commit(store, [candidate(0, 0, [15], score=1.0)])
    with pytest.raises(UsageError, match="not an evaluation"):
        plan(store, PlanRequest(source=run.run))
    with pytest.raises(UsageError, match="neither an evaluation nor a view"):
        plan(store, PlanRequest(source="candidate"))
    with pytest.raises(LeverError, match="no column"):
        plan(store, PlanRequest(source="examples"))


@pytest.mark.slow
def test_a_plan_is_for_one_place(store: Store) -> None:
    both = [candidate(0, i, [i + 5], score=float(i)) for i in range(2)]
    commit(store, both)
    commit(store, [row | {"split": "val", "score": 0.0} for row in both], name="b")
    with pytest.raises(UsageError, match="several places"):
        plan(store, PlanRequest())
    assert plan(store, PlanRequest(split="train")).comparisons[0].deviation == pytest.approx(1)
    assert plan(store, PlanRequest(split="val")).comparisons[0].deviation == 0


@pytest.mark.slow
def test_a_difference_draws_whole_images(store: Store) -> None:
    rng = np.random.default_rng(4)
    change = np.repeat(rng.choice([-0.3, 0.0, 0.6], 40), 3)
    examples_on(store, [i // 3 for i in range(120)])
    run = commit_pair(store, [0.3] * 120, list(0.3 + change))
    found = diff(store, DiffRequest(a=f"{run.run}:a", b=f"{run.run}:b"))
    by_image = bootstrap_mean(change, np.repeat(np.arange(40), 3))
    alone = bootstrap_mean(change)
    assert (found.low, found.high) == pytest.approx((by_image.low, by_image.high))
    assert by_image.high - by_image.low > 1.4 * (alone.high - alone.low)
    # which image a query is about does not depend on the runs that are read
    named = (run.run,)
    again = diff(store, DiffRequest(a=f"{run.run}:a", b=f"{run.run}:b", runs=named))
    assert (again.low, again.high) == (found.low, found.high)
    whole, chosen = (plan(store, PlanRequest(source=run.run, runs=r)) for r in ((), named))
    assert chosen.comparisons == whole.comparisons


def test_p_turns_images_together() -> None:
    change = np.repeat([0.3, 0.3, -0.3, 0.6, 0.6], 20)
    assert sign_flip_p(change) < 0.001
    assert sign_flip_p(np.bincount(np.repeat(np.arange(5), 20), weights=change)) > 0.05


@pytest.mark.slow
def test_the_command(store: Store) -> None:
    commit(store, [candidate(0, i, [i + 5], score=float(i)) for i in range(2)])
    words = ["plan", "--store", str(store.path), "--queries", "100,400", "--looks", "2"]
    shown = lever(*words)
    assert "two independent picks" in shown.stdout and "0.003" in shown.stdout
    assert "no pointer was answered twice" in shown.stderr
    found = json.loads(lever(*words, "--json", "-").stdout)
    assert [size["queries"] for size in found["sizes"]] == [100, 400]
