"""Audio files with transcripts beside them, or a JSON-lines manifest as NeMo's.

A folder: every audio file below it, `X.txt` beside `X.flac`. A manifest: one JSON object a line with `audio_filepath`
(a relative one counts from the manifest's folder), `duration` in seconds, `text`, and optionally `offset` (seconds: the
line is then that stretch of the file), `lang` or `language`, `speaker`, `split`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.corpora.base import SPLITS, FileSource, SegmentSource, Source, hash_share
from data.errors import DataError
from data.index import Recording

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_SPLIT_FOLDERS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}
_NAMED = 5  # files that an error message names


@dataclass(frozen=True)
class FolderSettings:
    """Audio of your own: --folder, or --manifest."""

    folder: str = ""
    """Folder with .wav, .flac, .ogg, .opus and .mp3 files at any depth, and .txt transcripts (UTF-8) beside them."""
    manifest: str = ""
    """JSON-lines manifest with audio_filepath, duration and text, as NeMo's: the training part, or everything."""
    dev_manifest: str = ""
    """Manifest of the dev split."""
    test_manifest: str = ""
    """Manifest of the test split."""
    text: Literal["required", "optional", "none"] = "required"
    """Transcripts: required (one that is missing is an error), optional, or none (not even read; for pretraining)."""
    split_by: Literal["auto", "folder", "hash"] = "auto"
    """How recordings get their split. folder: by the name of a sub-folder (train, dev, valid, test). hash: by shares,
    from the transcript, so that a phrase never falls into two splits. auto: by sub-folder, by a manifest's `split`, or
    by the manifest it stands in, where there is such; by hash where nothing tells any split."""
    dev_share: float = 0.05
    """Share of the recordings that goes to dev when splitting by hash."""
    test_share: float = 0.05
    """Share of the recordings that goes to test when splitting by hash."""
    language: str = ""
    """Language of recordings that do not tell theirs, such as en."""

    def __post_init__(self) -> None:
        manifests = [self.manifest, self.dev_manifest, self.test_manifest]
        if bool(self.folder) == any(manifests):
            raise DataError("give either --folder DIR or --manifest FILE (with --dev_manifest, --test_manifest)")
        if min(self.dev_share, self.test_share) < 0 or self.dev_share + self.test_share > 1:
            raise DataError(
                f"dev_share is {self.dev_share} and test_share {self.test_share}: both must be 0 or more, together at "
                "most 1"
            )


def sources(settings: FolderSettings) -> list[Source]:
    """All recordings, sorted by id. Raises DataError, naming files, for whatever a look at the names can tell."""
    if settings.folder:
        return _from_folder(settings)
    given = {"train": settings.manifest, "dev": settings.dev_manifest, "test": settings.test_manifest}
    alone = not settings.dev_manifest and not settings.test_manifest
    listed: list[Source] = []
    for split, manifest in given.items():
        if manifest:
            listed += _from_manifest(Path(manifest).expanduser(), settings, None if alone else split)
    return sorted(listed, key=lambda source: source.id)


def _from_folder(settings: FolderSettings) -> list[Source]:
    folder = Path(settings.folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"folder is {settings.folder!r}: there is no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"folder {folder} holds no audio file ({', '.join(SUFFIXES)}), nor do the folders below it")
    missing = [] if settings.text != "required" else [p for p in paths if not p.with_suffix(".txt").is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} audio files in {folder} have no .txt transcript beside them: "
            f"{_names(missing)}. Add them, or say --text optional or --text none"
        )
    by_name = {path: _folder_split(path.relative_to(folder)) for path in paths}
    use_names = settings.split_by == "folder" or (settings.split_by == "auto" and any(by_name.values()))
    outside = [path for path, split in by_name.items() if use_names and split is None]
    if outside:
        raise DataError(
            f"{len(outside)} audio files in {folder} are in no folder named train, dev, valid or test: "
            f"{_names(outside)}. Move them, or say --split_by hash"
        )
    listed: list[Source] = []
    for path in paths:
        id = path.relative_to(folder).with_suffix("").as_posix()
        text = None if settings.text == "none" else _transcript(path.with_suffix(".txt"))
        split = by_name[path] if use_names else _hash_split(text or id, settings)
        assert split is not None
        listed.append(FileSource(Recording(id, text, language=settings.language, split=split), path))
    return sorted(listed, key=lambda source: source.id)


def _folder_split(path: Path) -> str | None:
    """The split that a relative path's outermost telling folder names."""
    return next((_SPLIT_FOLDERS[part.lower()] for part in path.parts[:-1] if part.lower() in _SPLIT_FOLDERS), None)


def _transcript(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(f"transcript {path} is not UTF-8 ({error}): convert it") from error


def _hash_split(key: str, settings: FolderSettings) -> str:
    share = hash_share(" ".join(key.lower().split()))
    if share < settings.test_share:
        return "test"
    return "dev" if share < settings.test_share + settings.dev_share else "train"


def _from_manifest(manifest: Path, settings: FolderSettings, split: str | None) -> list[Source]:
    try:
        lines = manifest.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"manifest {manifest} cannot be read ({error})") from error
    entries = [(f"{manifest}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise DataError(f"manifest {manifest} is empty: a JSON object with audio_filepath, duration and text a line")
    listed: list[FileSource | SegmentSource] = [
        _entry(where, line, manifest.parent, settings, split) for where, line in entries
    ]
    missing = [source.path for source in listed if not source.path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(listed)} audio files of {manifest} do not exist: {_names(missing)}. A relative "
            f"audio_filepath counts from {manifest.parent}"
        )
    return list(listed)


def _entry(
    where: str, line: str, base: Path, settings: FolderSettings, split: str | None
) -> FileSource | SegmentSource:
    """One line of a manifest. Raises DataError naming the file and the line."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not a JSON object ({error}): {line[:80]!r}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: not a JSON object: {line[:80]!r}")
    name = _field(fields, where, "audio_filepath", str, required=True)
    text = _field(fields, where, "text", str, required=settings.text == "required")
    if settings.text == "none":
        text = None
    start = _seconds(fields, where, "offset")
    duration = _seconds(fields, where, "duration")
    told = split or _field(fields, where, "split", str)
    if told is not None and told not in _SPLIT_FOLDERS:
        raise DataError(f"{where}: split is {told!r}, known are {', '.join(SPLITS)}")
    id = re.sub(r"\.\w+$", "", name) + ("" if start is None else f"@{start:.3f}")
    use_told = told is not None and settings.split_by != "hash"
    recording = Recording(
        id=id,
        text=text,
        language=_field(fields, where, "lang", str) or _field(fields, where, "language", str) or settings.language,
        speaker=str(fields.get("speaker") or ""),
        split=_SPLIT_FOLDERS[told] if use_told and told else _hash_split(text or id, settings),
    )
    path = base / Path(name).expanduser()
    if start is None:
        return FileSource(recording, path)
    if not duration:
        raise DataError(f"{where}: an entry with an offset needs its duration too")
    return SegmentSource(recording, path, start, duration)


def _field(fields: dict[str, Any], where: str, name: str, kind: type, required: bool = False) -> Any:
    value = fields.get(name)
    if value is None and required:
        fix = " (or say --text optional or --text none)" if name == "text" else ""
        raise DataError(f"{where}: no {name!r}: add it{fix}")
    if value is not None and not isinstance(value, kind):
        raise DataError(f"{where}: {name} is {value!r}, expected {kind.__name__}")
    return value


def _seconds(fields: dict[str, Any], where: str, name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise DataError(f"{where}: {name} is {value!r}, expected seconds, 0 or more")
    return float(value)


def _names(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:_NAMED])) + (", ..." if len(paths) > _NAMED else "")
