"""Scoring by time: hypothesis words against the segments of an STM file, as NIST's sclite does.

A hypothesis word belongs to a segment by its midpoint; a segment reaches from its start to just before its end. Each
channel is scored by itself. Which segment a word goes to, as tried with sclite 2.10:

- the first, by start and end, that ends after the word's midpoint. So of two that overlap it is the earlier one; a
  word in no segment is an insertion in the next one, and after the last segment in the last; a segment of no length
  gets no word of its own, only those before it that no other segment has.
- a word in an ignored segment counts nowhere.

Two differences, both where sclite drops or keeps a word by the order of lines: here segments are sorted, and an
ignored segment takes its words whatever overlaps it; and a word in no segment goes to the next scored one, where
sclite drops it if an ignored segment comes first. `outside="drop"` leaves words in no segment out altogether, which
hides what a system made up there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bestrq.scoring.normalisers import Choice, normaliser
from bestrq.scoring.word_errors import ErrorCounts, RecordingScore, score_normalised, score_recording
from bestrq.transcripts.words import TimedWord
from common.errors import UserError
from common.text import label_text

Outside = Literal["insert", "drop"]
"""what a word in no segment is: an insertion in the next one, or nothing"""


@dataclass(frozen=True)
class ReferenceSegment:
    """A stretch of a recording, and what was said in it."""

    start: float
    """seconds"""
    end: float
    """seconds, not before the start"""
    text: str
    """not normalised, without marks of the STM"""
    speaker: str = ""
    ignored: bool = False
    """not scored: neither its text nor what is heard in it"""
    channel: str = ""


@dataclass(frozen=True)
class ScoredSegment:
    """A segment and the words that were assigned to it, normalised."""

    segment: ReferenceSegment
    reference: str
    hypothesis: str


def assign_words(
    segments: Sequence[ReferenceSegment], words: Sequence[TimedWord], outside: Outside = "insert"
) -> list[tuple[ReferenceSegment, list[TimedWord]]]:
    """The scored segments of one channel, sorted by start and end, each with its words sorted by midpoint.

    Args:
        segments, words: in any order; without a scored segment there is nothing to assign words to.

    Raises:
        UserError: a time that is no number, or an end before its start.
    """
    _check_times(segments)
    scored = sorted((one for one in segments if not one.ignored), key=lambda one: (one.start, one.end))
    assigned: list[list[TimedWord]] = [[] for _ in scored]
    # Ends that never go down: the first segment that ends after a time, or that follows one that does, by bisection.
    ends = np.maximum.accumulate([one.end for one in scored]) if scored else np.zeros(0)
    for word in sorted(words_outside_ignored(segments, words), key=_midpoint):
        middle = _midpoint(word)
        place = int(np.searchsorted(ends, middle, side="right"))
        inside = place < len(scored) and scored[place].start <= middle < scored[place].end
        if inside or (outside == "insert" and scored):
            assigned[min(place, len(scored) - 1)].append(word)
    return list(zip(scored, assigned, strict=True))


def words_outside_ignored(segments: Sequence[ReferenceSegment], words: Sequence[TimedWord]) -> list[TimedWord]:
    """The words whose midpoint lies in no ignored segment, in their order.

    Of channels that were mixed, one may be ignored while another is scored (its pause, say): then the word counts.
    """
    middles = np.array([_midpoint(word) for word in words])

    def within(chosen: Sequence[ReferenceSegment]) -> np.ndarray:
        times = np.array([(one.start, one.end) for one in chosen]).reshape(-1, 2)
        return np.any((times[:, 0] <= middles[:, None]) & (middles[:, None] < times[:, 1]), axis=1)

    hidden = np.zeros(len(words), dtype=bool)
    for channel in {one.channel for one in segments if one.ignored}:
        others = [one for one in segments if not one.ignored and one.channel != channel]
        hidden |= within([one for one in segments if one.ignored and one.channel == channel]) & ~within(others)
    return [word for word, is_hidden in zip(words, hidden, strict=True) if not is_hidden]


def score_segments(
    segments: Sequence[ReferenceSegment],
    words: Sequence[TimedWord],
    language: str,
    channel: str | None = None,
    outside: Outside = "insert",
    choice: Choice = "auto",
) -> list[ScoredSegment]:
    """Reference and hypothesis of every scored segment, normalised, in the order of time.

    Args:
        words: of the whole recording, of that channel.
        channel: the channel that was heard; None where the channels were mixed, and all segments count.
    """
    clean = normaliser(language, choice).clean
    return [
        ScoredSegment(segment, clean(segment.text), clean(" ".join(word.word for word in mine)))
        for segment, mine in assign_words(of_channel(segments, channel), words, outside)
    ]


def score_by_segments(
    id: str,
    segments: Sequence[ReferenceSegment],
    words: Sequence[TimedWord],
    language: str,
    seconds: float = 0.0,
    channel: str | None = None,
    outside: Outside = "insert",
    choice: Choice = "auto",
) -> RecordingScore:
    """A recording as the sum of its segments: words are aligned within segments alone.

    Its texts are those of the segments, joined. Counts are the segments', so aligning the texts anew gives as many
    errors or fewer. Arguments as of `score_segments`.
    """
    rules = normaliser(language, choice)
    parts = [
        score_normalised("", one.reference, one.hypothesis, language, 0.0, one.segment.speaker, rules)
        for one in score_segments(segments, words, language, channel, outside, choice)
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
    """A recording as one text: that of all scored segments in the order of time, against all words outside the ignored
    ones. A word near an edge cannot fall into the wrong segment. Arguments as of `score_segments`.
    """
    mine = of_channel(segments, channel)
    _check_times(mine)
    scored = sorted((one for one in mine if not one.ignored), key=lambda one: (one.start, one.end))
    speakers = {one.speaker for one in scored}
    heard = sorted(words_outside_ignored(mine, words), key=_midpoint)
    return score_recording(
        id,
        " ".join(label_text(one.text, language) for one in scored),  # brackets and numbers end with their segment
        " ".join(word.word for word in heard),
        language,
        seconds,
        speakers.pop() if len(speakers) == 1 else "",
        choice,
    )


def of_channel(segments: Sequence[ReferenceSegment], channel: str | None) -> list[ReferenceSegment]:
    """The segments of a channel; all for None. Raises UserError where there are segments but none of that channel."""
    mine = [one for one in segments if channel is None or one.channel == channel]
    if segments and not mine:
        there = ", ".join(sorted({repr(one.channel) for one in segments}))
        raise UserError(f"channel = {channel!r}: the segments have {there}; give one of them, or None for all")
    return mine


def _check_times(segments: Sequence[ReferenceSegment]) -> None:
    for one in segments:
        if not -np.inf < one.start <= one.end < np.inf:
            raise UserError(f"a reference segment from {one.start} to {one.end} s: it must not end before its start")


def _midpoint(word: TimedWord) -> float:
    return (word.start + word.end) / 2
