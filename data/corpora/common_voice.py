"""Mozilla Common Voice: LANG/clips/*.mp3, and one table of tab-separated values per split.

Most tables are not CSV: a quotation mark in a sentence is part of the sentence, and nothing is escaped. Some rows are
CSV (`tables.py` distinguishes them). Unreadable rows are skipped and counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.base import Source, Unreadable, check_not_empty, mostly_readable
from data.corpora.tables import table_rows
from data.corpora.text_files import existing_folder, listed_names, summary
from data.names import name_fault
from data.recording import Recording

Table = Literal["train", "dev", "test", "validated", "other"]
# Tables of clips and their splits; validated and other are for training, without speakers and sentences of dev or test.
TABLES = {"train": "train", "dev": "dev", "test": "test", "validated": "train", "other": "train"}
_COLUMNS = ("client_id", "path", "sentence")
_CLIP = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class CommonVoiceSettings:
    """Languages of an unpacked Common Voice release."""

    folder: str = ""
    """Folder of a language, such as cv-corpus-17.0-2024-03-15/de, or of a release with several languages."""
    languages: list[str] = field(default_factory=list)
    """Languages of a release to read, by the names of their folders; empty: all."""
    splits: list[Literal["train", "dev", "test", "validated", "other"]] = field(
        default_factory=lambda: ["train", "dev", "test"]
    )
    """Tables to read: train, dev, test; also validated and other, whose clips are added to train if they share neither
    speaker nor sentence with dev or test."""
    min_up_votes: int = 0
    """Exclude clips with fewer up-votes."""
    max_down_votes: int | None = None
    """Exclude clips with more down-votes."""
    min_seconds: float = 0.0
    """Exclude shorter clips, according to clip_durations.tsv."""
    max_seconds: float = math.inf
    """Exclude longer clips, according to clip_durations.tsv."""

    def __post_init__(self) -> None:
        check_not_empty("splits", self.splits, TABLES)
        if not 0 <= self.min_seconds < self.max_seconds:
            raise UserError(
                f"min_seconds is {self.min_seconds}, max_seconds {self.max_seconds}: must be 0 <= min < max"
            )


@dataclass(frozen=True)
class Clip:
    """Row of a table."""

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
    """List the clips and unreadable rows of the tables, sorted by id; the id of a clip is its name.

    Raises UserError naming file and line, also if half or more of a table is unreadable.
    """
    listed: dict[str, Source] = {}
    for folder in _language_folders(settings):
        for source in _language(folder, settings):
            if source.id in listed:
                raise UserError(f"{folder}: the clip {source.id} is also in the folder of another language: remove one")
            listed[source.id] = source
    return sorted(listed.values(), key=lambda source: source.id)


def read_clips(path: Path) -> list[Clip | Unreadable]:
    """Read the rows of a table. A truncated row, an invalid clip name or a repeated clip gives an Unreadable.

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
    name = row["path"] if "." in row["path"] else row["path"] + ".mp3"  # missing in early releases
    if not _CLIP.fullmatch(name) or name.startswith("."):
        raise UserError(f"{where}: path is {name[:80]!r}, expected the name of a file in clips/")
    if fault := name_fault(row["client_id"]):
        raise UserError(f"{where}: client_id {row['client_id'][:80]!r} {fault}, expected a speaker's id")
    votes = [_count(row, column, where) for column in ("up_votes", "down_votes")]
    sentence = " ".join(row["sentence"].split())
    return Clip(where, name, sentence, row["client_id"], row.get("locale", ""), *votes)


def read_durations(path: Path) -> dict[str, float]:
    """Seconds by clip, from `clip_durations.tsv` (milliseconds), without unreadable rows.

    Raises UserError naming file and line: wrong columns, or half or more of the rows unreadable.
    """
    seconds = {}
    rows: list[object] = []
    for where, row in table_rows(path, ("clip", "duration[ms]")):
        value = "" if isinstance(row, UserError) else row["duration[ms]"]
        if isinstance(row, UserError):
            rows.append(Unreadable(where, str(row)))
        elif not value.isascii() or not value.isdigit() or len(value) > 12:
            rows.append(Unreadable(where, f"{where}: duration[ms] is {value[:80]!r}, expected milliseconds"))
        else:
            rows.append(row)
            seconds[row["clip"]] = int(value) / 1000
    mostly_readable(rows)
    return seconds


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
    existing = sorted(name for name in listed_names(given) if (given / name / "clips").is_dir())
    for language in settings.languages:
        if language not in existing:
            raise UserError(f"languages has {language!r}, but {given} has {', '.join(existing) or 'no LANG/clips'}")
    if not existing:
        raise UserError(f"folder {given} has no folder clips or LANG/clips: unpack the archive of a language")
    return [given / name for name in dict.fromkeys(settings.languages or existing)]


def _language(folder: Path, settings: CommonVoiceSettings) -> list[FileSource | Unreadable]:
    files = listed_names(folder / "clips")
    timed = settings.min_seconds > 0 or settings.max_seconds < math.inf
    seconds = read_durations(folder / "clip_durations.tsv") if timed else {}
    tables = [name for name in TABLES if name in settings.splits]
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
                raise UserError(f"{clip.where}: the clip {clip.name} is also in the table of another split")
            if timed and clip.name not in seconds:
                reason = f"{clip.where}: clip_durations.tsv has no {clip.name}; remove --min_seconds and --max_seconds"
                chosen[clip.name] = Unreadable(Path(clip.name).stem, reason)
                continue
            if not _is_selected(clip, seconds.get(clip.name), settings):
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


def _is_selected(clip: Clip, seconds: float | None, settings: CommonVoiceSettings) -> bool:
    down_votes_fit = settings.max_down_votes is None or clip.down_votes <= settings.max_down_votes
    length_fits = seconds is None or settings.min_seconds <= seconds <= settings.max_seconds
    return down_votes_fit and length_fits and clip.up_votes >= settings.min_up_votes and bool(clip.sentence)


def _source(folder: Path, clip: Clip, split: str) -> FileSource:
    language = clip.locale or folder.name
    recording = Recording(Path(clip.name).stem, clip.sentence, language=language, speaker=clip.speaker, split=split)
    return FileSource(recording, folder / "clips" / clip.name)
