"""Interval of a mean error rate by a bootstrap over seeds and test recordings.

A resample draws seeds and, independently, recordings, with replacement and in every language separately (Bisani and Ney
2004; Davison and Hinkley 1997, section 3.8, for several levels). With three seeds the percentiles are approximate.
Reductions between systems have intervals of their own: `bestrq/scoring/seeds.py`.

L languages, S seeds, n recordings of a language, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Errors:
    """Errors of a system on the test recordings of a language."""

    errors: np.ndarray
    """integers `[S, n]`, in the same order of seeds and recordings for all systems"""
    lengths: np.ndarray
    """integers `[n]`, reference units"""


def mean_rate(languages: Sequence[Errors]) -> float:
    """Mean over seeds and languages of the error rate over all recordings."""
    return float(np.mean([e.errors.sum() / (len(e.errors) * e.lengths.sum()) for e in languages]))


def resampled_rates(languages: Sequence[Errors], num_resamples: int, seed: int = 0) -> np.ndarray:
    """Mean rates of resamples, float64 `[B]`."""
    generator = np.random.default_rng(seed)
    rates = np.zeros(num_resamples)
    for entry in languages:
        num_seeds, num_recordings = entry.errors.shape
        seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples) / num_seeds
        uniform = np.full(num_recordings, 1 / num_recordings)
        recordings = generator.multinomial(num_recordings, uniform, num_resamples).astype(np.float64)
        lengths = recordings @ entry.lengths
        lengths[lengths == 0] = np.nan  # a resample without reference units has no rate
        rates += (seeds * (recordings @ entry.errors.T)).sum(axis=1) / lengths / len(languages)
    return rates


def rate_with_interval(languages: Sequence[Errors], num_resamples: int) -> tuple[float, float, float]:
    """Mean rate, and the ends of its 95 % interval."""
    low, high = np.nanquantile(resampled_rates(languages, num_resamples), [0.025, 0.975]).tolist()
    return mean_rate(languages), low, high
