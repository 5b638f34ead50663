"""LibriSpeech (OpenSLR 12): SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, and one .trans.txt per chapter.

Word times come from either form of the LibriSpeech alignments, in the same tree: `SPEAKER-CHAPTER.alignment.txt` (lines
`ID "WORD,,WORD," "END,END,END,END"`, an empty word for silence, end times in seconds), or one TextGrid per recording.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError, did_you_mean
from data.corpora.audio_files import FileSource
from data.corpora.base import Source, Utterance
from data.corpora.text_files import existing_folder, lines_or_faults, listed_names, numbered_lines, summary
from data.features import FeatureSettings
from data.recording import Recording
from data.skipped import NO_WORD_TIMES
from data.transcripts import Word
from data.word_times.textgrid import read_textgrid

_SUBSET = re.compile(r"(train|dev|test)-[a-z]+(-\d+)?")
_ID = re.compile(r"\d+-\d+-\d+")
# A few published recordings could not be aligned.
_NOT_ALIGNED = f"{NO_WORD_TIMES}: the alignments do not include this recording"
_ALIGNED = re.compile(r'(\S+) "([^"]*)" "([^"]*)"')


@dataclass(frozen=True)
class LibriSpeechSettings:
    """LibriSpeech's unpacked folders; English."""

    folder: str = ""
    """Folder LibriSpeech with SPEAKERS.TXT and the subsets, or its parent."""
    subsets: list[str] = field(default_factory=list)
    """Subsets such as train-clean-100 and dev-clean; empty: all. The first part of the name is the split."""
    alignments: str = ""
    """Folder of the LibriSpeech alignments (.alignment.txt or .TextGrid), in the same tree; empty: no word times."""
    gender: Literal["all", "F", "M"] = "all"
    """Only speakers of this gender, according to SPEAKERS.TXT."""


@dataclass(frozen=True)
class TextGridSource:
    """Recording with word times in a TextGrid, which is read together with the audio."""

    recording: Recording
    path: Path
    textgrid: Path

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        """Read audio and word times. Raises UserError for unusable audio; an unusable TextGrid gives a warning."""
        try:
            words: list[Word] | UserError = read_textgrid(self.textgrid)
        except UserError as error:
            words = error
        return _timed(self.recording, self.path, words, str(self.textgrid)).load(features)


def _timed(recording: Recording, path: Path, words: list[Word] | UserError, where: str) -> FileSource:
    """Source with these word times, or with a warning if they are unusable."""
    try:
        if isinstance(words, UserError):
            raise words
        return FileSource(with_words(recording, words, where), path)
    except UserError as error:
        return FileSource(recording, path, warnings=(f"{NO_WORD_TIMES}: {error}",))


def sources(settings: LibriSpeechSettings) -> list[Source]:
    """List all recordings of the subsets, sorted by id. Raises UserError naming file and line."""
    folder = _root(existing_folder("folder", settings.folder), "folder")
    subsets = _subsets(folder, settings.subsets)
    alignments = (
        _root(existing_folder("alignments", settings.alignments), "alignments") if settings.alignments else None
    )
    speakers = _speakers(folder / "SPEAKERS.TXT", settings.gender)
    listed: list[FileSource | TextGridSource] = []
    for subset in subsets:
        before = len(listed)
        for chapter in _chapters(folder / subset):
            if speakers is None or chapter.parent.name in speakers:
                listed += _chapter(chapter, subset, alignments)
        if len(listed) == before:
            raise UserError(f"{folder / subset} has no recordings with these settings")
    if alignments and all(
        isinstance(source, FileSource) and source.warnings[-1:] == (_NOT_ALIGNED,) for source in listed
    ):
        raise UserError(f"alignments {alignments} has no .alignment.txt or .TextGrid of {', '.join(subsets)}")
    return [*sorted(listed, key=lambda source: source.id)]


def with_words(recording: Recording, words: list[Word], where: str) -> Recording:
    """Recording with these word times. Raises UserError naming `where` if the number of words differs.

    The words themselves come from the transcript: aligners change the case and write <unk> for unknown words.
    """
    text = (recording.text or "").split()
    if len(text) != len(words):
        raise UserError(f"{where}: {len(words)} words are aligned, the transcript of {recording.id} has {len(text)}")
    timed = [aligned._replace(word=word) for word, aligned in zip(text, words, strict=True)]
    return dataclasses.replace(recording, words=timed)


def _root(folder: Path, setting: str) -> Path:
    """Folder of the subsets: the given one, or LibriSpeech in it."""
    for candidate in (folder, folder / "LibriSpeech"):
        if candidate.is_dir() and any(_SUBSET.fullmatch(name) for name in listed_names(candidate)):
            return candidate
    raise UserError(f"{setting} {folder} holds no subset such as train-clean-100, directly or in a folder LibriSpeech")


def _subsets(folder: Path, names: list[str]) -> list[str]:
    existing = sorted(name for name in listed_names(folder) if _SUBSET.fullmatch(name) and (folder / name).is_dir())
    for name in names:
        if name not in existing:
            suggestion = did_you_mean(name, existing)
            raise UserError(f"subsets has {name!r}, but {folder} has {', '.join(existing)}.{suggestion}")
    return list(dict.fromkeys(names)) or existing


def _speakers(path: Path, gender: str) -> set[str] | None:
    """Speakers of a gender; None for all. Rows: id | sex | subset | minutes | name; `;` starts a comment."""
    if gender == "all":
        return None
    speakers = set()
    for where, line in numbered_lines(path):
        if line.startswith(";"):
            continue
        fields = [part.strip() for part in line.split("|")]
        if len(fields) < 5 or not fields[0].isdigit() or fields[1] not in ("F", "M"):
            raise UserError(f"{where}: expected id | F or M | subset | minutes | name: {line[:80]!r}")
        if fields[1] == gender:
            speakers.add(fields[0])
    return speakers


def _chapters(subset: Path) -> Iterator[Path]:
    for speaker in sorted(listed_names(subset)):
        if speaker.isdigit() and (subset / speaker).is_dir():
            for chapter in sorted(listed_names(subset / speaker)):
                if chapter.isdigit() and (subset / speaker / chapter).is_dir():
                    yield subset / speaker / chapter


def _chapter(folder: Path, subset: str, alignments: Path | None) -> list[FileSource | TextGridSource]:
    speaker = folder.parent.name
    name = f"{speaker}-{folder.name}"
    files = listed_names(folder)
    texts = _transcripts(folder / f"{name}.trans.txt", name)
    missing = [f"{id}.flac" for id in texts if f"{id}.flac" not in files]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} audio files are missing: {summary(missing)}; unpack the archive again"
        )
    untranscribed = sorted(file for file in files if file.endswith(".flac") and file[:-5] not in texts)
    if untranscribed:
        raise UserError(
            f"{folder / name}.trans.txt: has no transcript of {summary(untranscribed)}; unpack the archive again"
        )
    words: dict[str, tuple[str, list[Word] | UserError]] = {}
    aligned: set[str] = set()
    warning = _NOT_ALIGNED if alignments else ""
    times = alignments / subset / speaker / folder.name if alignments else folder
    if alignments and times.is_dir():
        try:
            aligned = listed_names(times)
            if f"{name}.alignment.txt" in aligned:
                words = read_alignment(times / f"{name}.alignment.txt")
        except UserError as error:
            warning = f"{NO_WORD_TIMES}: {error}"
    listed: list[FileSource | TextGridSource] = []
    for id, text in texts.items():
        recording = Recording(id, text, language="en", speaker=speaker, split=subset.partition("-")[0])
        path = folder / f"{id}.flac"
        if id in words:
            listed.append(_timed(recording, path, words[id][1], words[id][0]))
        elif f"{id}.TextGrid" in aligned:
            listed.append(TextGridSource(recording, path, times / f"{id}.TextGrid"))
        else:
            listed.append(FileSource(recording, path, warnings=(warning,) if warning else ()))
    return listed


def _transcripts(path: Path, chapter: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, line in numbered_lines(path):
        id, _, text = line.partition(" ")
        if not _ID.fullmatch(id) or not id.startswith(f"{chapter}-") or not text.strip():
            raise UserError(f"{where}: expected {chapter}-NUMBER and the text: {line[:80]!r}")
        if id in texts:
            raise UserError(f"{where}: {id} occurs twice; the file is damaged: unpack the archive again")
        texts[id] = " ".join(text.split())
    return texts


def read_alignment(path: Path) -> dict[str, tuple[str, list[Word] | UserError]]:
    """Read an `.alignment.txt`: recording id -> ('FILE:LINE', words with times in seconds or an error).

    Errors of a single line: wrong format, different numbers of words and times, decreasing times. Raises UserError if
    the file cannot be read.
    """
    alignments: dict[str, tuple[str, list[Word] | UserError]] = {}
    for where, line in lines_or_faults(path):
        if isinstance(line, UserError):
            continue  # the recording of this line is unknown and remains without an alignment
        id = line.partition(" ")[0]
        try:
            if id in alignments:
                raise UserError(f"{where}: {id} occurs twice")
            alignments[id] = where, _aligned(line, where)
        except UserError as error:
            alignments[id] = where, error
    return alignments


def _aligned(line: str, where: str) -> list[Word]:
    """Words of a line. Raises UserError naming file and line."""
    match = _ALIGNED.fullmatch(line.strip())
    if not match:
        raise UserError(f'{where}: expected ID "WORD,WORD" "END,END": {line[:80]!r}')
    id, texts, ends = match[1], match[2].split(","), match[3].split(",")
    if len(texts) != len(ends):
        raise UserError(f"{where}: {id} has {len(texts)} words and silences, and {len(ends)} times")
    words, start = [], 0.0
    for word, text in zip(texts, ends, strict=True):
        end = _seconds(text, where)
        if end < start:
            raise UserError(f"{where}: {id}: the end of {word!r}, {end} s, is before its start, {start} s")
        if word:
            words.append(Word(word, start, end))
        start = end
    return words


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{where}: {text[:40]!r} is not a time in seconds")
    return value
