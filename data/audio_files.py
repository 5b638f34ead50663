"""Audio files of a folder that nobody has prepared: which there are, and what their transcripts are called."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.audio import audio_seconds
from data.errors import DataError

AUDIO_SUFFIXES = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".sph", ".w64",
                  ".wav")  # fmt: skip


@dataclass(frozen=True)
class AudioFile:
    """A file to transcribe."""

    path: Path
    name: str
    """of its transcripts, relative to --out and without a suffix"""
    seconds: float
    """as the header says, or estimated where it does not; 0 where it cannot be read"""
    key: str
    """names what its transcripts are made from"""


def list_audio(audio: str, key: str) -> list[AudioFile]:
    """The file, or all audio files below the folder, sorted. Raises DataError where there is none.

    Files that differ in their suffix only keep it in the names of their transcripts.
    """
    root = Path(audio).expanduser()
    if root.is_file():
        paths, root = [root], root.parent
    elif root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    else:
        raise DataError(f"audio = {audio}: there is no such file or folder")
    if not paths:
        raise DataError(f"audio = {audio}: no audio file in this folder; looked for {', '.join(AUDIO_SUFFIXES)}")
    relative = [path.relative_to(root) for path in paths]
    shared = Counter(path.with_suffix("") for path in relative)
    names = [(path if shared[path.with_suffix("")] > 1 else path.with_suffix("")).as_posix() for path in relative]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"audio = {audio}: two files would both be written to {twice[0]!r}: rename one of them")
    return [audio_file(path, name, key) for path, name in zip(paths, names, strict=True)]


def audio_file(path: Path, name: str, key: str) -> AudioFile:
    """What is known of a file before it is read. One that cannot be read is told when its turn comes."""
    state = path.stat()
    content = json.dumps([key, name, state.st_size, state.st_mtime_ns])
    return AudioFile(path, name, audio_seconds(path), hashlib.sha256(content.encode()).hexdigest())


def find_audio(folder: str, ids: Sequence[str]) -> dict[str, Path]:
    """The audio file of each recording that has one: named as its id, at any depth of the folder, or by its path there.

    Raises DataError where the folder is not one, holds none of them, or several of one name; empty without a folder.
    """
    if not folder:
        return {}
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"audio = {folder}: there is no such folder")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    by_path = {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}
    stems = Counter(path.stem for path in paths)
    if twice := [id for id in ids if stems[id] > 1 and id not in by_path]:
        raise DataError(
            f"audio = {folder}: {stems[twice[0]]} audio files there are named {twice[0]!r}: keep one of them"
        )
    names = {path.stem: path for path in paths} | by_path
    found = {id: names[id] for id in ids if id in names}
    if not found:
        raise DataError(f"audio = {folder}: no audio file there is named as a recording, such as {ids[0]!r}")
    return found
