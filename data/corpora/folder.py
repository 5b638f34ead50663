"""Audio files with transcripts beside them, or a JSON-lines manifest as NeMo's (`manifest.py`).

A folder: every audio file below it (`files_below`), `X.txt` beside `X.flac`, and word times in `X.words.json`,
`X.TextGrid` or `X.ctm`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data.audio.folders import files_below
from data.corpora.base import FileSource, Source, Unreadable, hash_share, mostly_readable
from data.corpora.manifest import SPLIT_NAMES, manifest_sources
from data.corpora.text_files import summary
from data.format.schema import Recording
from data.names import escaped
from data.skipped import NO_WORD_TIMES
from data.word_times import SUFFIXES as WORD_TIMES
from data.word_times import find_word_times

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


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
            raise UserError("give either --folder DIR or --manifest FILE (with --dev_manifest, --test_manifest)")
        if min(self.dev_share, self.test_share) < 0 or self.dev_share + self.test_share > 1:
            raise UserError(
                f"dev_share is {self.dev_share} and test_share {self.test_share}: both must be 0 or more, together at "
                "most 1"
            )


def sources(settings: FolderSettings) -> list[Source]:
    """All recordings and unreadable files, sorted by id.

    Raises UserError, naming files, for problems of the whole folder that file names show.
    """
    if settings.folder:
        return _from_folder(settings)
    given = {"train": settings.manifest, "dev": settings.dev_manifest, "test": settings.test_manifest}
    alone = not settings.dev_manifest and not settings.test_manifest
    listed: list[Source] = []
    for split, manifest in given.items():
        if manifest:
            choose = functools.partial(_manifest_split, settings, None if alone else split)
            listed += manifest_sources(Path(manifest).expanduser(), settings.text, settings.language, choose)
    return sorted(listed, key=lambda source: source.id)


def _from_folder(settings: FolderSettings) -> list[Source]:
    folder = Path(settings.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"folder is {settings.folder!r}: there is no such folder")
    found = files_below(folder)
    everything = found.files
    ids = {
        path: path.relative_to(folder).with_suffix("").as_posix()
        for path in everything
        if path.suffix.lower() in SUFFIXES
    }
    timed = {p.with_name(p.name.removesuffix(end)) for p in everything for end in WORD_TIMES if p.name.endswith(end)}
    unread: list[Source] = [_unread(folder, path, reason) for path, reason in found.unread.items()]
    paths = []
    for path, id in ids.items():
        try:
            Recording(id)
            paths.append(path)
        except UserError as error:
            unread.append(_unread(folder, path, str(error)))
    if not paths:
        raise UserError(f"folder {folder} holds no audio file ({', '.join(SUFFIXES)}), nor do the folders below it")
    missing = [] if settings.text != "required" else [p for p in paths if not p.with_suffix(".txt").is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} audio files in {folder} have no .txt transcript beside them: "
            f"{summary([str(path) for path in missing])}. Add them, or say --text optional or --text none"
        )
    by_name = {path: _folder_split(path.relative_to(folder)) for path in paths}
    use_names = settings.split_by == "folder" or (settings.split_by == "auto" and any(by_name.values()))
    outside = [path for path, split in by_name.items() if use_names and split is None]
    if outside:
        raise UserError(
            f"{len(outside)} audio files in {folder} are in no folder named train, dev, valid or test: "
            f"{summary([str(path) for path in outside])}. Move them, or say --split_by hash"
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
        listed.append(FileSource(recording, path, tuple(warnings)))
    mostly_readable(listed)
    return sorted([*listed, *unread], key=lambda source: source.id)


def _unread(folder: Path, path: Path, reason: str) -> Unreadable:
    return Unreadable(escaped(path.relative_to(folder).as_posix()), f"{escaped(str(path))}: {reason}")


def _folder_split(path: Path) -> str | None:
    """The split that a relative path's outermost telling folder names."""
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


def _manifest_split(settings: FolderSettings, of_manifest: str | None, of_line: str | None, key: str) -> str:
    """The split of a manifest's line: its manifest's, else its own, else by hash."""
    told = of_manifest or of_line
    return told if told and settings.split_by != "hash" else _hash_split(key, settings)


def _hash_split(key: str, settings: FolderSettings) -> str:
    share = hash_share(" ".join(key.lower().split()))
    if share < settings.test_share:
        return "test"
    return "dev" if share < settings.test_share + settings.dev_share else "train"
