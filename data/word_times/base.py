"""Common functions of the readers of word times: bounded reading, numbers, and checks of order and range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import parse_json
from data.transcripts import TOLERANCE, Word

# Limit for a file with the words of one recording, which is read at once: ten hours of speech are about 10 MB of JSON.
LARGEST_FILE = 1 << 26
# Labels of aligners for silence.
SILENCES = frozenset(("", "sil", "sp", "<sil>", "<silence>", "<eps>", "<b>", "<p:>"))


def read_bytes(path: Path) -> bytes:
    """Content of a file of at most LARGEST_FILE bytes. Raises UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: larger than {LARGEST_FILE >> 20} MiB; not the word times of one recording")
    return content


def read_json(path: Path) -> Any:
    """Value of a JSON file of at most LARGEST_FILE bytes. Raises UserError naming the file."""
    return parse_json(read_bytes(path), path)


def seconds(value: Any, where: str) -> float:
    """Convert a number, or the text of one, to float; NaN and negative values are allowed. Raises UserError."""
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # float() would accept both
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: {_short(value)} is not a number of seconds") from error


def probability(value: Any, where: str) -> float | None:
    """Confidence as a float; None for None and "NA". Raises UserError unless it is a number from 0 to 1."""
    if value is None or value == "NA":
        return None
    number = seconds(value, where)
    if not 0 <= number <= 1:
        raise UserError(f"{where}: confidence is {number}, but must be from 0 to 1")
    return number


def word_text(value: Any, where: str) -> str:
    """Word with normalised spaces; "" for silence. Raises UserError if it is not text, or not Unicode."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {_short(value)} is not a word")
    text = " ".join(value.split())
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the word {_short(value)} is not Unicode text") from error
    return "" if text.lower() in SILENCES else text


def in_order(words: list[Word], where: Callable[[int], str], duration: float = math.inf) -> list[Word]:
    """Check the words of a speaker or channel and return them.

    Raises UserError unless each starts after the end of the previous one, within TOLERANCE.

    Args:
        where: maps the number of a word to its location, for the message.
        duration: of the recording in seconds, if known.
    """
    fault = word_fault(words, duration, overlap=TOLERANCE)
    if fault is None:
        return words
    number, problem = fault
    word, start, end, _ = words[number]
    raise UserError(f"{where(number)}: word {_short(word)} at {start} to {end} s: {problem}")


def merged(streams: Sequence[list[Word]]) -> list[Word]:
    """Merge the sorted words of several speakers or channels into one list sorted by start."""
    if len(streams) == 1:
        return streams[0]
    return sorted((word for stream in streams for word in stream), key=lambda word: word.start)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
