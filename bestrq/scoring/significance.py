"""Confidence intervals of error rates and significance tests between systems.

The sampling unit is a recording (call, talk or utterance), because its words are not independent; intervals therefore
resample whole recordings (Bisani and Ney 2004). With few recordings the plain percentile bootstrap is too narrow: its
95 % intervals cover the true rate in 84 to 86 % of simulations with 6 calls, 88 to 89 % with 11 and 91 to 92 % with 20.
Here the bootstrap is studentised (Efron and Tibshirani 1993, section 12.5): it resamples the distance from the corpus
rate in standard errors. Fewer than 8 recordings have too few distinct resamples; their interval is Student's t with the
jackknife's standard error. Coverage of both is 93 to 96 % in simulations from 3 recordings on. It is lower if the rate
of a recording grows with its length and few long recordings dominate, since the sample then says little about the tail.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from bestrq.scoring.student import student_quantile

MIN_BOOTSTRAP = 8
"""minimum number of recordings for bootstrap intervals"""
# Bound on t: a resample whose recordings all have the same rate has a standard error of zero.
_LARGEST_T = 6.0


@dataclass(frozen=True)
class PairedBootstrap:
    """Rate of a first system minus that of a second system on the same recordings."""

    difference: float
    """negative if the first system is better"""
    interval: tuple[float, float] | None
    """95 %; None for fewer than three recordings"""
    probability_first_better: float
    """share of resamples in which the first system has fewer errors; ties count half"""
    reduction: float | None = None
    """relative reduction, 1 - first rate / second rate: positive if the first system is better; None if the second
    system has no errors"""
    reduction_interval: tuple[float, float] | None = None
    """95 %; None for fewer than three recordings"""


@dataclass(frozen=True)
class MatchedPairs:
    """Matched pairs sentence-segment word error test (MAPSSWE)."""

    num_segments: int
    """segments with an error of at least one system; the normal approximation needs about 50"""
    mean_difference: float
    """errors of the first system minus those of the second, mean over segments"""
    standard_deviation: float
    """of the differences; 0 for fewer than two segments"""
    statistic: float | None
    """mean over its standard error, normal under the null hypothesis; None if all differences are equal"""
    p_value: float
    """two-sided; 1 without a statistic"""


def interval_method(num_recordings: int) -> str:
    """Name of the interval method for a number of recordings, for a report."""
    if num_recordings < 3:
        return "none: fewer than 3 recordings"
    if num_recordings < MIN_BOOTSTRAP:
        return f"Student's t over the jackknife of recordings: fewer than {MIN_BOOTSTRAP}"
    return "studentised bootstrap over recordings"


def rate_intervals(
    errors: np.ndarray, lengths: np.ndarray, num_resamples: int = 10_000, seed: int = 0
) -> list[tuple[float, float] | None]:
    """95 % intervals of sum(errors) / sum(lengths) over recordings, for several quantities resampled together.

    Args:
        errors, lengths: integers `[n, k]`, non-negative errors and reference units of each recording and quantity.

    Returns:
        Low and high end for each quantity; None for fewer than three recordings or without reference units. A corpus
        without errors has no spread: its interval is (0, 0).
    """
    low, high = ratio_intervals(errors, lengths, num_resamples, seed, logarithmic=True)
    return [_finite(max(0.0, a), b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]


def bootstrap_interval(
    errors: np.ndarray, lengths: np.ndarray, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of sum(errors) / sum(lengths) over recordings; errors may be negative.

    If `errors` are the errors of one system minus those of another on the same recordings, this is the interval of the
    difference of their rates, with both systems resampled together.

    Args:
        errors, lengths: integers `[n]`.

    Returns:
        Low and high end; None for fewer than three recordings or without reference units.
    """
    low, high = ratio_intervals(errors[:, None], lengths[:, None], num_resamples, seed)
    return _finite(low.item(), high.item())


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, lengths: np.ndarray, num_resamples: int = 10_000, seed: int = 0
) -> PairedBootstrap | None:
    """Compare two systems on the same resamples of recordings (Bisani and Ney 2004).

    Args:
        first, second, lengths: integers `[n]`, errors of the two systems and reference units of each recording.

    Returns:
        Comparison; None without reference units.
    """
    total = lengths.sum()
    if not total:
        return None
    differences = first.astype(np.float64) - second
    sums = np.concatenate([draws @ differences for draws in _resamples(len(differences), num_resamples, seed)])
    better = np.mean(sums < 0) + np.mean(sums == 0) / 2
    interval = bootstrap_interval(differences, lengths, num_resamples, seed)
    reduction, reduction_interval = None, None
    if second.any():  # the ratio of the two rates is one of sums over recordings too: first errors per second error
        reduction = float(1 - first.sum() / second.sum())
        low, high = ratio_intervals(first[:, None], second[:, None], num_resamples, seed, logarithmic=True)
        reduction_interval = _finite(1 - high.item(), 1 - low.item())
    return PairedBootstrap(float(differences.sum() / total), interval, float(better), reduction, reduction_interval)


def ratio_intervals(
    errors: np.ndarray, lengths: np.ndarray, num_resamples: int, seed: int, logarithmic: bool = False
) -> np.ndarray:
    """Ends of the 95 % intervals of k ratios of sums over n recordings.

    Args:
        errors, lengths: `[n, k]`.
        logarithmic: apply Student's t to the logarithm; for rates, whose distribution is skewed with few recordings.

    Returns:
        float64 `[2, k]`; NaN without an interval.
    """
    n, k = errors.shape
    ends = np.full((2, k), np.nan)
    has_rate = lengths.any(axis=0)
    if n >= 3 and has_rate.any():
        ends[:, has_rate] = _ends(errors[:, has_rate], lengths[:, has_rate], num_resamples, seed, logarithmic)
    return ends


def _ends(errors: np.ndarray, lengths: np.ndarray, num_resamples: int, seed: int, logarithmic: bool) -> np.ndarray:
    n = len(errors)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rates = errors.sum(axis=0) / lengths.sum(axis=0)
        if n >= MIN_BOOTSTRAP:
            return _studentised(errors, lengths, rates, num_resamples, seed)
        left_out = (errors.sum(axis=0) - errors) / (lengths.sum(axis=0) - lengths)  # rates without each recording
        spread = student_quantile(n - 1) * np.sqrt((n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
        if not logarithmic:
            return np.stack([rates - spread, rates + spread])
        factor = np.exp(np.where(spread > 0, spread / rates, 0.0))
        return np.stack([rates / factor, rates * factor])


def mapsswe(
    references: Sequence[str], first: Sequence[str], second: Sequence[str], min_correct: int = 2
) -> MatchedPairs:
    """Matched pairs sentence-segment word error test (Gillick and Cox 1989, section 4), segmented like NIST's sc_stats.

    A segment is a part of a text with errors, bounded by the ends of the text or by `min_correct` successive words that
    both systems recognise correctly, without an insertion between them. The test assumes independent segments.

    Args:
        references, first, second: normalised texts of the same recordings or utterances.
    """
    differences: list[int] = []
    for reference, left, right in zip(references, first, second, strict=True):
        differences += _segment_differences(_error_slots(reference, left), _error_slots(reference, right), min_correct)
    count, values = len(differences), np.array(differences, dtype=np.float64)
    mean = float(values.mean()) if count else 0.0
    deviation = float(values.std(ddof=1)) if count > 1 else 0.0
    if not deviation:
        return MatchedPairs(count, mean, deviation, None, 1.0)
    statistic = mean / (deviation / math.sqrt(count))
    return MatchedPairs(count, mean, deviation, statistic, math.erfc(abs(statistic) / math.sqrt(2)))


def _error_slots(reference: str, hypothesis: str) -> np.ndarray:
    """Errors by position, int64 `[2 n + 1]` for n reference words.

    Even slots count the insertions before a word (the last slot: at the end), odd slots the errors of the words.
    """
    output = jiwer.process_words(reference, hypothesis)
    slots = np.zeros(2 * len(output.references[0]) + 1, dtype=np.int64)
    for chunk in output.alignments[0]:
        if chunk.type == "insert":
            slots[2 * chunk.ref_start_idx] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            slots[2 * chunk.ref_start_idx + 1 : 2 * chunk.ref_end_idx : 2] += 1
    return slots


def _segment_differences(first: np.ndarray, second: np.ndarray, min_correct: int) -> list[int]:
    """Errors of the first system minus those of the second in each segment of a text, from `_error_slots` of both."""
    differences: list[int] = []
    correct = min_correct  # the start of a text is a boundary
    for place, (first_errors, second_errors) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if first_errors or second_errors:
            if correct >= min_correct:
                differences.append(0)
            differences[-1] += first_errors - second_errors
            correct = 0
        elif place % 2:
            correct += 1
    return differences


def _studentised(
    errors: np.ndarray, lengths: np.ndarray, rates: np.ndarray, num_resamples: int, seed: int
) -> np.ndarray:
    """Ends of the bootstrap-t intervals, float64 `[2, k]`."""
    # Residuals from the corpus rate avoid cancellation in the variance of a resample.
    residuals = errors - rates * lengths
    columns = np.concatenate(
        [residuals, lengths, residuals**2, residuals * lengths, lengths.astype(np.float64) ** 2], axis=1
    )
    distances = []
    for draws in _resamples(len(errors), num_resamples, seed):
        r, length, rr, rl, ll = np.split(draws @ columns, 5, axis=1)
        shift = r / length
        deviation = np.sqrt(np.maximum(rr - 2 * shift * rl + shift**2 * ll, 0.0)) / length
        t = np.where(shift == 0, 0.0, np.clip(shift / deviation, -_LARGEST_T, _LARGEST_T))
        distances.append(np.where(length > 0, t, np.nan))  # a resample without reference units has no rate
    low, high = np.nanquantile(np.concatenate(distances), [0.025, 0.975], axis=0)
    deviation = np.sqrt((residuals**2).sum(axis=0)) / lengths.sum(axis=0)
    return np.stack([rates - high * deviation, rates - low * deviation])


def _resamples(num_recordings: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Number of times each recording is drawn, float64 `[resamples, n]`, in blocks of bounded size."""
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // num_recordings)
    uniform = np.full(num_recordings, 1.0 / num_recordings)
    for start in range(0, num_resamples, block):
        yield generator.multinomial(num_recordings, uniform, size=min(block, num_resamples - start)).astype(np.float64)


def _finite(low: float, high: float) -> tuple[float, float] | None:
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
