"""Where the errors sit: by speaker, language, duration, position in the recording and distance from a window's edge,
and which words are confused.

All are of normalised texts as they were scored, and of the same alignment (jiwer's), so that parts add up to totals.
Within a recording, a word that was said counts where it was said, and an inserted word where it was heard.
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
_PLURALS = {"hit": "hits", "substitution": "substitutions", "deletion": "deletions", "insertion": "insertions"}


@dataclass(frozen=True)
class AlignedWord:
    """A step of an alignment, and when it happened."""

    kind: Kind
    reference: str
    """empty for an insertion"""
    hypothesis: str
    """empty for a deletion"""
    time: float
    """seconds, the middle of the word"""


@dataclass(frozen=True)
class BinScore:
    """Word errors of a part of the recordings."""

    low: float
    """from here on"""
    high: float | None
    """up to here; None for no end"""
    words: ErrorCounts
    interval: tuple[float, float] | None
    """95 % interval of the rate over recordings; None where it says nothing"""

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "wer": self.words.rate}


@dataclass(frozen=True)
class Confusions:
    """The most frequent errors, the most frequent first, equal ones by alphabet."""

    substitutions: list[tuple[str, str, int]]
    """(said, heard, how often)"""
    deletions: list[tuple[str, int]]
    insertions: list[tuple[str, int]]


def by_speaker(scores: Sequence[RecordingScore], num_resamples: int = 10_000, seed: int = 0) -> dict[str, CorpusScore]:
    """Totals of every speaker, by alphabet; "" where it is not known. By language: `scoring.score_by_language`."""
    return _grouped(scores, lambda score: score.speaker, num_resamples, seed)


def by_duration(
    scores: Sequence[RecordingScore], edges: Sequence[float] = DURATION_EDGES, num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, CorpusScore]:  # fmt: skip
    """Totals of recordings by length, the shortest first: "0 to 10 s", ..., "3600 s and more"; empty ones left out.

    Args:
        edges: seconds, ascending; a recording of exactly that length is in the longer group.
    """
    names = [f"{low:g} to {high:g} s" for low, high in pairwise([0.0, *edges])] + [f"{edges[-1]:g} s and more"]
    groups = _grouped(scores, lambda score: names[bisect_right(edges, score.seconds)], num_resamples, seed)
    return {name: groups[name] for name in names if name in groups}


def align_timed(
    reference: Sequence[TimedWord] | str, hypothesis: Sequence[TimedWord], language: str, seconds: float = 0.0,
    choice: Choice = "auto",
) -> list[AlignedWord]:  # fmt: skip
    """The alignment of a recording's normalised words, each step with its time, in the order of the texts.

    Words that a normaliser splits ("don't") share the time of the word, words that it joins ("twenty one") its span.
    Where the reference is a text without times, its words take those of the hypothesis that they are aligned to, and
    deleted ones are spread evenly between their neighbours, or the ends of the recording.

    Args:
        seconds: length of the recording; 0 where it is not known, and the last word heard ends it.
    """
    clean = normaliser(language, choice).clean
    heard, heard_times = normalised_times(hypothesis, clean)
    if isinstance(reference, str):
        said, said_times = clean(reference).split(), None
    else:
        said, said_times = normalised_times(reference, clean)
    steps = list(_steps(said, heard))
    if said_times is None:
        known = [(i, heard_times[j]) for _, i, j in steps if i is not None and j is not None]
        end = max([seconds, *(time for _, time in known)])
        places, times = zip((-1, 0.0), *known, (len(said), end), strict=True)
        said_times = np.interp(np.arange(len(said)), places, times)
    return [
        AlignedWord(
            kind,
            "" if i is None else said[i],
            "" if j is None else heard[j],
            float(said_times[i] if i is not None else heard_times[j]),
        )
        for kind, i, j in steps
    ]


def normalised_times(words: Sequence[TimedWord], clean: Callable[[str], str]) -> tuple[list[str], np.ndarray]:
    """Words as their whole text is normalised, and the middle of each in seconds, float64 `[n]`.

    A normaliser looks at several words at once, so its words are traced back to the original ones by an alignment with
    what it makes of each word alone.
    """
    whole = clean(" ".join(word.word for word in words)).split()
    parts: list[str] = []
    middles: list[float] = []
    for word in words:
        alone = clean(word.word).split()
        parts += alone
        width = word.end - word.start
        middles += [word.start + width * (k + 0.5) / len(alone) for k in range(len(alone))]
    if parts == whole:
        return whole, np.array(middles)
    known = [(j, middles[i]) for _, i, j in _steps(parts, whole) if i is not None and j is not None]
    places, times = zip(*known, strict=True) if known else ((0,), (words[0].start if words else 0.0,))
    return whole, np.interp(np.arange(len(whole)), places, times)


def by_position(
    recordings: Sequence[tuple[Sequence[AlignedWord], float]], num_bins: int = 10, num_resamples: int = 10_000,
    seed: int = 0,
) -> list[BinScore]:  # fmt: skip
    """Word errors by position in the recording: bins of equal shares of its length, deciles unless told.

    Args:
        recordings: the alignment and the length in seconds of each.

    Returns:
        `num_bins` bins, with bounds as shares of the recording.
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
    """Word errors by distance from the nearest edge of a window.

    Args:
        recordings: the alignment of each, and the times in seconds at which one window's output ends and the next
            one's begins. A recording of one window has no such edge and is left out.
        edges: lower ends of the bins in seconds, ascending, the first 0.
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
    """The most frequent substitutions, deletions and insertions of words, `most` of each kind."""
    counts: dict[str, Counter[tuple[str, str]]] = {kind: Counter() for kind in _PLURALS}
    for score in scores:
        said, heard = score.reference.split(), score.hypothesis.split()
        for kind, i, j in _steps(said, heard):
            counts[kind]["" if i is None else said[i], "" if j is None else heard[j]] += 1
    first = {kind: sorted(one.items(), key=lambda item: (-item[1], item[0]))[:most] for kind, one in counts.items()}
    return Confusions(
        [(said, heard, count) for (said, heard), count in first["substitution"]],
        [(said, count) for (said, _), count in first["deletion"]],
        [(heard, count) for (_, heard), count in first["insertion"]],
    )


def _grouped(
    scores: Sequence[RecordingScore], name: Callable[[RecordingScore], str], num_resamples: int, seed: int
) -> dict[str, CorpusScore]:
    groups: dict[str, list[RecordingScore]] = {}
    for score in scores:
        groups.setdefault(name(score), []).append(score)
    return {one: score_corpus(groups[one], num_resamples, seed) for one in sorted(groups)}


def _steps(said: Sequence[str], heard: Sequence[str]) -> Iterable[tuple[Kind, int | None, int | None]]:
    """The steps of an alignment: kind, place in the reference, place in the hypothesis."""
    for chunk in jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0]:
        reference = range(chunk.ref_start_idx, chunk.ref_end_idx)
        hypothesis = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        if chunk.type == "insert":
            yield from (("insertion", None, j) for j in hypothesis)
        elif chunk.type == "delete":
            yield from (("deletion", i, None) for i in reference)
        else:
            kind: Kind = "hit" if chunk.type == "equal" else "substitution"
            yield from ((kind, i, j) for i, j in zip(reference, hypothesis, strict=True))


def _bins(
    recordings: Sequence[Sequence[tuple[AlignedWord, float]]], lows: Sequence[float], last: float | None,
    num_resamples: int, seed: int,
) -> list[BinScore]:  # fmt: skip
    """Counts by the value that comes with every word; intervals over recordings that have words in the bin."""
    counts = [[Counter[str]() for _ in lows] for _ in recordings]
    for words, mine in zip(recordings, counts, strict=True):
        for word, value in words:
            mine[max(bisect_right(lows, value) - 1, 0)][_PLURALS[word.kind]] += 1
    scored = []
    for place, low in enumerate(lows):
        parts = [ErrorCounts(**mine[place]) for mine in counts if mine[place]]
        pairs = np.array([(part.errors, part.reference_length) for part in parts]).reshape(-1, 2)
        (interval,) = rate_intervals(pairs[:, :1], pairs[:, 1:], num_resamples, seed)
        high = lows[place + 1] if place + 1 < len(lows) else last
        scored.append(BinScore(low, high, sum(parts, ErrorCounts()), interval))
    return scored
