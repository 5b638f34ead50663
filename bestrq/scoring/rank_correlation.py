"""Spearman's rank correlation with a bootstrap interval.

Sources: Spearman 1904, "The proof and measurement of association between two things"; percentile bootstrap over pairs:
Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from 0, float64 `[n]`; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - counts) + (counts - 1) / 2)[place]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if one side is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


def spearman_interval(
    first: Sequence[float], second: Sequence[float], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `spearman`, by resampling pairs with replacement; NaN if undefined."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    generator = np.random.default_rng(seed)
    drawn = [spearman(a[i], b[i]) for i in generator.integers(0, len(a), (resamples, len(a)))]
    finite = [value for value in drawn if math.isfinite(value)]
    low, high = np.quantile(finite, [0.025, 0.975]) if finite else (math.nan, math.nan)
    return float(low), float(high)
