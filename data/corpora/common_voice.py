"""Mozilla Common Voice: LANG/clips/*.mp3, and tables of tab-separated values, one a split.

Most tables are not CSV: a quotation mark in a sentence is part of the sentence, and nothing is escaped. Some rows are
(`tables.py` distinguishes them). Unreadable rows are skipped and counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from data.corpora.base import FileSource, Source, Unreadable, check_choice, mostly_readable
from data.corpora.tables import table_rows
from data.corpora.text_files import existing_folder, listed_names, summary
from data.format.schema import Recording
from data.names import name_fault

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
            raise UserError(f"splits is empty: say --splits with some of {', '.join(TABLES)}")
        for split in self.splits:
            check_choice("splits", split, list(TABLES))
        if not 0 <= self.min_seconds < self.max_seconds:
            raise UserError(f"min_seconds is {self.min_seconds}, max_seconds {self.max_seconds}: 0 <= min < max")


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
    """Clips and unreadable rows of the tables, sorted by id; the id of a clip is its name.

    Raises UserError naming file and line, also if half or more of a table is unreadable.
    """
    listed: dict[str, Source] = {}
    for folder in _language_folders(settings):
        for source in _language(folder, settings):
            if source.id in listed:
                raise UserError(f"{folder}: the clip {source.id} is in another language's folder too: remove one")
            listed[source.id] = source
    return sorted(listed.values(), key=lambda source: source.id)


def read_clips(path: Path) -> list[Clip | Unreadable]:
    """Rows of a table. A truncated row, an invalid clip name or a repeated clip gives an Unreadable.

    Raises UserError naming file and line: missing columns, or half or more of the rows unreadable.
    """
    listed: list[Clip | Unreadable] = []
    seen: set[str] = set()
    for where, row in table_rows(path, _COLUMNS):
        try:
            if isinstance(row, UserError):
                raise row
            clip = _clip(row, where)
            if clip.name in seen:
                raise UserError(f"{where}: the clip {clip.name} occurs twice in this table")
            seen.add(clip.name)
            listed.append(clip)
        except UserError as error:
            listed.append(Unreadable(where, str(error)))
    mostly_readable(listed)
    return listed


def _clip(row: dict[str, str], where: str) -> Clip:
    """Parse a row. Raises UserError naming file and line."""
    name = row["path"] if "." in row["path"] else row["path"] + ".mp3"  # early releases leave it out
    if not _CLIP.fullmatch(name) or name.startswith("."):
        raise UserError(f"{where}: path is {name[:80]!r}, expected the name of a file in clips/")
    if fault := name_fault(row["client_id"]):
        raise UserError(f"{where}: client_id {row['client_id'][:80]!r} {fault}, expected a speaker's id")
    votes = [_count(row, column, where) for column in ("up_votes", "down_votes")]
    sentence = " ".join(row["sentence"].split())
    return Clip(where, name, sentence, row["client_id"], row.get("locale", ""), *votes)


def read_durations(path: Path) -> dict[str, float]:
    """Seconds by clip, from `clip_durations.tsv` (milliseconds), without unreadable rows.

    Raises UserError naming file and line: wrong columns, or half of the rows or more cannot be read.
    """
    found = {}
    listed: list[object] = []
    for where, row in table_rows(path, ("clip", "duration[ms]")):
        value = "" if isinstance(row, UserError) else row["duration[ms]"]
        if isinstance(row, UserError):
            listed.append(Unreadable(where, str(row)))
        elif not value.isascii() or not value.isdigit() or len(value) > 12:
            listed.append(Unreadable(where, f"{where}: duration[ms] is {value[:80]!r}, expected milliseconds"))
        else:
            listed.append(row)
            found[row["clip"]] = int(value) / 1000
    mostly_readable(listed)
    return found


def _count(row: dict[str, str], column: str, where: str) -> int:
    value = row.get(column, "")
    if not value:
        return 0
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise UserError(f"{where}: {column} is {value[:80]!r}, expected a number of votes")
    return int(value)


def _language_folders(settings: CommonVoiceSettings) -> list[Path]:
    given = existing_folder("folder", settings.folder)
    if (given / "clips").is_dir() and not settings.languages:
        return [given]
    there = sorted(name for name in listed_names(given) if (given / name / "clips").is_dir())
    for language in settings.languages:
        if language not in there:
            raise UserError(f"languages names {language!r}, {given} has {', '.join(there) or 'no LANG/clips'}")
    if not there:
        raise UserError(f"folder {given} has no folder clips, nor has any folder in it: unpack a language's archive")
    return [given / name for name in dict.fromkeys(settings.languages or there)]


def _language(folder: Path, settings: CommonVoiceSettings) -> list[FileSource | Unreadable]:
    files = listed_names(folder / "clips")
    timed = settings.min_seconds > 0 or settings.max_seconds < math.inf
    seconds = read_durations(folder / "clip_durations.tsv") if timed else {}
    tables = [name for name in TABLES if name in settings.splits]  # published splits come before validated and other
    held_out = _held_out(folder) if {"validated", "other"} & set(tables) else (set(), set())
    chosen: dict[str, FileSource | Unreadable] = {}
    missing: list[str] = []
    for table in tables:
        for clip in read_clips(folder / f"{table}.tsv"):
            if isinstance(clip, Unreadable):
                chosen[clip.id] = clip
                continue
            extra = table not in ("train", "dev", "test")
            if extra and (clip.name in chosen or clip.speaker in held_out[0] or clip.sentence in held_out[1]):
                continue
            if clip.name in chosen:
                raise UserError(f"{clip.where}: the clip {clip.name} is in another split's table too")
            if timed and clip.name not in seconds:
                reason = f"{clip.where}: clip_durations.tsv has no {clip.name}; do not limit the seconds"
                chosen[clip.name] = Unreadable(Path(clip.name).stem, reason)
                continue
            if not _wanted(clip, seconds.get(clip.name), settings):
                continue
            if clip.name not in files:
                missing.append(clip.name)
            chosen[clip.name] = _source(folder, clip, TABLES[table])
    if missing:
        raise UserError(f"{folder / 'clips'}: {len(missing)} clips are missing: {summary(missing)}; unpack it again")
    return list(chosen.values())


def _held_out(folder: Path) -> tuple[set[str], set[str]]:
    """Speakers and sentences of dev and test."""
    listed = [clip for table in ("dev", "test") for clip in read_clips(folder / f"{table}.tsv")]
    clips = [clip for clip in listed if isinstance(clip, Clip)]
    return {clip.speaker for clip in clips}, {clip.sentence for clip in clips}


def _wanted(clip: Clip, seconds: float | None, settings: CommonVoiceSettings) -> bool:
    few = settings.max_down_votes is None or clip.down_votes <= settings.max_down_votes
    fitting = seconds is None or settings.min_seconds <= seconds <= settings.max_seconds
    return few and fitting and clip.up_votes >= settings.min_up_votes and bool(clip.sentence)


def _source(folder: Path, clip: Clip, split: str) -> FileSource:
    language = clip.locale or folder.name
    recording = Recording(Path(clip.name).stem, clip.sentence, language=language, speaker=clip.speaker, split=split)
    return FileSource(recording, folder / "clips" / clip.name)
