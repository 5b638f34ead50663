"""Scoring by time, like NIST's sclite: hypothesis words are assigned to the segments of an STM file.

A hypothesis word is assigned to a segment by its midpoint; a segment includes its start and excludes its end. Channels
are scored separately. The assignment, verified with sclite 2.10:

- A word goes to the first segment, sorted by start and end, that ends after its midpoint. If two segments overlap, this
  is the earlier one. A word outside all segments is an insertion in the next segment, or in the last one at the end. A
  segment of zero length only receives words from a gap before it.
- A word in an ignored segment is not scored.

The order of lines affects sclite, but not this module, which sorts segments. This makes two differences: an ignored
segment takes its words even if another segment overlaps it, and a word outside all segments goes to the next scored
segment, while sclite drops it if an ignored segment comes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bestrq.scoring.normalisers import Choice, normaliser
from bestrq.scoring.word_errors import ErrorCounts, RecordingScore, score_normalised, score_recording
from bestrq.transcripts.words import TimedWord
from common.errors import UserError
from common.text import label_text


@dataclass(frozen=True)
class ReferenceSegment:
    """Segment of a recording with its reference text."""

    start: float
    """seconds"""
    end: float
    """seconds, not before the start"""
    text: str
    """not normalised, without STM markup"""
    speaker: str = ""
    ignored: bool = False
    """excluded from scoring, with its text and the hypothesis words in it"""
    channel: str = ""


@dataclass(frozen=True)
class ScoredSegment:
    """Segment with its normalised reference and the normalised words assigned to it."""

    segment: ReferenceSegment
    reference: str
    hypothesis: str


def assign_words(
    segments: Sequence[ReferenceSegment], words: Sequence[TimedWord]
) -> list[tuple[ReferenceSegment, list[TimedWord]]]:
    """Scored segments of one channel, sorted by start and end, each with its words sorted by midpoint.

    Args:
        segments, words: in any order.

    Raises:
        UserError: a time is not finite, or a segment ends before its start.
    """
    scored = _scored(segments)
    assigned: list[list[TimedWord]] = [[] for _ in scored]
    # The running maximum of the ends is sorted, so bisection finds the first segment that ends after a midpoint.
    ends = np.maximum.accumulate([segment.end for segment in scored]) if scored else np.zeros(0)
    for word in sorted(words_outside_ignored(segments, words), key=_midpoint):
        place = int(np.searchsorted(ends, _midpoint(word), side="right"))
        if scored:
            assigned[min(place, len(scored) - 1)].append(word)
    return list(zip(scored, assigned, strict=True))


def words_outside_ignored(segments: Sequence[ReferenceSegment], words: Sequence[TimedWord]) -> list[TimedWord]:
    """Words whose midpoint lies in no ignored segment, in the given order.

    In a mix of channels, a word in an ignored segment (such as a pause) of one channel counts if another channel has a
    scored segment at that time.
    """
    middles = np.array([_midpoint(word) for word in words])

    def within(chosen: Sequence[ReferenceSegment]) -> np.ndarray:
        times = np.array([(segment.start, segment.end) for segment in chosen]).reshape(-1, 2)
        return np.any((times[:, 0] <= middles[:, None]) & (middles[:, None] < times[:, 1]), axis=1)

    ignored = np.zeros(len(words), dtype=bool)
    for channel in {segment.channel for segment in segments if segment.ignored}:
        others = [segment for segment in segments if not segment.ignored and segment.channel != channel]
        own = [segment for segment in segments if segment.ignored and segment.channel == channel]
        ignored |= within(own) & ~within(others)
    return [word for word, is_ignored in zip(words, ignored, strict=True) if not is_ignored]


def score_segments(
    segments: Sequence[ReferenceSegment],
    words: Sequence[TimedWord],
    language: str,
    channel: str | None = None,
    choice: Choice = "auto",
) -> list[ScoredSegment]:
    """Normalised reference and hypothesis of each scored segment, sorted by time.

    Args:
        words: hypothesis of the whole recording.
        channel: recognised channel; None if the channels were mixed, so that all segments count.
    """
    clean = normaliser(language, choice).clean
    return [
        ScoredSegment(segment, clean(segment.text), clean(" ".join(word.word for word in assigned)))
        for segment, assigned in assign_words(_of_channel(segments, channel), words)
    ]


def score_by_segments(
    id: str,
    segments: Sequence[ReferenceSegment],
    words: Sequence[TimedWord],
    language: str,
    seconds: float = 0.0,
    channel: str | None = None,
    choice: Choice = "auto",
) -> RecordingScore:
    """Score of a recording as the sum over its segments: words are aligned within each segment.

    The texts of the segments are joined; aligning the joined texts gives the same number of errors or fewer. Arguments
    as in `score_segments`.
    """
    rules = normaliser(language, choice)
    parts = [
        score_normalised("", scored.reference, scored.hypothesis, language, 0.0, scored.segment.speaker, rules)
        for scored in score_segments(segments, words, language, channel, choice)
    ]
    speakers = {part.speaker for part in parts}
    return RecordingScore(
        id=id,
        language=language,
        seconds=seconds,
        reference=" ".join(part.reference for part in parts if part.reference),
        hypothesis=" ".join(part.hypothesis for part in parts if part.hypothesis),
        words=sum((part.words for part in parts), ErrorCounts()),
        characters=sum((part.characters for part in parts), ErrorCounts()),
        speaker=speakers.pop() if len(speakers) == 1 else "",
        normaliser=rules.name,
    )


def score_as_whole(
    id: str,
    segments: Sequence[ReferenceSegment],
    words: Sequence[TimedWord],
    language: str,
    seconds: float = 0.0,
    channel: str | None = None,
    choice: Choice = "auto",
) -> RecordingScore:
    """Score of a recording as one text: references of all scored segments against all words outside ignored segments.

    Inaccurate times of words near segment edges have no effect. Arguments as in `score_segments`.
    """
    segments = _of_channel(segments, channel)
    scored = _scored(segments)
    speakers = {segment.speaker for segment in scored}
    hypothesis = sorted(words_outside_ignored(segments, words), key=_midpoint)
    return score_recording(
        id,
        " ".join(label_text(segment.text, language) for segment in scored),  # no bracket or number spans two segments
        " ".join(word.word for word in hypothesis),
        language,
        seconds,
        speakers.pop() if len(speakers) == 1 else "",
        choice,
    )


def _of_channel(segments: Sequence[ReferenceSegment], channel: str | None) -> Sequence[ReferenceSegment]:
    """Segments of a channel; all for None. Raises UserError if no segment has that channel."""
    if channel is None:
        return segments
    matches = [segment for segment in segments if segment.channel == channel]
    if segments and not matches:
        existing = ", ".join(sorted({repr(segment.channel) for segment in segments}))
        raise UserError(f"channel = {channel!r}: the segments have {existing}; give one of them, or None for all")
    return matches


def _scored(segments: Sequence[ReferenceSegment]) -> list[ReferenceSegment]:
    """Scored segments, sorted by start and end. Raises UserError if any segment's times are invalid."""
    for segment in segments:
        if not -np.inf < segment.start <= segment.end < np.inf:
            raise UserError(
                f"a reference segment from {segment.start} to {segment.end} s is invalid: give finite times, the end "
                "not before the start"
            )
    scored = [segment for segment in segments if not segment.ignored]
    return sorted(scored, key=lambda segment: (segment.start, segment.end))


def _midpoint(word: TimedWord) -> float:
    return (word.start + word.end) / 2
