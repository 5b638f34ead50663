"""Word times as other programs write them. Every reader gives `Word`s sorted by start, or a UserError with the place.

What is out of order is refused: a program that writes one word in the wrong place has most likely written others with
the wrong times, and chunks cut by such times get labels that were not said in them.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from data.transcripts import Word
from data.word_times.alignments import lhotse_words, nemo_words, read_words_json
from data.word_times.ctm import read_ctm
from data.word_times.google import read_google_words
from data.word_times.textgrid import read_textgrid

__all__ = [
    "find_word_times",
    "lhotse_words",
    "nemo_words",
    "read_ctm",
    "read_google_words",
    "read_textgrid",
    "read_words_json",
]

SUFFIXES = (".words.json", ".TextGrid", ".textgrid", ".ctm")


def find_word_times(audio_path: str | Path) -> list[Word] | None:
    """The words of X.words.json, X.TextGrid or X.ctm beside X.flac, in seconds; None where there is none of them.

    A .words.json holds our own list or Google's answer; a .ctm with several recordings must have one named X.
    Raises UserError for a file that cannot be right, and where there are two.
    """
    audio = Path(audio_path)
    beside = [audio.with_name(audio.stem + suffix) for suffix in SUFFIXES]
    found = [path for path in beside if path.is_file()]
    if len(found) > 1 and not all(path.samefile(found[0]) for path in found):  # a file system may ignore case
        raise UserError(f"{audio}: word times in both {found[0].name} and {found[1].name}; keep one of them")
    if not found:
        return None
    path = found[0]
    if path.suffix == ".json":
        return read_words_json(path)
    if path.suffix != ".ctm":
        return read_textgrid(path)
    recordings = read_ctm(path)
    if len(recordings) == 1:
        return next(iter(recordings.values()))
    if recordings and audio.stem not in recordings:
        raise UserError(f"{path}: {len(recordings)} recordings, none of them {audio.stem!r}; split the file")
    return recordings.get(audio.stem, [])
