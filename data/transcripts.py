"""Words of recordings with their times."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.errors import UserError


class Word(NamedTuple):
    """Word with its times in seconds from the start of the recording."""

    word: str
    start: float
    end: float
    confidence: float | None = None
    """Confidence of the aligner, from 0 (the time is a guess) to 1; None if unknown."""


# Aligners round to their own frames: accepted seconds by which a word ends after the recording, or after the start of
# the next word.
TOLERANCE = 0.1


def words_between(words: Sequence[Word], start: float, end: float) -> list[Word]:
    """Words that start in [start, end) seconds, so that adjacent intervals partition the words.

    `words` must be sorted by start (`check_word_times`), because the search is a bisection.
    """
    return list(words[bisect_left(words, start, key=_start) : bisect_left(words, end, key=_start)])


def word_fault(words: Sequence[Sequence[Any]], duration: float, overlap: float = math.inf) -> tuple[int, str] | None:
    """First word with invalid times, as (number, fault); None if all are valid.

    Args:
        words: (word, start, end) or (word, start, end, confidence) of each.
        duration: of the recording in seconds; inf if unknown.
        overlap: seconds by which a word may start before the end of the previous one.
    """
    last_start, last_end = 0.0, 0.0
    for number, (_, start, end, *rest) in enumerate(words):
        if not 0 <= start <= end < math.inf:  # also false for NaN
            return number, "a word must start at 0 or later, and end after its start"
        if start < last_start:
            return number, f"starts before the previous word ({last_start} s); sort the words"
        if start < last_end - overlap:
            return number, f"overlaps the previous word, which ends at {last_end} s"
        if end > duration + TOLERANCE:
            return number, f"ends beyond the recording of {duration:.2f} s; transcript of another recording?"
        if rest and rest[0] is not None and not 0 <= rest[0] <= 1:
            return number, f"confidence is {rest[0]}, but must be from 0 to 1"
        last_start, last_end = start, max(last_end, end)
    return None


def check_word_times(words: Sequence[Sequence[Any]], duration: float, name: str) -> None:
    """Raise UserError naming recording and word unless the times are sorted, ordered and within [0, duration]."""
    fault = word_fault(words, duration)
    if fault is not None:
        number, problem = fault
        word, start, end = words[number][:3]
        raise UserError(f"recording {name!r}, word {number} {word!r} at {start} to {end} s: {problem}")


def _start(word: Sequence[Any]) -> float:
    return float(word[1])
