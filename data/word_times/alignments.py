"""Word times of manifests (alignments of lhotse, CTM files of NeMo), and this project's JSON.

    X.words.json    [["yes", 11.34, 11.54, 0.99], ["you", 12.0, 12.34]]

Each item is word, start, end in seconds, and optionally a confidence from 0 (the time is a guess) to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.transcripts import Word
from data.word_times.base import in_order, probability, read_json, seconds, word_text
from data.word_times.ctm import read_ctm
from data.word_times.google import google_words

# Fields with the path of the word times, in different versions of NeMo's forced aligner.
_NEMO_FIELDS = ("word_level_ctm_filepath", "words_level_ctm_filepath")


def read_words_json(path: str | Path, duration: float = math.inf) -> list[Word]:
    """Read this project's JSON: a list of [word, start, end] or [word, start, end, confidence], or {"words": [...]}.

    A word may also be an object {"word", "start", "end", "confidence"}. Output of Google's recogniser is read too.

    Args:
        duration: of the recording in seconds, if known.
    Raises:
        UserError: naming the file and the word.
    """
    path = Path(path)
    content = read_json(path)
    if isinstance(content, dict) and "results" in content:
        return google_words(content, str(path), duration)
    items = content.get("words") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a list of [word, start, end]")
    words, places = [], []
    for number, item in enumerate(items):
        where = f"{path}: words[{number}]"
        fields = [item.get(name) for name in Word._fields] if isinstance(item, dict) else item
        if not isinstance(fields, list) or len(fields) not in (3, 4):
            raise UserError(f"{where}: {str(item)[:60]} is not [word, start, end] or [word, start, end, confidence]")
        text, start, end = word_text(fields[0], where), seconds(fields[1], where), seconds(fields[2], where)
        confidence = probability(fields[3], where) if len(fields) == 4 else None
        if text:
            words.append(Word(text, start, end, confidence))
            places.append(where)
    return in_order(words, lambda i: places[i], duration)


def lhotse_words(alignment: Sequence[Any], where: str, offset: float = 0.0, duration: float = math.inf) -> list[Word]:
    """Words of a lhotse alignment: items [symbol, start, duration, score] (score may be missing or null), or objects.

    A score outside [0, 1] is not a confidence (some aligners write logarithms) and is dropped.

    Args:
        alignment: `supervision["alignment"]["word"]`.
        where: file and line, for messages.
        offset: seconds added to every start: the origin of the times in the recording.
        duration: of the recording in seconds, if known.
    Raises:
        UserError: naming the place.
    """
    if not isinstance(alignment, list):
        raise UserError(f"{where}: alignment is {str(alignment)[:60]}, expected a list of [symbol, start, duration]")
    words, numbers = [], []
    for number, item in enumerate(alignment):
        at = f"{where}: alignment[{number}]"
        if isinstance(item, dict):
            item = [item.get(name) for name in ("symbol", "start", "duration", "score")]
        if not isinstance(item, list) or len(item) not in (3, 4):
            raise UserError(f"{at}: {str(item)[:60]} is not [symbol, start, duration, score]")
        text, start, length = word_text(item[0], at), seconds(item[1], at) + offset, seconds(item[2], at)
        score = None if len(item) < 4 or item[3] is None else seconds(item[3], at)
        if text:
            words.append(Word(text, start, round(start + length, 6), score if score and 0 < score <= 1 else None))
            numbers.append(number)
    return in_order(words, lambda i: f"{where}: alignment[{numbers[i]}]", duration)


def nemo_words(entry: Mapping[str, Any], folder: Path, where: str, duration: float = math.inf) -> list[Word] | None:
    """Words of a line of a NeMo manifest, from the CTM file of NeMo's forced aligner.

    Args:
        entry: JSON object of the line.
        folder: of the manifest, at which relative paths start.
        where: file and line, for messages.
        duration: of the segment in seconds, if known.
    Returns:
        Words, in seconds from the start of the line's segment; None if the line has no CTM file.
    Raises:
        UserError: naming the place.
    """
    name = next((entry[field] for field in _NEMO_FIELDS if entry.get(field)), None)
    if name is None:
        return None
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f"{where}: {_NEMO_FIELDS[0]} is {str(name)[:60]!r}, expected the path of a CTM file")
    recordings = read_ctm(folder / Path(name).expanduser())
    if len(recordings) > 1:
        raise UserError(f"{where}: {name} has the words of {len(recordings)} recordings, expected one")
    words = next(iter(recordings.values()), [])
    return in_order(words, lambda i: f"{where}: {name}, word {i}", duration)
