"""Error breakdowns by speaker, duration, position in the recording and distance from a window edge; confusions.

Each breakdown uses the scored (normalised) texts and the same alignment (jiwer's), so parts add up to totals.
Within a recording, a reference word counts at its own time, an inserted word at its time in the hypothesis.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import jiwer
import numpy as np

from bestrq.scoring.normalisers import Choice, normaliser
from bestrq.scoring.significance import rate_intervals
from bestrq.scoring.word_errors import CorpusScore, ErrorCounts, RecordingScore, score_corpus
from bestrq.transcripts.words import TimedWord

DURATION_EDGES = (10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""seconds"""
DISTANCE_EDGES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""seconds"""

Kind = Literal["hit", "substitution", "deletion", "insertion"]
_COUNTS = {"hit": "hits", "substitution": "substitutions", "deletion": "deletions", "insertion": "insertions"}


@dataclass(frozen=True)
class AlignedWord:
    """Step of an alignment with its time."""

    kind: Kind
    reference: str
    """empty for an insertion"""
    hypothesis: str
    """empty for a deletion"""
    time: float
    """middle of the word, seconds"""


@dataclass(frozen=True)
class BinScore:
    """Word errors of a part of the recordings."""

    low: float
    """lower bound, included"""
    high: float | None
    """upper bound; None if unbounded"""
    words: ErrorCounts
    interval: tuple[float, float] | None
    """95 % interval of the rate over recordings; None for fewer than three recordings"""

    def summary(self) -> dict[str, Any]:
        """JSON-able dict."""
        return {**asdict(self), "wer": self.words.rate}


@dataclass(frozen=True)
class Confusions:
    """Most frequent errors in descending order; ties in alphabetical order."""

    substitutions: list[tuple[str, str, int]]
    """(reference word, hypothesis word, count)"""
    deletions: list[tuple[str, int]]
    """(word, count)"""
    insertions: list[tuple[str, int]]
    """(word, count)"""


def by_speaker(scores: Sequence[RecordingScore], num_resamples: int = 10_000, seed: int = 0) -> dict[str, CorpusScore]:
    """Totals by speaker, in alphabetical order; "" is an unknown speaker."""
    return _grouped(scores, lambda score: score.speaker, num_resamples, seed)


def by_duration(
    scores: Sequence[RecordingScore], edges: Sequence[float] = DURATION_EDGES, num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, CorpusScore]:  # fmt: skip
    """Totals by length of the recording, in ascending order: "0 to 10 s", ..., "3600 s and more"; without empty groups.

    Args:
        edges: seconds, ascending; each is the included lower bound of a group.
    """
    names = [f"{low:g} to {high:g} s" for low, high in pairwise([0.0, *edges])] + [f"{edges[-1]:g} s and more"]
    groups = _grouped(scores, lambda score: names[bisect_right(edges, score.seconds)], num_resamples, seed)
    return {name: groups[name] for name in names if name in groups}


def align_timed(
    reference: Sequence[TimedWord] | str, hypothesis: Sequence[TimedWord], language: str, seconds: float = 0.0,
    choice: Choice = "auto",
) -> list[AlignedWord]:  # fmt: skip
    """Alignment of a recording's normalised words with times, in the order of the texts.

    The parts of a word that the normaliser splits ("don't") share its time; a word that it joins from several ("twenty
    one") has their span. In a reference text without times, words take the times of the hypothesis words that they are
    aligned with, and deleted words are spread evenly between their neighbours or the ends of the recording.

    Args:
        seconds: length of the recording; 0 if unknown, in which case the last hypothesis word marks the end.
    """
    clean = normaliser(language, choice).clean
    hypothesis_words, hypothesis_times = normalised_times(hypothesis, clean)
    if isinstance(reference, str):
        reference_words, reference_times = clean(reference).split(), None
    else:
        reference_words, reference_times = normalised_times(reference, clean)
    steps = list(_steps(reference_words, hypothesis_words))
    if reference_times is None:
        known = [(i, hypothesis_times[j]) for _, i, j in steps if i is not None and j is not None]
        end = max([seconds, *(time for _, time in known)])
        places, times = zip((-1, 0.0), *known, (len(reference_words), end), strict=True)
        reference_times = np.interp(np.arange(len(reference_words)), places, times)
    return [
        AlignedWord(
            kind,
            "" if i is None else reference_words[i],
            "" if j is None else hypothesis_words[j],
            float(reference_times[i] if i is not None else hypothesis_times[j]),
        )
        for kind, i, j in steps
    ]


def normalised_times(words: Sequence[TimedWord], clean: Callable[[str], str]) -> tuple[list[str], np.ndarray]:
    """Words of the normalised text, and the middle of each in seconds, float64 `[n]`.

    A normaliser may depend on neighbouring words, so the words of the normalised text are aligned with the separately
    normalised words, whose times are known.
    """
    normalised = clean(" ".join(word.word for word in words)).split()
    parts: list[str] = []
    middles: list[float] = []
    for word in words:
        word_parts = clean(word.word).split()
        parts += word_parts
        width = word.end - word.start
        middles += [word.start + width * (k + 0.5) / len(word_parts) for k in range(len(word_parts))]
    if parts == normalised:
        return normalised, np.array(middles)
    known = [(j, middles[i]) for _, i, j in _steps(parts, normalised) if i is not None and j is not None]
    places, times = zip(*known, strict=True) if known else ((0,), (words[0].start if words else 0.0,))
    return normalised, np.interp(np.arange(len(normalised)), places, times)


def by_position(
    recordings: Sequence[tuple[Sequence[AlignedWord], float]], num_bins: int = 10, num_resamples: int = 10_000,
    seed: int = 0,
) -> list[BinScore]:  # fmt: skip
    """Word errors by position in the recording, in bins of equal shares of its length.

    Args:
        recordings: alignment and length in seconds of each.

    Returns:
        `num_bins` bins, whose bounds are shares of the recording.
    """
    edges = np.arange(num_bins) / num_bins
    shares = [
        [(word, min(max(word.time / max(seconds, 1e-9), 0.0), 1.0)) for word in words] for words, seconds in recordings
    ]
    return _bins(shares, edges.tolist(), 1.0, num_resamples, seed)


def by_edge_distance(
    recordings: Sequence[tuple[Sequence[AlignedWord], Sequence[float]]], edges: Sequence[float] = DISTANCE_EDGES,
    num_resamples: int = 10_000, seed: int = 0,
) -> list[BinScore]:  # fmt: skip
    """Word errors by distance from the nearest window edge.

    Args:
        recordings: alignment of each, and the times in seconds at which the output switches to the next window. A
            recording of a single window has no such time and is left out.
        edges: lower bounds of the bins in seconds, ascending from 0.
    """
    distances = []
    for words, cuts in recordings:
        if len(cuts):
            times, edge = np.array([word.time for word in words]), np.sort(np.asarray(cuts, dtype=np.float64))
            after = np.searchsorted(edge, times)
            before = np.maximum(after - 1, 0)
            nearest = np.minimum(np.abs(times - edge[before]), np.abs(times - edge[np.minimum(after, len(edge) - 1)]))
            distances.append(list(zip(words, nearest.tolist(), strict=True)))
    return _bins(distances, edges, None, num_resamples, seed)


def confusions(scores: Iterable[RecordingScore], most: int = 50) -> Confusions:
    """Most frequent substitutions, deletions and insertions of words, at most `most` of each kind."""
    counts: dict[str, Counter[tuple[str, str]]] = {kind: Counter() for kind in _COUNTS}
    for score in scores:
        reference, hypothesis = score.reference.split(), score.hypothesis.split()
        for kind, i, j in _steps(reference, hypothesis):
            counts[kind]["" if i is None else reference[i], "" if j is None else hypothesis[j]] += 1
    ranked = {
        kind: sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:most] for kind, pairs in counts.items()
    }
    return Confusions(
        [(*pair, count) for pair, count in ranked["substitution"]],
        [(word, count) for (word, _), count in ranked["deletion"]],
        [(word, count) for (_, word), count in ranked["insertion"]],
    )


def _grouped(
    scores: Sequence[RecordingScore], group_of: Callable[[RecordingScore], str], num_resamples: int, seed: int
) -> dict[str, CorpusScore]:
    groups: dict[str, list[RecordingScore]] = {}
    for score in scores:
        groups.setdefault(group_of(score), []).append(score)
    return {name: score_corpus(groups[name], num_resamples, seed) for name in sorted(groups)}


def _steps(reference: Sequence[str], hypothesis: Sequence[str]) -> Iterable[tuple[Kind, int | None, int | None]]:
    """Steps of an alignment: (kind, index in the reference, index in the hypothesis)."""
    for chunk in jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]:
        reference_places = range(chunk.ref_start_idx, chunk.ref_end_idx)
        hypothesis_places = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        if chunk.type == "insert":
            yield from (("insertion", None, j) for j in hypothesis_places)
        elif chunk.type == "delete":
            yield from (("deletion", i, None) for i in reference_places)
        else:
            kind: Kind = "hit" if chunk.type == "equal" else "substitution"
            yield from ((kind, i, j) for i, j in zip(reference_places, hypothesis_places, strict=True))


def _bins(
    recordings: Sequence[Sequence[tuple[AlignedWord, float]]], lows: Sequence[float], last: float | None,
    num_resamples: int, seed: int,
) -> list[BinScore]:  # fmt: skip
    """Word errors binned by the value paired with each word; intervals over the recordings with words in a bin."""
    counts = [[Counter[str]() for _ in lows] for _ in recordings]
    for words, bins in zip(recordings, counts, strict=True):
        for word, value in words:
            bins[max(bisect_right(lows, value) - 1, 0)][_COUNTS[word.kind]] += 1
    scored = []
    for place, low in enumerate(lows):
        parts = [ErrorCounts(**bins[place]) for bins in counts if bins[place]]
        pairs = np.array([(part.errors, part.reference_length) for part in parts]).reshape(-1, 2)
        (interval,) = rate_intervals(pairs[:, :1], pairs[:, 1:], num_resamples, seed)
        high = lows[place + 1] if place + 1 < len(lows) else last
        scored.append(BinScore(low, high, sum(parts, ErrorCounts()), interval))
    return scored
