"""What the readers of word times share: bounded reading, numbers, and the check of order and range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import parse_json
from data.transcripts import TOLERANCE, Word, word_fault

# A file of one recording's words is read whole: ten hours of speech are some 10 MB of JSON.
LARGEST_FILE = 1 << 26
# What aligners write where nothing is said.
SILENCES = frozenset(("", "sil", "sp", "<sil>", "<silence>", "<eps>", "<b>", "<p:>"))


def read_bytes(path: Path) -> bytes:
    """A whole file, unless it is larger than any recording's words. Raises UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: larger than {LARGEST_FILE >> 20} MiB; not the word times of one recording")
    return content


def read_json(path: Path) -> Any:
    """Whatever a JSON file holds. Raises UserError naming the file, and the place where it is not JSON."""
    return parse_json(read_bytes(path), path)


def seconds(value: Any, where: str) -> float:
    """A number, or the text of one, as a float; it may still be NaN or negative. Raises UserError."""
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python reads both, nobody means them
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: {_short(value)} is not a number of seconds") from error


def probability(value: Any, where: str) -> float | None:
    """A confidence; None for None and "NA". Raises UserError unless it is a number from 0 to 1."""
    if value is None or value == "NA":
        return None
    number = seconds(value, where)
    if not 0 <= number <= 1:
        raise UserError(f"{where}: confidence is {number}, it must be from 0 to 1")
    return number


def word_text(value: Any, where: str) -> str:
    """A word with its spaces tidied; "" for silence. Raises UserError where it is not text, or not Unicode."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {_short(value)} is not a word")
    text = " ".join(value.split())
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the word {_short(value)} is not Unicode text") from error
    return "" if text.lower() in SILENCES else text


def in_order(words: list[Word], where: Callable[[int], str], duration: float = math.inf) -> list[Word]:
    """The words of one speaker or channel, if each begins when the one in front has ended (within TOLERANCE).

    Args:
        where: number of a word -> its place, for the message.
        duration: of the recording in seconds, where it is known.
    """
    fault = word_fault(words, duration, overlap=TOLERANCE)
    if fault is None:
        return words
    number, problem = fault
    word, start, end, _ = words[number]
    raise UserError(f"{where(number)}: word {_short(word)} at {start} to {end} s: {problem}")


def merged(streams: Sequence[list[Word]]) -> list[Word]:
    """Words of several speakers or channels, each sorted, as one list sorted by start."""
    if len(streams) == 1:
        return streams[0]
    return sorted((word for stream in streams for word in stream), key=lambda word: word.start)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
