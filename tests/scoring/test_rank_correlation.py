"""Spearman's rank correlation and its interval."""

import math

import numpy as np
import pytest

from bestrq.scoring.rank_correlation import ranks, spearman, spearman_interval


def test_ties_share_the_mean_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_the_correlation_without_ties_equals_the_formula_of_squared_rank_differences() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.normal(size=9), rng.normal(size=9)
        differences = a.argsort().argsort() - b.argsort().argsort()
        assert spearman(a, b) == pytest.approx(1 - 6 * (differences**2).sum() / (9 * 80))


def test_a_monotone_function_has_correlation_one_and_a_constant_none() -> None:
    values = np.array([0.1, 0.5, 0.2, 0.9])
    assert spearman(values, np.exp(values)) == pytest.approx(1.0)
    assert spearman(values, -(values**3)) == pytest.approx(-1.0)
    assert math.isnan(spearman(values, [1.0] * 4))


def test_the_interval_contains_zero_for_unrelated_values_and_not_for_related_ones() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=12)
    low, high = spearman_interval(a, a + 0.2 * rng.normal(size=12))
    assert 0.4 < low < high <= 1.0
    inside = 0
    for _ in range(20):
        low, high = spearman_interval(rng.normal(size=10), rng.normal(size=10), resamples=200)
        inside += low <= 0 <= high
    assert inside >= 15
