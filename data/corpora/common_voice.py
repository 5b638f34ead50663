"""Mozilla Common Voice: LANG/clips/*.mp3, and tables of tab-separated values, one a split.

The tables are not CSV: a quotation mark in a sentence is part of the sentence, and nothing is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.corpora.base import FileSource, Source, check_choice
from data.corpora.text_files import existing_folder, listed_names, numbered_lines, summary
from data.errors import DataError
from data.index import Recording

# Tables of clips. validated and other are for training, without whatever dev and test hold.
TABLES = {"train": "train", "dev": "dev", "test": "test", "validated": "train", "other": "train"}
_COLUMNS = ("client_id", "path", "sentence")
_CLIP = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class CommonVoiceSettings:
    """One or more languages of a Common Voice release, unpacked."""

    folder: str = ""
    """Folder of a language, such as cv-corpus-17.0-2024-03-15/de, or of a release, which holds the languages."""
    languages: list[str] = field(default_factory=list)
    """Of a release: the languages to read, by the names of their folders; empty: all that are there."""
    splits: list[str] = field(default_factory=lambda: ["train", "dev", "test"])
    """Tables to read: train, dev, test; validated and other add to train whatever of them has no speaker and no
    sentence of dev or test."""
    min_up_votes: int = 0
    """Leave out clips with fewer votes for them."""
    max_down_votes: int | None = None
    """Leave out clips with more votes against them."""
    min_seconds: float = 0.0
    """Leave out shorter clips, by clip_durations.tsv."""
    max_seconds: float = math.inf
    """Leave out longer clips, by clip_durations.tsv."""

    def __post_init__(self) -> None:
        if not self.splits:
            raise DataError(f"splits is empty: say --splits with some of {', '.join(TABLES)}")
        for split in self.splits:
            check_choice("splits", split, list(TABLES))
        if not 0 <= self.min_seconds < self.max_seconds:
            raise DataError(f"min_seconds is {self.min_seconds}, max_seconds {self.max_seconds}: 0 <= min < max")


@dataclass(frozen=True)
class Clip:
    """A row of a table."""

    where: str
    """FILE:LINE"""
    name: str
    """Name of the audio file in clips/."""
    sentence: str
    speaker: str
    locale: str
    up_votes: int
    down_votes: int


def sources(settings: CommonVoiceSettings) -> list[Source]:
    """The clips of the tables, sorted by id, the clip's name. Raises DataError naming file and line."""
    listed: dict[str, Source] = {}
    for folder in _language_folders(settings):
        for source in _language(folder, settings):
            if source.id in listed:
                raise DataError(f"{folder}: the clip {source.id} is in another language's folder too: remove one")
            listed[source.id] = source
    return sorted(listed.values(), key=lambda source: source.id)


def read_clips(path: Path) -> Iterator[Clip]:
    """The rows of a table. Raises DataError naming file and line: wrong columns, rows cut short, repeated clips."""
    seen: set[str] = set()
    for where, row in _rows(path, _COLUMNS):
        name = row["path"] if "." in row["path"] else row["path"] + ".mp3"  # early releases leave it out
        if not _CLIP.fullmatch(name) or name.startswith("."):
            raise DataError(f"{where}: path is {name[:80]!r}, expected the name of a file in clips/")
        if name in seen:
            raise DataError(f"{where}: the clip {name} stands twice in this table")
        seen.add(name)
        if not row["client_id"].isprintable() or not row["client_id"]:
            raise DataError(f"{where}: client_id is {row['client_id'][:80]!r}, expected a speaker's id")
        votes = [_count(row, column, where) for column in ("up_votes", "down_votes")]
        sentence = " ".join(row["sentence"].split())
        yield Clip(where, name, sentence, row["client_id"], row.get("locale", ""), *votes)


def read_durations(path: Path) -> dict[str, float]:
    """Seconds of every clip, by `clip_durations.tsv` (milliseconds)."""
    found = {}
    for where, row in _rows(path, ("clip", "duration[ms]")):
        if not row["duration[ms]"].isascii() or not row["duration[ms]"].isdigit() or len(row["duration[ms]"]) > 12:
            raise DataError(f"{where}: duration[ms] is {row['duration[ms]'][:80]!r}, expected milliseconds")
        found[row["clip"]] = int(row["duration[ms]"]) / 1000
    return found


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """('FILE:LINE', values by column) of a table that has at least the needed columns."""
    header: list[str] | None = None
    for where, line in numbered_lines(path):
        values = line.split("\t")
        if header is None:
            header = values
            missing = [column for column in needed if column not in header]
            if missing or len(set(header)) < len(header):
                raise DataError(f"{where}: expected the columns {', '.join(needed)}, found {', '.join(header)[:300]}")
        elif len(values) != len(header):
            raise DataError(f"{where}: {len(values)} values where the header has {len(header)}: {line[:80]!r}")
        else:
            yield where, dict(zip(header, values, strict=True))
    if header is None:
        raise DataError(f"{path}: is empty; unpack the archive again")


def _count(row: dict[str, str], column: str, where: str) -> int:
    value = row.get(column, "")
    if not value:
        return 0
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise DataError(f"{where}: {column} is {value[:80]!r}, expected a number of votes")
    return int(value)


def _language_folders(settings: CommonVoiceSettings) -> list[Path]:
    given = existing_folder("folder", settings.folder)
    if (given / "clips").is_dir() and not settings.languages:
        return [given]
    there = sorted(name for name in listed_names(given) if (given / name / "clips").is_dir())
    for language in settings.languages:
        if language not in there:
            raise DataError(f"languages names {language!r}, {given} has {', '.join(there) or 'no LANG/clips'}")
    if not there:
        raise DataError(f"folder {given} has no folder clips, nor has any folder in it: unpack a language's archive")
    return [given / name for name in dict.fromkeys(settings.languages or there)]


def _language(folder: Path, settings: CommonVoiceSettings) -> list[FileSource]:
    files = listed_names(folder / "clips")
    timed = settings.min_seconds > 0 or settings.max_seconds < math.inf
    seconds = read_durations(folder / "clip_durations.tsv") if timed else {}
    tables = [name for name in TABLES if name in settings.splits]  # published splits come before validated and other
    held_out = _held_out(folder) if {"validated", "other"} & set(tables) else (set(), set())
    chosen: dict[str, FileSource] = {}
    missing: list[str] = []
    for table in tables:
        for clip in read_clips(folder / f"{table}.tsv"):
            extra = table not in ("train", "dev", "test")
            if extra and (clip.name in chosen or clip.speaker in held_out[0] or clip.sentence in held_out[1]):
                continue
            if clip.name in chosen:
                raise DataError(f"{clip.where}: the clip {clip.name} is in another split's table too")
            if timed and clip.name not in seconds:
                raise DataError(f"{clip.where}: clip_durations.tsv has no {clip.name}; do not limit the seconds")
            if not _wanted(clip, seconds.get(clip.name), settings):
                continue
            if clip.name not in files:
                missing.append(clip.name)
            chosen[clip.name] = _source(folder, clip, TABLES[table])
    if missing:
        raise DataError(f"{folder / 'clips'}: {len(missing)} clips are missing: {summary(missing)}; unpack it again")
    return list(chosen.values())


def _held_out(folder: Path) -> tuple[set[str], set[str]]:
    """Speakers and sentences of dev and test."""
    clips = [clip for table in ("dev", "test") for clip in read_clips(folder / f"{table}.tsv")]
    return {clip.speaker for clip in clips}, {clip.sentence for clip in clips}


def _wanted(clip: Clip, seconds: float | None, settings: CommonVoiceSettings) -> bool:
    few = settings.max_down_votes is None or clip.down_votes <= settings.max_down_votes
    fitting = seconds is None or settings.min_seconds <= seconds <= settings.max_seconds
    return few and fitting and clip.up_votes >= settings.min_up_votes and bool(clip.sentence)


def _source(folder: Path, clip: Clip, split: str) -> FileSource:
    language = clip.locale or folder.name
    recording = Recording(Path(clip.name).stem, clip.sentence, language=language, speaker=clip.speaker, split=split)
    return FileSource(recording, folder / "clips" / clip.name)
