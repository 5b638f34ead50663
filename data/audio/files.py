"""Audio files of a folder that nobody has prepared: which there are, and what their transcripts are called."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from data.audio.folders import files_below
from data.audio.reading import audio_seconds
from data.names import escaped

AUDIO_SUFFIXES = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".sph", ".w64",
                  ".wav")  # fmt: skip


@dataclass(frozen=True)
class AudioFile:
    """A file to transcribe."""

    path: Path
    name: str
    """of its transcripts, relative to --out and without a suffix"""
    seconds: float
    """from the header, or estimated; 0 if the file cannot be read"""
    key: str
    """names what its transcripts are made from"""


def is_audio(path: Path) -> bool:
    """Whether a file's name has the ending of an audio file."""
    return path.suffix.lower() in AUDIO_SUFFIXES


def list_audio(audio: str, key: str) -> list[AudioFile]:
    """The file, or all audio files below the folder (`files_below`), sorted. Raises UserError where there is none.

    Files that differ only in their suffix keep it in the names of their transcripts. Unreadable files, such as named
    pipes and broken links, are listed too, so that each fails on its own later. Folders that cannot be searched are
    reported on stderr.
    """
    root = Path(audio).expanduser()
    if root.is_file():
        paths, root = [root], root.parent
    elif root.is_dir():
        found = files_below(root)
        unreadable = [path for path in found.unread if is_audio(path) and not path.is_dir()]
        paths = sorted([*filter(is_audio, found.files), *unreadable])
        for path in sorted(set(found.unread) - set(unreadable)):
            print(f"not searched for audio: {escaped(str(path))}: {found.unread[path]}", file=sys.stderr)
    else:
        raise UserError(f"audio = {audio}: there is no such file or folder")
    if not paths:
        raise UserError(f"audio = {audio}: no audio file in this folder; looked for {', '.join(AUDIO_SUFFIXES)}")
    names = transcript_names([path.relative_to(root) for path in paths])
    return [audio_file(path, name, key) for path, name in zip(paths, names, strict=True)]


def transcript_names(paths: Sequence[Path]) -> list[str]:
    """Unique names of the files' transcripts: the path, without its suffix unless two names would then be equal.

    `a.wav` and `a.mp3` keep their suffixes, and so does `a.wav.flac`, whose name would otherwise be `a.wav`.
    """
    names = [path.with_suffix("").as_posix() for path in paths]
    while shared := {name for name, count in Counter(names).items() if count > 1}:
        names = [path.as_posix() if name in shared else name for path, name in zip(paths, names, strict=True)]
    return names


def audio_file(path: Path, name: str, key: str) -> AudioFile:
    """What is known of a file before it is read. One that cannot be read is told when its turn comes."""
    size = changed = 0
    seconds = 0.0
    with suppress(OSError):
        state = path.stat()
        size, changed = state.st_size, state.st_mtime_ns
        seconds = audio_seconds(path)
    content = json.dumps([key, name, size, changed])
    return AudioFile(path, name, seconds, hashlib.sha256(content.encode()).hexdigest())


def find_audio(folder: str, ids: Sequence[str]) -> dict[str, Path]:
    """The audio file of each recording that has one: named as its id, at any depth of the folder, or by its path there.

    Raises UserError where the folder is not one, holds none of them, or several of one name; empty without a folder.
    """
    if not folder:
        return {}
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"audio = {folder}: there is no such folder")
    paths = [path for path in files_below(root).files if is_audio(path)]
    by_path = {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}
    stems = Counter(path.stem for path in paths)
    if twice := [id for id in ids if stems[id] > 1 and id not in by_path]:
        raise UserError(
            f"audio = {folder}: {stems[twice[0]]} audio files there are named {twice[0]!r}: keep one of them"
        )
    names = {path.stem: path for path in paths} | by_path
    found = {id: names[id] for id in ids if id in names}
    if not found:
        raise UserError(f"audio = {folder}: no audio file there is named as a recording, such as {ids[0]!r}")
    return found
