"""Output of Google's speech recogniser, as in the transcripts of the Spotify podcasts and of long-context-asr.

    {"results": [{"alternatives": [{"words": [{"startTime": "1.300s", "endTime": "1.500s", "word": "yes"}]}]}]}

With speaker diarisation, the last result repeats all words of the recording with a `speakerTag`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.transcripts import Word
from data.word_times.base import in_order, probability, read_json, seconds, word_text


def read_google_words(path: str | Path, duration: float = math.inf) -> list[Word]:
    """Read the words of the first alternative of every result, or only of the last result if it has speakers.

    Args:
        duration: of the recording in seconds, if known.
    Raises:
        UserError: naming file and place: another kind of file, or words that are unsorted, overlap, or have invalid
            times.
    """
    path = Path(path)
    return google_words(read_json(path), str(path), duration)


def google_words(answer: Any, where: str, duration: float = math.inf) -> list[Word]:
    """`read_google_words` of the parsed content of the file `where`."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise UserError(f"{where}: no list 'results'; not the output of Google's recogniser")
    numbered = [(f"results[{i}].alternatives[0].words", _words(result)) for i, result in enumerate(results)]
    invalid = [place for place, words in numbered if words is None]
    if invalid:
        raise UserError(f"{where}: {invalid[0]}: not a list of words")
    if numbered and any(isinstance(item, dict) and item.get("speakerTag") for item in numbered[-1][1] or ()):
        numbered = numbered[-1:]
    words, places = [], []
    for place, items in numbered:
        for number, item in enumerate(items or ()):
            at = f"{where}: {place}[{number}]"
            if not isinstance(item, dict):
                raise UserError(f"{at}: not an object with word, startTime and endTime")
            text = word_text(item.get("word"), at)
            # A confidence of 0 stands for an unknown one; a missing start is 0 s.
            start = _time(item.get("startTime", item.get("startOffset", "0s")), at)
            end = _time(item.get("endTime", item.get("endOffset")), at)
            confidence = probability(item.get("confidence"), at) or None
            if text:
                words.append(Word(text, start, end, confidence))
                places.append(at)
    return in_order(words, lambda i: places[i], duration)


def _words(result: Any) -> list[Any] | None:
    """Words of the first alternative of a result; [] without alternatives; None if it is not a result."""
    alternatives = result.get("alternatives", []) if isinstance(result, dict) else None
    if not isinstance(alternatives, list):
        return None
    if not alternatives:
        return []
    words = alternatives[0].get("words", []) if isinstance(alternatives[0], dict) else None
    return words if isinstance(words, list) else None


def _time(value: Any, where: str) -> float:
    """Convert "1.300s" to seconds. Raises UserError."""
    if not isinstance(value, str) or not value.endswith("s"):
        raise UserError(f'{where}: time is {str(value)[:40]!r}, expected seconds such as "1.300s"')
    return seconds(value[:-1], where)
