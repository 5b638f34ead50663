"""The answer of Google's speech recogniser, the transcripts of the Spotify podcasts and of the long-context-asr layout.

    {"results": [{"alternatives": [{"words": [{"startTime": "1.300s", "endTime": "1.500s", "word": "yes"}]}]}]}

With speakers told apart, the last result repeats all words of the recording with a `speakerTag`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.transcripts import Word
from data.word_times.base import in_order, probability, read_json, seconds, word_text


def read_google_words(path: str | Path, duration: float = math.inf) -> list[Word]:
    """The words of the first alternatives: of the last result where it tells speakers, else of all results in turn.

    Args:
        duration: of the recording in seconds, where it is known.
    Raises:
        UserError: naming file and place: not such a file, or words that are unsorted, overlap, or have times that
            cannot be.
    """
    path = Path(path)
    return google_words(read_json(path), str(path), duration)


def google_words(answer: Any, where: str, duration: float = math.inf) -> list[Word]:
    """`read_google_words` of what the file `where` holds."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise UserError(f"{where}: no list 'results'; not an answer of Google's recogniser")
    numbered = [(f"results[{i}].alternatives[0].words", _words(result)) for i, result in enumerate(results)]
    bad = [place for place, words in numbered if words is None]
    if bad:
        raise UserError(f"{where}: {bad[0]}: no list of words there")
    if numbered and any(isinstance(item, dict) and item.get("speakerTag") for item in numbered[-1][1] or ()):
        numbered = numbered[-1:]
    words, places = [], []
    for place, items in numbered:
        for number, item in enumerate(items or ()):
            at = f"{where}: {place}[{number}]"
            if not isinstance(item, dict):
                raise UserError(f"{at}: not an object with word, startTime and endTime")
            text = word_text(item.get("word"), at)
            # Zero is their sign for a confidence that is not told; a start that is not told is 0 s.
            start = _time(item.get("startTime", item.get("startOffset", "0s")), at)
            end = _time(item.get("endTime", item.get("endOffset")), at)
            confidence = probability(item.get("confidence"), at) or None
            if text:
                words.append(Word(text, start, end, confidence))
                places.append(at)
    return in_order(words, lambda i: places[i], duration)


def _words(result: Any) -> list[Any] | None:
    """The words of a result's first alternative; none where it has no alternative; None where it is no result."""
    alternatives = result.get("alternatives", []) if isinstance(result, dict) else None
    if not isinstance(alternatives, list):
        return None
    if not alternatives:
        return []
    words = alternatives[0].get("words", []) if isinstance(alternatives[0], dict) else None
    return words if isinstance(words, list) else None


def _time(value: Any, where: str) -> float:
    """Seconds of "1.300s". Raises UserError."""
    if not isinstance(value, str) or not value.endswith("s"):
        raise UserError(f'{where}: time is {str(value)[:40]!r}, expected seconds such as "1.300s"')
    return seconds(value[:-1], where)
