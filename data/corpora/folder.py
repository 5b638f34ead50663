"""Corpus of your own audio: a folder of audio files and transcripts, or NeMo manifests (`manifest.py`).

All audio files below a folder are read (`files_below`): `X.flac` with its transcript in `X.txt`, and its word times in
`X.words.json`, `X.TextGrid` or `X.ctm`, if one of these exists.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.hashing import hash_share
from data.audio.folders import files_below
from data.corpora.audio_files import FileSource
from data.corpora.base import Source, Unreadable, mostly_readable
from data.corpora.manifest import SPLIT_NAMES, manifest_sources
from data.corpora.text_files import summary
from data.names import escaped
from data.recording import Recording
from data.skipped import NO_WORD_TIMES
from data.word_times.find import SUFFIXES as WORD_TIMES
from data.word_times.find import find_word_times

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclass(frozen=True)
class FolderSettings:
    """Your own audio: --folder or --manifest."""

    folder: str = ""
    """Folder with .wav, .flac, .ogg, .opus and .mp3 files at any depth; X.txt (UTF-8) is the transcript of X.wav."""
    manifest: str = ""
    """NeMo manifest (JSON lines with audio_filepath, duration and text) of the train split or of all splits."""
    dev_manifest: str = ""
    """Manifest of the dev split."""
    test_manifest: str = ""
    """Manifest of the test split."""
    text: Literal["required", "optional", "none"] = "required"
    """Transcripts: required (a missing one is an error), optional, or none (not read; for pretraining)."""
    split_by: Literal["auto", "folder", "hash"] = "auto"
    """Assignment of splits. folder: by the name of a sub-folder (train, dev, valid, test). hash: by shares, from a hash
    of the transcript, so that a phrase is never in two splits. auto: by sub-folder, by the manifest's option or its
    field `split`; by hash if none of them gives a split."""
    dev_share: float = 0.05
    """Share of the recordings in dev with a split by hash."""
    test_share: float = 0.05
    """Share of the recordings in test with a split by hash."""
    language: str = ""
    """Default language, such as en, for recordings without a language."""

    def __post_init__(self) -> None:
        manifests = [self.manifest, self.dev_manifest, self.test_manifest]
        if bool(self.folder) == any(manifests):
            raise UserError("give either --folder DIR or --manifest FILE (with --dev_manifest, --test_manifest)")
        if min(self.dev_share, self.test_share) < 0 or self.dev_share + self.test_share > 1:
            raise UserError(
                f"dev_share is {self.dev_share} and test_share {self.test_share}: both must be 0 or more, together at "
                "most 1"
            )


def sources(settings: FolderSettings) -> list[Source]:
    """List all recordings and unreadable files, sorted by id.

    Raises UserError, naming files, for missing files and splits of the whole folder.
    """
    if settings.folder:
        return _from_folder(settings)
    manifests = {"train": settings.manifest, "dev": settings.dev_manifest, "test": settings.test_manifest}
    all_splits = not settings.dev_manifest and not settings.test_manifest
    listed: list[Source] = []
    for split, manifest in manifests.items():
        if manifest:
            choose = functools.partial(_manifest_split, settings, None if all_splits else split)
            listed += manifest_sources(Path(manifest).expanduser(), settings.text, settings.language, choose)
    return sorted(listed, key=lambda source: source.id)


def _from_folder(settings: FolderSettings) -> list[Source]:
    folder = Path(settings.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"folder is {settings.folder!r}: no such folder")
    search = files_below(folder)
    ids = {
        path: path.relative_to(folder).with_suffix("").as_posix()
        for path in search.files
        if path.suffix.lower() in SUFFIXES
    }
    timed = {p.with_name(p.name.removesuffix(end)) for p in search.files for end in WORD_TIMES if p.name.endswith(end)}
    unread: list[Source] = [_unread(folder, path, reason) for path, reason in search.unread.items()]
    paths = []
    for path, id in ids.items():
        try:
            Recording(id)
            paths.append(path)
        except UserError as error:
            unread.append(_unread(folder, path, str(error)))
    if not paths:
        raise UserError(f"folder {folder} holds no audio file ({', '.join(SUFFIXES)}) at any depth")
    missing = [] if settings.text != "required" else [p for p in paths if not p.with_suffix(".txt").is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} audio files in {folder} have no .txt transcript next to them: "
            f"{summary([str(path) for path in missing])}. Add them, or use --text optional or --text none"
        )
    by_name = {path: _folder_split(path.relative_to(folder)) for path in paths}
    use_names = settings.split_by == "folder" or (settings.split_by == "auto" and any(by_name.values()))
    unassigned = [path for path, split in by_name.items() if use_names and split is None]
    if unassigned:
        raise UserError(
            f"{len(unassigned)} audio files in {folder} are in no folder named train, dev, valid or test: "
            f"{summary([str(path) for path in unassigned])}. Move them, or use --split_by hash"
        )
    listed: list[Source] = []
    for path in paths:
        id = ids[path]
        text, words, warnings = None, None, []
        if settings.text != "none":
            try:
                text = _transcript(path.with_suffix(".txt"))
            except UserError as error:
                if settings.text == "required":
                    listed.append(Unreadable(id, str(error)))
                    continue
                warnings.append(f"kept without its transcript: {error}")
            try:
                words = find_word_times(path) if path.with_suffix("") in timed else None
            except UserError as error:
                warnings.append(f"{NO_WORD_TIMES}: {error}")
        split = by_name[path] if use_names else _hash_split(text or id, settings)
        assert split is not None
        recording = Recording(id, text, words, language=settings.language, split=split)
        listed.append(FileSource(recording, path, warnings=tuple(warnings)))
    mostly_readable(listed)
    return sorted([*listed, *unread], key=lambda source: source.id)


def _unread(folder: Path, path: Path, reason: str) -> Unreadable:
    return Unreadable(escaped(path.relative_to(folder).as_posix()), f"{escaped(str(path))}: {reason}")


def _folder_split(path: Path) -> str | None:
    """Split of a relative path: that of the outermost folder named after a split."""
    return next((SPLIT_NAMES[part.lower()] for part in path.parts[:-1] if part.lower() in SPLIT_NAMES), None)


def _transcript(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"transcript {path} is not UTF-8 ({error}): convert it") from error
    except OSError as error:
        raise UserError(f"transcript {path} cannot be read ({error.strerror or error})") from error


def _manifest_split(settings: FolderSettings, manifest_split: str | None, line_split: str | None, key: str) -> str:
    """Split of a line of a manifest: that of the manifest, else of the line, else by hash."""
    split = manifest_split or line_split
    return split if split and settings.split_by != "hash" else _hash_split(key, settings)


def _hash_split(key: str, settings: FolderSettings) -> str:
    share = hash_share(" ".join(key.lower().split()))
    if share < settings.test_share:
        return "test"
    return "dev" if share < settings.test_share + settings.dev_share else "train"
