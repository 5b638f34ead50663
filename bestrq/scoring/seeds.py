"""Relative reduction of an error rate between two systems that were each trained with several seeds.

The error rate of a trained model varies with its seed and with the recordings on which it is measured, so an interval
over recordings of one model per system is too narrow: it holds for these models, not for their recipes.

Errors of seed s on recording i follow a crossed random-effects model: effects of seed, of recording, and of both. The
three variances of the logarithm of the ratio of the two rates are estimated without bias by an analysis of variance of
its linearisation (Searle, Casella and McCulloch 1992, chapter 4). The interval adds the half-widths of both sources in
quadrature (Zou and Donner 2008): Student's t with the few degrees of freedom of the seeds, and the normal quantile for
recordings. In simulations with 3 seeds (`tests/scoring/test_seeds.py`) it covers the truth in 93 to 96 %.

A hierarchical bootstrap, which resamples seeds and recordings together, is computed as well. With 3 seeds its
percentiles cover 98 % if seeds do not matter, as it counts the noise of single recordings up to three times (Owen
2007), and 77 to 84 % if they dominate, as 3 seeds have few distinct resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bestrq.scoring.student import NORMAL, student_quantile
from common.errors import UserError


@dataclass(frozen=True)
class SeedErrors:
    """Errors of two systems on the same recordings, for example on those of one language."""

    baseline: np.ndarray
    """integers `[S, n]`: errors of seed s on recording i"""
    system: np.ndarray
    """integers `[S, n]`; seed s is paired with seed s of the baseline"""
    lengths: np.ndarray
    """integers `[n]`, reference units of each recording"""

    def __post_init__(self) -> None:
        if self.baseline.shape != self.system.shape or self.baseline.shape[1:] != self.lengths.shape:
            raise UserError(
                f"errors of {self.baseline.shape} and {self.system.shape} seeds and recordings, {self.lengths.shape} "
                "lengths: give both systems the same number of seeds, on the same recordings"
            )
        if not self.baseline.any() or not self.lengths.any():
            raise UserError("the baseline has no errors or no reference units: a relative reduction is undefined")


@dataclass(frozen=True)
class Reduction:
    """Relative reduction of an error rate, 1 - rate of the system / rate of the baseline."""

    value: float
    """of the mean rates over seeds and groups; positive if the system is better"""
    low: float
    """95 % interval over seeds and recordings; NaN with one seed or one recording"""
    high: float
    seeds: int
    """of each system; the smallest number over the groups"""
    bootstrap_low: float
    """percentiles of the hierarchical bootstrap"""
    bootstrap_high: float
    seed_share: float
    """share of the variance that is due to seeds"""
    baseline_rate: float
    system_rate: float

    def summary(self) -> dict[str, Any]:
        """JSON-able dict, with None for NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def relative_reduction(groups: Sequence[SeedErrors], num_resamples: int = 10_000, seed: int = 0) -> Reduction:
    """Relative reduction of the error rate, averaged over groups with equal weight, such as languages.

    Seeds and recordings of different groups are independent. Within a group, both systems are compared on the same
    recordings and seed by seed.

    Raises:
        UserError: there are no groups.
    """
    if not groups:
        raise UserError("there are no results to compare: give the results of at least one language")
    seed_variances, seed_freedom, recording_variance = [], [], 0.0
    rates = np.array([[g.baseline.sum(), g.system.sum()] / (len(g.system) * g.lengths.sum()) for g in groups])
    baseline, system = rates.mean(axis=0).tolist()
    for group, group_rates in zip(groups, rates, strict=True):
        effects = _effects(group, group_rates, baseline, system) / len(groups)
        num_seeds, num_recordings = effects.shape
        by_seed, by_recording, rest = mean_squares(effects)
        seed_variances.append(max(by_seed - rest, 0.0) / effects.size)
        seed_freedom.append(num_seeds - 1)
        recording_variance += by_recording / effects.size
    seed_variance = sum(seed_variances)
    half = math.hypot(
        student_quantile(_welch(seed_variances, seed_freedom)) * math.sqrt(seed_variance),
        NORMAL * math.sqrt(recording_variance),
    )
    ratio = system / baseline
    low, high = 1 - ratio * math.exp(half), 1 - ratio * math.exp(-half)
    bootstrap = np.nanquantile(_resampled_reductions(groups, num_resamples, seed), [0.025, 0.975]).tolist()
    share = seed_variance / total if (total := seed_variance + recording_variance) > 0 else 0.0
    seeds = min(len(group.baseline) for group in groups)
    return Reduction(1 - ratio, low, high, seeds, bootstrap[0], bootstrap[1], share, baseline, system)


def mean_squares(effects: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of seeds, recordings and their interaction, of effects `[S, n]`.

    Their expectations are n A + C, S B + C and C for variances A of the seed effects, B of the recording effects and C
    of single values. NaN with one seed or one recording.
    """
    num_seeds, num_recordings = effects.shape
    if num_seeds < 2 or num_recordings < 2:
        return math.nan, math.nan, math.nan
    by_seed, by_recording = effects.mean(axis=1), effects.mean(axis=0)
    rest = effects - by_seed[:, None] - by_recording + effects.mean()
    freedom = (num_seeds - 1) * (num_recordings - 1)
    return (
        float(num_recordings * by_seed.var(ddof=1)),
        float(num_seeds * by_recording.var(ddof=1)),
        float((rest**2).sum() / freedom),
    )


def _effects(group: SeedErrors, rates: np.ndarray, baseline: float, system: float) -> np.ndarray:
    """Linearised contribution of every seed and recording to log(system / baseline), float64 `[S, n]`; mean 0."""
    per_recording = group.lengths.mean()
    first = (group.baseline - rates[0] * group.lengths) / (baseline * per_recording)
    second = (group.system - rates[1] * group.lengths) / (system * per_recording) if system else 0.0
    return np.asarray(second - first, np.float64)


def _resampled_reductions(groups: Sequence[SeedErrors], num_resamples: int, seed: int) -> np.ndarray:
    """Reductions of resamples, float64 `[num_resamples]`. Seeds are drawn one fewer than there are, with replacement:
    the variance of the mean of S draws would be (S - 1) / S of the unbiased one (Rao and Wu 1988)."""
    generator = np.random.default_rng(seed)
    rates = np.zeros((2, num_resamples))
    for group in groups:
        num_seeds, num_recordings = group.baseline.shape
        seeds = generator.multinomial(max(num_seeds - 1, 1), np.full(num_seeds, 1 / num_seeds), num_resamples)
        shares = seeds / seeds.sum(axis=1, keepdims=True)
        block = max(1, 2_000_000 // num_recordings)
        uniform = np.full(num_recordings, 1 / num_recordings)
        for start in range(0, num_resamples, block):
            part = slice(start, min(start + block, num_resamples))
            draws = generator.multinomial(num_recordings, uniform, part.stop - start).astype(np.float64)
            lengths = draws @ group.lengths
            lengths[lengths == 0] = np.nan
            for k, errors in enumerate((group.baseline, group.system)):
                rates[k, part] += (shares[part] * (draws @ errors.T)).sum(axis=1) / lengths / len(groups)
    # A resample without reference units or errors of the baseline has no reduction.
    return 1 - rates[1] / np.where(rates[0] > 0, rates[0], np.nan)


def _welch(variances: Sequence[float], freedom: Sequence[int]) -> float:
    """Degrees of freedom of a sum of variances (Welch 1947); infinite if all are 0."""
    denominator = sum(variance**2 / max(count, 1) for variance, count in zip(variances, freedom, strict=True))
    return sum(variances) ** 2 / denominator if denominator else math.inf
