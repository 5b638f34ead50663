"""Text of recordings: what is kept of it as a label, and which words lie in a stretch of time."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from data.errors import DataError


class Word(NamedTuple):
    """A word and when it was said, in seconds from the start of the recording."""

    word: str
    start: float
    end: float
    confidence: float | None = None
    """From 0 (the time is a guess) to 1, as the aligner tells; None where it does not."""


_APOSTROPHES = {"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u0060": "'", "\u00b4": "'"}
# Aligners round to their own frames; an end this many seconds beyond the recording is not worth an error.
_TOLERANCE = 0.1


def label_text(text: str, language: str = "") -> str:
    """The text that a recogniser learns to write: NFC, lower case, words of letters, digits and in-word apostrophes.

    Everything else separates words (so "ice-cream" is two) and becomes one space. Marks that belong to letters stay.
    Turkish and Azerbaijani ('tr', 'az') keep their dotless i. May be empty, where nothing was said.
    """
    text = unicodedata.normalize("NFC", text)
    if language.lower()[:2] in ("tr", "az"):
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    # NFC again: lower case of some capitals is a letter and a combining mark.
    text = unicodedata.normalize("NFC", text.lower())
    letters = "".join(c if _is_letter(c) else _APOSTROPHES.get(c, c if c == "'" else " ") for c in text)
    # An apostrophe within a word is spelling, one at a word's edge is a quotation mark (or an elision we give up).
    words = (word.strip("'") for word in letters.split())
    return " ".join(word for word in words if word)


def words_between(words: Sequence[Word], start: float, end: float) -> list[Word]:
    """The words whose middle lies in [start, end) seconds: adjoining stretches share no word and lose none."""
    return [word for word in words if start <= (word.start + word.end) / 2 < end]


def check_word_times(words: Sequence[Word], duration: float, name: str) -> None:
    """Raise DataError naming the recording and the word unless times are sorted, ordered and within [0, duration]."""
    before = 0.0
    for number, (word, start, end, _) in enumerate(words):
        where = f"recording {name!r}, word {number} {word!r} at {start} to {end} s"
        if not 0 <= start <= end:  # also false for NaN
            raise DataError(f"{where}: a word must start at 0 or later and end after its start")
        if start < before:
            raise DataError(f"{where}: starts before the word in front of it ({before} s); sort the words")
        if end > duration + _TOLERANCE:
            raise DataError(f"{where}: ends beyond the recording of {duration:.2f} s; transcript of another recording?")
        before = start


def _is_letter(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")
