"""How sure an error rate is, and whether one system is better than another: intervals and tests.

An experiment draws recordings: calls, talks or utterances, whose words are not independent of each other. So intervals
come from resampling whole recordings (Bisani and Ney 2004). The plain percentile bootstrap is too narrow where
recordings are few: of intervals that say 95 %, 84 to 86 % hold the truth with 6 simulated calls, 88 to 89 % with 11
and 91 to 92 % with 20. Here the bootstrap is studentised (Efron and Tibshirani 1993, section 12.5): what is resampled
is the distance from the corpus's rate in standard errors. With fewer than 8 recordings, of which there are too few
different resamples, the interval is Student's t over the jackknife's standard error. Both hold the truth in 93 to
96 % of simulated experiments from 3 recordings on; less where a recording's rate grows with its length and few long
recordings decide, for then the sample says little about the tail.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

FEW = 8
"""from so many recordings on, intervals are of the bootstrap"""
# Quantile 0.975 of Student's t by degrees of freedom, for 3 to FEW - 1 recordings.
_STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}
# A resample whose recordings all have the same rate has no standard error, and t would be infinite.
_LARGEST_T = 6.0


@dataclass(frozen=True)
class PairedBootstrap:
    """Rate of a first system less that of a second, on the same recordings."""

    difference: float
    """negative where the first system is better"""
    interval: tuple[float, float] | None
    """95 %; None where it says nothing"""
    probability_first_better: float
    """share of resamples in which the first system has fewer errors; a tie counts half"""


@dataclass(frozen=True)
class MatchedPairs:
    """Matched pairs sentence-segment word error test (MAPSSWE)."""

    num_segments: int
    """stretches with an error of at least one system; the normal approximation wants about 50 or more"""
    mean_difference: float
    """errors of the first system less those of the second, mean over segments"""
    standard_deviation: float
    """of the differences; 0 for fewer than two segments"""
    statistic: float | None
    """mean over its standard error, normal under the null hypothesis; None where all differences are the same"""
    p_value: float
    """two-sided; 1 where the systems cannot be told apart"""


def interval_method(num_recordings: int) -> str:
    """How an interval over so many recordings is made, for a report."""
    if num_recordings < 3:
        return "none: fewer than 3 recordings"
    if num_recordings < FEW:
        return f"Student's t over the jackknife of recordings: fewer than {FEW}"
    return "studentised bootstrap over recordings"


def rate_intervals(
    errors: np.ndarray, lengths: np.ndarray, num_resamples: int = 10_000, seed: int = 0
) -> list[tuple[float, float] | None]:
    """95 % intervals of sum(errors) / sum(lengths) over recordings, of several quantities resampled together.

    Args:
        errors, lengths: integers `[n, k]`, errors (0 or more) and reference units of every recording and quantity.

    Returns:
        Low and high end of each of the k; None for fewer than three recordings, or references that are all empty.
        No error at all gives (0, 0): a corpus without errors has no spread to learn from.
    """
    low, high = ratio_intervals(errors, lengths, num_resamples, seed, logarithmic=True)
    return [_finite(max(0.0, a), b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]


def bootstrap_interval(
    errors: np.ndarray, lengths: np.ndarray, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of sum(errors) / sum(lengths) over recordings, where errors may be differences.

    With `errors` the errors of one system less those of another on the same recordings, the interval is that of the
    difference between their rates: both are resampled together.

    Args:
        errors, lengths: integers `[n]`.

    Returns:
        Low and high end; None for fewer than three recordings or references that are all empty.
    """
    low, high = ratio_intervals(errors[:, None], lengths[:, None], num_resamples, seed)
    return _finite(low.item(), high.item())


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, lengths: np.ndarray, num_resamples: int = 10_000, seed: int = 0
) -> PairedBootstrap | None:
    """Compare two systems by the same resamples of recordings for both (Bisani and Ney 2004).

    Args:
        first, second, lengths: integers `[n]`, errors of the two systems and reference units of every recording.

    Returns:
        None where all references are empty.
    """
    total = lengths.sum()
    if not total:
        return None
    gaps = first.astype(np.float64) - second
    sums = np.concatenate([draws @ gaps for draws in _resamples(len(gaps), num_resamples, seed)])
    better = np.mean(sums < 0) + np.mean(sums == 0) / 2
    interval = bootstrap_interval(gaps, lengths, num_resamples, seed)
    return PairedBootstrap(float(gaps.sum() / total), interval, float(better))


def ratio_intervals(
    errors: np.ndarray, lengths: np.ndarray, num_resamples: int, seed: int, logarithmic: bool = False
) -> np.ndarray:
    """Ends of the 95 % intervals of k ratios of sums over n recordings.

    Args:
        errors, lengths: `[n, k]`.
        logarithmic: take Student's t on the scale of logarithms, for rates, which are skewed where recordings are few.

    Returns:
        float64 `[2, k]`; NaN where there is no interval.
    """
    n, k = errors.shape
    ends = np.full((2, k), np.nan)
    spoken = lengths.any(axis=0)  # the others have no rate
    if n >= 3 and spoken.any():
        ends[:, spoken] = _ends(errors[:, spoken], lengths[:, spoken], num_resamples, seed, logarithmic)
    return ends


def _ends(errors: np.ndarray, lengths: np.ndarray, num_resamples: int, seed: int, logarithmic: bool) -> np.ndarray:
    n = len(errors)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rates = errors.sum(axis=0) / lengths.sum(axis=0)
        if n >= FEW:
            return _studentised(errors, lengths, rates, num_resamples, seed)
        rest = (errors.sum(axis=0) - errors) / (lengths.sum(axis=0) - lengths)  # rates without each recording
        spread = _STUDENT[n - 1] * np.sqrt((n - 1) / n * ((rest - rest.mean(axis=0)) ** 2).sum(axis=0))
        if not logarithmic:
            return np.stack([rates - spread, rates + spread])
        factor = np.exp(np.where(spread > 0, spread / rates, 0.0))
        return np.stack([rates / factor, rates * factor])


def mapsswe(
    references: Sequence[str], first: Sequence[str], second: Sequence[str], min_correct: int = 2
) -> MatchedPairs:
    """Matched pairs sentence-segment word error test (Gillick and Cox 1989, section 4), segmented as NIST's sc_stats.

    A segment is a stretch with errors, bounded by the ends of a text or by `min_correct` words in a row that both
    systems have right, with no insertion between them. Errors in different segments are taken as independent.

    Args:
        references, first, second: normalised texts of the same recordings or utterances.
    """
    gaps: list[int] = []
    for reference, one, other in zip(references, first, second, strict=True):
        gaps += segment_differences(error_slots(reference, one), error_slots(reference, other), min_correct)
    values = np.array(gaps, dtype=np.float64)
    mean = float(values.mean()) if gaps else 0.0
    deviation = float(values.std(ddof=1)) if len(gaps) > 1 else 0.0
    if not deviation:
        return MatchedPairs(len(gaps), mean, deviation, None, 1.0)
    statistic = mean / (deviation / math.sqrt(len(gaps)))
    return MatchedPairs(len(gaps), mean, deviation, statistic, math.erfc(abs(statistic) / math.sqrt(2)))


def error_slots(reference: str, hypothesis: str) -> np.ndarray:
    """Errors by place: int64 `[2 n + 1]` for n reference words, insertions before each word and the word itself in
    turn, insertions at the end last."""
    output = jiwer.process_words(reference, hypothesis)
    slots = np.zeros(2 * len(output.references[0]) + 1, dtype=np.int64)
    for chunk in output.alignments[0]:
        if chunk.type == "insert":
            slots[2 * chunk.ref_start_idx] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            slots[2 * chunk.ref_start_idx + 1 : 2 * chunk.ref_end_idx : 2] += 1
    return slots


def segment_differences(first: np.ndarray, second: np.ndarray, min_correct: int = 2) -> list[int]:
    """Errors of the first system less those of the second in every segment of a text, from `error_slots` of both."""
    gaps: list[int] = []
    correct = min_correct  # the start of a text is a boundary
    for place, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if one or other:
            if correct >= min_correct:
                gaps.append(0)
            gaps[-1] += one - other
            correct = 0
        elif place % 2:
            correct += 1
    return gaps


def _studentised(
    errors: np.ndarray, lengths: np.ndarray, rates: np.ndarray, num_resamples: int, seed: int
) -> np.ndarray:
    """Ends of the bootstrap-t intervals, float64 `[2, k]`."""
    # With residuals of the corpus's rate nothing cancels when the variance of a resample is put together.
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
        distances.append(np.where(length > 0, t, np.nan))  # a resample of empty references only has no rate
    low, high = np.nanquantile(np.concatenate(distances), [0.025, 0.975], axis=0)
    deviation = np.sqrt((residuals**2).sum(axis=0)) / lengths.sum(axis=0)
    return np.stack([rates - high * deviation, rates - low * deviation])


def _resamples(num_recordings: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often every recording is drawn: float64 `[resamples, n]`, in blocks of a bounded size."""
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // num_recordings)
    even = np.full(num_recordings, 1.0 / num_recordings)
    for start in range(0, num_resamples, block):
        yield generator.multinomial(num_recordings, even, size=min(block, num_resamples - start)).astype(np.float64)


def _finite(low: float, high: float) -> tuple[float, float] | None:
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
