"""CTM: time-marked words of NIST's scoring tools (https://github.com/usnistgov/SCTK, doc/infmts.htm).

    ;; a comment
    talk-1 A 11.34 0.20 YES 0.99
    talk-1 A 12.00 0.34 you

Fields: file, channel, start, duration, word; optionally confidence (or NA), type and speaker. Separators are spaces and
tabs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import UserError
from data.names import space_fields
from data.transcripts import Word
from data.word_times.base import in_order, merged, probability, seconds, word_text

_LONGEST_LINE = 1 << 16
# Types of the Rich Transcription evaluations that are not words: laughter, breath, comments of annotators.
_NON_WORD_TYPES = ("non-lex", "misc")


def read_ctm(path: str | Path, durations: Mapping[str, float] | None = None) -> dict[str, list[Word]]:
    """Read the words of every recording of a CTM file, by the name in its first column.

    The first of several alternatives (<ALT_BEGIN> ... <ALT> ... <ALT_END>) is used; silences, null words (@) and lines
    of type non-lex and misc are ignored. Channels of a recording are merged by time. The file is read line by line.

    Args:
        durations: known durations of recordings in seconds; words after the end are an error.
    Raises:
        UserError: naming file and line, for invalid lines, and for words of a channel that are unsorted, overlap, or
            have invalid times.
    """
    path = Path(path)
    streams: dict[tuple[str, str], tuple[list[Word], list[int]]] = {}
    in_alternatives = skipping = False
    for number, line in _lines(path):
        fields = space_fields(line)
        if not fields or line.lstrip().startswith(";;"):
            continue
        where = f"{path}:{number}"
        if len(fields) < 5:
            raise UserError(f"{where}: {len(fields)} fields; a CTM line is: file channel start duration word")
        mark = fields[4].upper()
        if mark in ("<ALT_BEGIN>", "<ALT>", "<ALT_END>"):
            if in_alternatives == (mark == "<ALT_BEGIN>"):
                raise UserError(f"{where}: unexpected {mark}; the order is <ALT_BEGIN>, <ALT>, <ALT_END>")
            in_alternatives, skipping = mark != "<ALT_END>", mark == "<ALT>"
            continue
        start, length = (seconds(field, where) for field in fields[2:4])
        word = word_text(fields[4], where)
        confidence = probability(fields[5] if len(fields) > 5 else None, where)
        non_word = len(fields) > 6 and fields[6].lower() in _NON_WORD_TYPES
        if not 0 <= length < math.inf:
            raise UserError(f"{where}: duration is {fields[3]}, but must be 0 or more")
        words, lines = streams.setdefault((fields[0], fields[1]), ([], []))
        if not (skipping or non_word or word in ("", "@")):
            words.append(Word(word, start, round(start + length, 6), confidence))
            lines.append(number)
    if in_alternatives:
        raise UserError(f"{path}: ends within <ALT_BEGIN> ... <ALT_END>; truncated?")
    recordings: dict[str, list[list[Word]]] = {}
    for (recording, _), (words, lines) in streams.items():
        duration = (durations or {}).get(recording, math.inf)
        checked = in_order(words, lambda i, lines=lines: f"{path}:{lines[i]}", duration)  # type: ignore[misc]
        recordings.setdefault(recording, []).append(checked)
    return {recording: merged(channels) for recording, channels in recordings.items()}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines of at most _LONGEST_LINE bytes. Raises UserError."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    raise UserError(f"{path}:{number}: longer than {_LONGEST_LINE} bytes; not a CTM")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error}); convert it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
