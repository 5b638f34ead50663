"""Search for word times next to an audio file, in any format that this folder reads.

Words are sorted by start. An unsorted word is an error that names its location: other times are then probably wrong
too, and crops cut at such times would get wrong labels.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from data.transcripts import Word
from data.word_times.alignments import read_words_json
from data.word_times.ctm import read_ctm
from data.word_times.textgrid import read_textgrid

SUFFIXES = (".words.json", ".TextGrid", ".textgrid", ".ctm")


def find_word_times(audio_path: str | Path) -> list[Word] | None:
    """Words from X.words.json, X.TextGrid or X.ctm next to X.flac, with times in seconds; None without such a file.

    A .words.json holds this project's list or the output of Google's recogniser; a .ctm with several recordings must
    have one named X. Raises UserError for an invalid file, or if several exist.
    """
    audio = Path(audio_path)
    candidates = [audio.with_name(audio.stem + suffix) for suffix in SUFFIXES]
    existing = [path for path in candidates if path.is_file()]
    if len(existing) > 1 and not all(path.samefile(existing[0]) for path in existing):  # a file system may ignore case
        raise UserError(f"{audio}: word times in both {existing[0].name} and {existing[1].name}; keep one of them")
    if not existing:
        return None
    path = existing[0]
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
