"""Bootstrap clustered by query, McNemar's exact test, effective sample size."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lever_data.report.statistics import bootstrap_mean, effective_sample_size, mcnemar, sign_flip_p


@pytest.mark.long
def test_interval_of_a_known_distribution() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    found = bootstrap_mean(values)
    half = 1.96 * values.std() / sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_clusters_widen_the_interval() -> None:
    """100 queries of 20 equal values: what is known is 100 numbers, not 2,000."""
    per_query = np.random.default_rng(2).normal(size=100)
    values, clusters = np.repeat(per_query, 20), np.repeat(np.arange(100), 20)
    clustered, naive = bootstrap_mean(values, clusters), bootstrap_mean(values)
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(sqrt(20), rel=0.15)


def test_cells_are_the_same_distribution_as_drawing_clusters_one_by_one() -> None:
    rng = np.random.default_rng(3)
    clusters = rng.integers(0, 60, 400)
    values = rng.choice([0.0, 0.3, 1.0], 400)
    sums, sizes = np.bincount(clusters, values, 60), np.bincount(clusters, minlength=60)
    picks = rng.integers(0, 60, (20_000, 60))
    direct = np.quantile(sums[picks].sum(1) / sizes[picks].sum(1), [0.025, 0.975])
    found = bootstrap_mean(values, clusters, replicates=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(direct), abs=0.005)


def test_a_seed_gives_one_interval() -> None:
    values = np.arange(50.0)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_equal_values_have_no_width() -> None:
    found = bootstrap_mean(np.full(10, 0.1), np.arange(10) // 2)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_no_values_and_unpaired_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean(np.array([]))
    with pytest.raises(ValueError, match="3 values cannot have 2 clusters"):
        bootstrap_mean(np.zeros(3), np.zeros(2, int))
    with pytest.raises(ValueError, match="cannot be paired"):
        mcnemar(np.zeros(3, bool), np.zeros(2, bool))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial(only_a: int, only_b: int) -> None:
    a = np.repeat([True, False, True, False], [only_a, only_b, 5, 7])
    b = np.repeat([False, True, True, False], [only_a, only_b, 5, 7])
    found = mcnemar(a, b)
    tosses = only_a + only_b
    tail = sum(comb(tosses, k) for k in range(min(only_a, only_b) + 1))
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(min(1.0, 2 * tail / 2**tosses))


def test_mcnemar_of_many_queries_does_not_overflow() -> None:
    flags = np.arange(1_000_000) < 499_000
    assert mcnemar(flags, ~flags).p == pytest.approx(0.0455, abs=0.0005)


def test_effective_sample_size() -> None:
    assert effective_sample_size(np.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(np.array([0.0, -1000.0])) == pytest.approx(1)
    assert effective_sample_size(np.log([1.0, 3.0]) - 2000) == pytest.approx(1.6)
    assert effective_sample_size(np.array([])) == 0.0


@pytest.mark.long
@given(st.lists(st.sampled_from([-1.0, -0.3, 0.0, 0.3, 0.6, 1.0]), min_size=1, max_size=9))
def test_sign_flips_are_those_of_every_toss(values: list[float]) -> None:
    differences = np.array(values)
    tosses = np.array(list(product((-1.0, 1.0), repeat=len(values))))
    sums = np.abs(tosses @ differences)
    exact = float(np.mean(sums >= abs(differences.sum()) - 1e-9))
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.02)


def test_no_difference_is_no_evidence() -> None:
    assert sign_flip_p(np.zeros(50)) == 1.0
    assert sign_flip_p(np.full(50, 0.1)) == pytest.approx(1e-4)
