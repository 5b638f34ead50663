"""Words of recordings with their times, and the words of a segment."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.errors import UserError


class Word(NamedTuple):
    """A word and when it was said, in seconds from the start of the recording."""

    word: str
    start: float
    end: float
    confidence: float | None = None
    """From 0 (the time is a guess) to 1, as the aligner tells; None where it does not."""


# Aligners round to their own frames; an end this many seconds beyond the recording, or beyond the start of the next
# word, is not worth an error.
TOLERANCE = 0.1


def words_between(words: Sequence[Word], start: float, end: float) -> list[Word]:
    """The words that begin in [start, end) seconds, found by bisection: adjoining stretches share none and lose none.

    `words` must be sorted by start, which `check_word_times` sees to.
    """
    return list(words[bisect_left(words, start, key=_start) : bisect_left(words, end, key=_start)])


def chunk_words(words: Sequence[Word], start: float, end: float) -> list[Word]:
    """The words that lie in [start, end) seconds as a whole, with times from `start` on, found by bisection.

    A word that straddles an edge is in neither of the two chunks there. `words` must be sorted by start.
    """
    inside = (word for word in words_between(words, start, end) if word[2] <= end)
    return [Word(word, begin - start, stop - start, *rest) for word, begin, stop, *rest in inside]


def word_fault(words: Sequence[Sequence[Any]], duration: float, overlap: float = math.inf) -> tuple[int, str] | None:
    """The first word that cannot be where it is said to be, as (number, what is wrong); None where all can.

    Args:
        words: (word, start, end) or (word, start, end, confidence) each.
        duration: seconds of the recording; inf where it is not known.
        overlap: seconds that a word may begin before the one in front of it ends.
    """
    before, ended = 0.0, 0.0
    for number, (_, start, end, *rest) in enumerate(words):
        if not 0 <= start <= end < math.inf:  # also false for NaN
            return number, "a word must start at 0 or later, and end after its start"
        if start < before:
            return number, f"starts before the word in front of it ({before} s); sort the words"
        if start < ended - overlap:
            return number, f"overlaps the word in front of it, which ends at {ended} s"
        if end > duration + TOLERANCE:
            return number, f"ends beyond the recording of {duration:.2f} s; transcript of another recording?"
        if rest and rest[0] is not None and not 0 <= rest[0] <= 1:
            return number, f"confidence is {rest[0]}, it must be from 0 to 1"
        before, ended = start, max(ended, end)
    return None


def check_word_times(words: Sequence[Sequence[Any]], duration: float, name: str) -> None:
    """Raise UserError naming the recording and the word unless times are sorted, ordered and within [0, duration]."""
    fault = word_fault(words, duration)
    if fault is not None:
        number, problem = fault
        word, start, end = words[number][:3]
        raise UserError(f"recording {name!r}, word {number} {word!r} at {start} to {end} s: {problem}")


def _start(word: Sequence[Any]) -> float:
    return float(word[1])
