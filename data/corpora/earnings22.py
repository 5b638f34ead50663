"""Earnings-22 (Del Rio et al. 2022): 125 earnings calls from 27 countries, 119 hours; each call is one recording.

Published layout: FOLDER/metadata.csv, FOLDER/media/ID.mp3, FOLDER/transcripts/{nlp_references/ID.nlp,
force_aligned_nlp_references/ID.aligned.nlp,normalizations/ID.norm.json}. Layout of the long-context paper:
FOLDER/{dev,test}_original/ID.mp3 and FOLDER/full_transcripts.json, an object of texts by ID.

There are two corpora, whose error rates are not comparable: `earnings22`, the 6 + 6 calls of the usual dev and test
lists, and `earnings22-full`, all calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.base import Unreadable, mostly_readable
from data.corpora.json_lines import is_file, text_field
from data.corpora.nlp_tokens import read_nlp, read_normalizations, timed_words, transcript_units
from data.corpora.tables import table_rows
from data.corpora.text_files import existing_folder, summary
from data.recording import Recording
from data.skipped import NO_WORD_TIMES
from data.splits.published import published_split
from data.word_times.base import read_json

TRANSCRIPTS_FILE = "full_transcripts.json"
_COLUMNS = {"country": "Country by Ticker", "dialect": "Major Dialect Family"}
_ID = re.compile(r"[\w-][\w.-]*")
_EVENT = re.compile(r"<[^<>]*>")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Earnings22FullSettings:
    """All calls of Earnings-22, as one test set."""

    folder: str = ""
    """Folder earnings22 of the published repository, with metadata.csv, media and transcripts."""
    text: Literal["written", "spoken"] = "written"
    """Words as written ("2021"), or with the most probable spoken form of every tagged token ("twenty twenty one")."""
    punctuation: bool = True
    """Keep punctuation marks in the text; labels never have them."""
    speaker: Literal["country", "dialect", "none"] = "country"
    """Speaker id of a call (it has several speakers): country of the company, dialect family, or none."""


@dataclass(frozen=True)
class Earnings22Settings(Earnings22FullSettings):
    """The 6 + 6 calls of the usual dev and test lists of Earnings-22."""

    folder: str = ""
    """Folder earnings22 of the published repository, with metadata.csv, media and transcripts; or earnings-22 of the
    long-context paper, with dev_original, test_original and full_transcripts.json."""
    splits: list[Literal["dev", "test"]] = field(default_factory=lambda: ["dev", "test"])
    """Lists to read: dev, test."""


def sources(settings: Earnings22Settings) -> list[FileSource]:
    """List the calls of the published lists, sorted by id. Raises UserError naming missing or damaged files."""
    folder = existing_folder("folder", settings.folder)
    lists = published_split("earnings22")
    splits = {id: split for split in dict.fromkeys(settings.splits) for id in lists[split]}
    if not (folder / "transcripts").is_dir() and is_file(folder / TRANSCRIPTS_FILE):
        return _paper_layout(folder, splits, settings)
    # Only the speaker comes from this table, so it may be missing.
    try:
        metadata, unreadable = _metadata(folder)
        reason = unreadable[0].reason if unreadable else f"{folder / 'metadata.csv'}: no row for the call"
    except UserError as error:
        metadata, reason = {}, str(error)
    return _published_layout(folder, splits, metadata, settings, f"kept without its speaker: {reason}")


def sources_full(settings: Earnings22FullSettings) -> list[FileSource | Unreadable]:
    """List all calls in metadata.csv, sorted by id, in the split test, then its unreadable rows.

    Raises UserError as `sources` does, and if half or more of the table is unreadable.
    """
    folder = existing_folder("folder", settings.folder)
    if not (folder / "transcripts").is_dir() and is_file(folder / TRANSCRIPTS_FILE):
        raise UserError(
            f"folder {folder} has the layout of the long-context paper, with only the calls of its dev and test lists: "
            "the full set needs the published repository; or prepare the corpus earnings22"
        )
    metadata, unreadable = _metadata(folder)
    return [*_published_layout(folder, dict.fromkeys(metadata, "test"), metadata, settings), *unreadable]


def _published_layout(
    folder: Path,
    splits: Mapping[str, str],
    metadata: Mapping[str, Mapping[str, str]],
    settings: Earnings22FullSettings,
    without_row: str = "",
) -> list[FileSource]:
    """Sources of the calls of `splits`. `without_row`: warning for a call without a row in the table."""
    media = {id: folder / "media" / f"{id}.mp3" for id in sorted(splits)}
    _check_media(media, folder)
    listed = []
    for id, path in media.items():
        row = {} if settings.speaker == "none" else metadata.get(id)
        warnings = [without_row] if row is None else []
        transcripts = folder / "transcripts"
        aligned = transcripts / "force_aligned_nlp_references" / f"{id}.aligned.nlp"
        spoken = None
        if settings.text == "spoken":
            spoken = read_normalizations(transcripts / "normalizations" / f"{id}.norm.json")
        tokens = read_nlp(transcripts / "nlp_references" / f"{id}.nlp")
        units = list(transcript_units(tokens, spoken, settings.punctuation))
        words = None
        if aligned.parent.is_dir():
            try:
                words = timed_words(units, read_nlp(aligned), str(aligned))
            except UserError as error:
                warnings.append(f"{NO_WORD_TIMES}: {error}")
        recording = Recording(
            id=id,
            text=" ".join(word for _, words in units for word in words),
            words=words,
            language="en",
            speaker=row[_COLUMNS[settings.speaker]].strip() if row else "",
            split=splits[id],
        )
        listed.append(FileSource(recording, path, warnings=tuple(warnings)))
    return listed


def _paper_layout(folder: Path, splits: Mapping[str, str], settings: Earnings22Settings) -> list[FileSource]:
    if settings.text == "spoken":
        raise UserError(
            f"text is 'spoken', but {folder / TRANSCRIPTS_FILE} has only written texts: use the published layout"
        )
    media = {id: folder / f"{splits[id]}_original" / f"{id}.mp3" for id in sorted(splits)}
    _check_media(media, folder)
    where = str(folder / TRANSCRIPTS_FILE)
    texts = read_json(folder / TRANSCRIPTS_FILE)
    listed = []
    for id, path in media.items():
        text = text_field(texts, id, where) if isinstance(texts, dict) else None
        if text is None:
            raise UserError(f"{where}: no text for the call {id}")
        plain = " ".join(_EVENT.sub(" ", text).split())
        listed.append(FileSource(Recording(id, plain, language="en", split=splits[id]), path))
    return listed


def _check_media(media: Mapping[str, Path], folder: Path) -> None:
    """Raise UserError unless all audio files exist: error rates of a subset of the calls are not comparable."""
    if not media:
        raise UserError(f"{folder}: the lists have no call")
    missing = [id for id, path in media.items() if not is_file(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(media)} calls have no audio below {folder}: {summary(missing)}; "
            f"expected {media[missing[0]]}"
        )
    for path in media.values():
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{path}: a pointer of git-lfs instead of audio: run `git lfs pull` in the repository")


def _metadata(folder: Path) -> tuple[dict[str, dict[str, str]], list[Unreadable]]:
    """Rows of metadata.csv by call, and unreadable rows.

    Raises UserError naming file and line: missing columns, or half or more of the rows unreadable.
    """
    rows: dict[str, dict[str, str]] = {}
    unreadable = []
    for where, row in table_rows(folder / "metadata.csv", ("File ID", *_COLUMNS.values()), ","):
        if isinstance(row, UserError):
            unreadable.append(Unreadable(where, str(row)))
        elif not _ID.fullmatch(row["File ID"]) or row["File ID"] in rows:
            reason = f"{where}: File ID is {row['File ID'][:60]!r}, expected a unique name"
            unreadable.append(Unreadable(where, reason))
        else:
            rows[row["File ID"]] = row
    mostly_readable([*unreadable, *rows])
    return rows, unreadable
