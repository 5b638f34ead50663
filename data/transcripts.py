"""Words of recordings with their times."""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """Word with its times in seconds from the start of the recording."""

    word: str
    start: float
    end: float
    confidence: float | None = None
    """Confidence of the aligner, from 0 (the time is a guess) to 1; None if unknown."""


# Seconds by which a word may end after the recording, or after the start of the next word: aligners round to frames.
TOLERANCE = 0.1
