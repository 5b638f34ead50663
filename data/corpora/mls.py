"""Multilingual LibriSpeech: read books in eight languages, from the Hugging Face hub or OpenSLR 94.

On the hub `facebook/multilingual_librispeech` has seven languages and `parler-tts/mls_eng` English. OpenSLR's layout is
`mls_LANGUAGE[_opus]/{train,dev,test}/audio/SPEAKER/BOOK/SPEAKER_BOOK_NUMBER.{flac,opus}` with `transcripts.txt` and
`segments.txt` in every split, `limited_supervision` in train, and `metainfo.txt`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
from jsonargparse.typing import NonNegativeFloat

from common.errors import UserError, did_you_mean
from data.audio.folders import is_clutter
from data.corpora import huggingface
from data.corpora.audio_files import FileSource
from data.corpora.base import Unreadable, check_not_empty, check_unusable
from data.corpora.huggingface import HuggingFaceSettings
from data.corpora.lazy import LazySources, check_unique, repeat
from data.corpora.remote import FileCache
from data.corpora.text_files import existing_folder, lines_or_faults, listed_names, numbered_lines
from data.recording import Recording

LANGUAGES = {
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fr": "french",
    "it": "italian",
    "nl": "dutch",
    "pl": "polish",
    "pt": "portuguese",
}
# Names of the hub. OpenSLR's hour consists of six lists of ten minutes, which are separate splits here.
LIMITED = {"9_hours": ["9hr"], "1_hours": [f"1hr/{n}" for n in range(6)]} | {
    f"10_minutes_{n}": [f"1hr/{n}"] for n in range(6)
}
MlsSplit = Literal[
    "train", "dev", "test", "9_hours", "1_hours", "10_minutes_0", "10_minutes_1", "10_minutes_2", "10_minutes_3",
    "10_minutes_4", "10_minutes_5",
]  # fmt: skip
_ID = re.compile(r"(\d+)_(\d+)_(\d+)")


@dataclass(frozen=True)
class MlsSettings:
    """Multilingual LibriSpeech from the hub, or with --folder from the folders of OpenSLR."""

    languages: list[str] = field(default_factory=list)
    """Codes or names, such as de or german; empty: all eight, or with --folder all that exist."""
    splits: list[MlsSplit] = field(default_factory=lambda: ["train", "dev", "test"])
    """train, dev, test; instead of train: 9_hours, 1_hours (limited supervision), with --folder 10_minutes_0 to _5."""
    folder: str = ""
    """Folder of OpenSLR's unpacked mls_LANGUAGE or mls_LANGUAGE_opus folders, or one of them; empty: the hub."""
    gender: Literal["all", "F", "M"] = "all"
    """Only speakers of this gender, according to metainfo.txt (with --folder)."""
    dataset: str = "facebook/multilingual_librispeech"
    """Dataset of the hub, or a local copy of it, for all languages but English."""
    english_dataset: str = "parler-tts/mls_eng"
    """Dataset of the hub, or a local copy of it, for English."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: main."""
    cache: str = "~/.cache/bestrq/huggingface"
    """Cache folder for files of the hub; parts of a preparation may share it."""
    cache_gb: NonNegativeFloat = 0.0
    """Size limit of the cache in GB (10**9 bytes); the least recently used files are removed. 0: keep all files."""

    def __post_init__(self) -> None:
        for language in self.languages:
            if _code(language) not in LANGUAGES:
                suggestion = did_you_mean(language, [*LANGUAGES, *LANGUAGES.values()])
                raise UserError(f"languages is {language!r}, expected one of {', '.join(LANGUAGES)}.{suggestion}")
        check_not_empty("splits", self.splits, get_args(MlsSplit))
        if "train" in self.splits and set(self.splits) & set(LIMITED):
            raise UserError(
                f"splits is {', '.join(self.splits)}: train contains the limited supervision; give only one of them"
            )
        if self.gender != "all" and not self.folder:
            raise UserError("gender needs --folder: only OpenSLR's metainfo.txt holds it")


def sources(settings: MlsSettings) -> LazySources:
    """List all recordings by language and split, in the order of the files. Raises UserError naming file and line."""
    return _from_folder(settings) if settings.folder else _from_hub(settings)


def _code(language: str) -> str:
    """Code of a language: 'german', 'mls_german_opus', 'de' -> 'de'; unknown names are returned unchanged."""
    name = re.sub(r"^mls_|_opus$", "", language.lower())
    return next((code for code, full in LANGUAGES.items() if full == name), name)


def _from_hub(settings: MlsSettings) -> LazySources:
    tables = []
    for code in dict.fromkeys(map(_code, settings.languages or LANGUAGES)):
        hub_settings = HuggingFaceSettings(
            dataset=settings.english_dataset if code == "en" else settings.dataset,
            subset="" if code == "en" else LANGUAGES[code],
            splits=[*settings.splits],
            text_column="transcript",
            speaker_column="speaker_id",
            language=code,
            revision=settings.revision,
        )
        tables.append(huggingface.listing(hub_settings))
    cache = FileCache(settings.cache, round(settings.cache_gb * 1e9))
    return huggingface.checked(pa.concat_tables(tables), "Multilingual LibriSpeech", cache)


def _from_folder(settings: MlsSettings) -> LazySources:
    rows: list[pa.Table] = []
    for folder in _language_folders(settings):
        speakers = _speakers(folder / "metainfo.txt", settings.gender)
        for split in dict.fromkeys(settings.splits):
            listed = _listed(folder, split, speakers)
            if not len(listed):
                raise UserError(f"{folder}: split {split} is empty with these settings")
            rows.append(listed)
    table = pa.concat_tables(rows)
    check_unique(table, settings.folder)
    return LazySources(table.unify_dictionaries(), _file_source)


def _language_folders(settings: MlsSettings) -> list[Path]:
    given = existing_folder("folder", settings.folder)
    names = [given.name] if re.fullmatch(r"mls_[a-z]+(_opus)?", given.name) else sorted(listed_names(given))
    parent = given.parent if names == [given.name] else given
    folders: dict[str, Path] = {}
    for name in names:
        code = _code(name)
        if not re.fullmatch(r"mls_[a-z]+(_opus)?", name) or code not in LANGUAGES or not (parent / name).is_dir():
            continue
        if code in folders:
            raise UserError(
                f"{parent} holds {folders[code].name} and {name}, the same recordings: give one as --folder"
            )
        folders[code] = parent / name
    codes = [_code(language) for language in settings.languages] or list(folders)
    missing = [code for code in codes if code not in folders]
    if missing or not folders:
        raise UserError(
            f"folder {given} holds no mls_LANGUAGE{' for ' + ', '.join(missing) if missing else ''}: it should hold "
            f"folders such as mls_german or mls_german_opus, unpacked from OpenSLR 94"
        )
    return [folders[code] for code in dict.fromkeys(codes)]


def _speakers(path: Path, gender: str) -> set[str] | None:
    """Speakers of a gender; None for all. A row: speaker | gender | partition | minutes | book | title | chapter."""
    if gender == "all":
        return None
    speakers = set()
    for number, (where, line) in enumerate(numbered_lines(path)):
        fields = [part.strip() for part in line.split("|")]
        if number == 0:
            if fields[:2] != ["SPEAKER", "GENDER"]:
                raise UserError(f"{where}: expected a header SPEAKER | GENDER: {line[:80]!r}")
        elif len(fields) < 2 or not fields[0].isdigit() or fields[1] not in ("F", "M"):
            raise UserError(f"{where}: expected a speaker's number and F or M, separated by |: {line[:80]!r}")
        elif fields[1] == gender:
            speakers.add(fields[0])
    return speakers


def _listed(folder: Path, split: str, speakers: set[str] | None) -> pa.Table:
    """Table with one row per recording of a split: id, text, language, split, part, address (audio file), fault.

    An unreadable line gives a row with its location as id, and the fault.

    Raises UserError if half or more of the lines are unreadable.
    """
    part = "train" if split in LIMITED else split
    audio = folder / part / "audio"
    if not audio.is_dir():
        raise UserError(f"{audio}: no such folder; unpack the archive of {folder.name} again")
    handles = _handles(folder, split) if split in LIMITED else None
    suffix = _suffix(audio)
    transcripts = folder / part / "transcripts.txt"
    ids: list[str] = []
    texts: list[str] = []
    paths: list[str] = []
    faults: list[str | None] = []
    lines = unreadable = 0
    for where, line in lines_or_faults(transcripts):
        lines += 1
        id, fault, text = _transcript(line, where)
        if fault is not None:
            unreadable += 1
            for values, value in ((ids, f"{where} ({split})"), (texts, ""), (paths, ""), (faults, fault)):
                values.append(value)
            continue
        speaker, book, _ = id.split("_")
        if (handles is not None and id not in handles) or (speakers is not None and speaker not in speakers):
            continue
        ids.append(id)
        texts.append(text)
        paths.append(f"{audio}/{speaker}/{book}/{id}{suffix}")
        faults.append(None)
    if unreadable:
        check_unusable(next(filter(None, faults)), unreadable, lines)
    if handles is not None and speakers is None and len(handles - set(ids)) > unreadable:
        missing = min(handles - set(ids))
        raise UserError(f"{transcripts}: has no {missing}, which limited_supervision lists: download the files again")
    columns = {"id": ids, "text": texts, "address": paths, "fault": faults}
    table = {name: pa.array(values, pa.large_string()) for name, values in columns.items()}
    constants = {"language": _code(folder.name), "split": part, "part": f"{folder.name}/{split}"}
    return pa.table(table | {name: repeat(value, len(ids)) for name, value in constants.items()})


def _transcript(line: str | UserError, where: str) -> tuple[str, str | None, str]:
    """Id, fault or None, and text of an `id<TAB>text` line."""
    if isinstance(line, UserError):
        return "", str(line), ""
    id, tab, text = line.partition("\t")
    if not tab or not _ID.fullmatch(id):
        return "", f"{where}: expected SPEAKER_BOOK_NUMBER, a tab, and the text: {line[:80]!r}", ""
    text = " ".join(text.split())
    fault = None if text else f"{where}: {id} has no transcript; the line is truncated: download the file again"
    return id, fault, text


def _handles(folder: Path, split: str) -> set[str]:
    """Ids of a limited-supervision split."""
    ids = set()
    for name in LIMITED[split]:
        for where, line in numbered_lines(folder / "train" / "limited_supervision" / name / "handles.txt"):
            if not _ID.fullmatch(line.strip()):
                raise UserError(f"{where}: expected an id, SPEAKER_BOOK_NUMBER: {line[:80]!r}")
            ids.add(line.strip())
    if not ids:
        raise UserError(
            f"{folder}: the lists of limited_supervision/{LIMITED[split][0]} are empty: download them again"
        )
    return ids


def _suffix(audio: Path) -> str:
    """Suffix of the first audio file, '.flac' or '.opus': a test of every file of English would take too long."""
    for path in audio.glob("*/*/*"):
        if path.suffix in (".flac", ".opus") and not any(map(is_clutter, path.relative_to(audio).parts)):
            return path.suffix
    raise UserError(f"{audio}: holds no SPEAKER/BOOK/*.flac or *.opus; unpack the archive again")


def _file_source(row: Mapping[str, Any]) -> FileSource | Unreadable:
    id = row["id"]
    if row["fault"] is not None:
        return Unreadable(id, row["fault"])
    speaker = id.partition("_")[0]
    recording = Recording(id, row["text"], language=row["language"], speaker=speaker, split=row["split"])
    return FileSource(recording, Path(row["address"]))
