"""Lists of audio files to transcribe or to link from a report, with the names of their transcripts."""

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
    """Audio file to transcribe."""

    path: Path
    name: str
    """Name of its transcripts, relative to --out and without a suffix."""
    seconds: float
    """Length from the header, or estimated; 0 if the file is unreadable."""
    key: str
    """Hash of the file's state and of the settings of its transcripts."""


def is_audio(path: Path) -> bool:
    """True if the file name has the suffix of an audio file."""
    return path.suffix.lower() in AUDIO_SUFFIXES


def list_audio(audio: str, key: str) -> list[AudioFile]:
    """List the file, or all audio files below the folder (`files_below`), sorted. Raises UserError if there is none.

    Unreadable files, such as named pipes and broken links, are listed too, so that each one fails separately later.
    Unreadable folders are reported on stderr.

    Args:
        audio: path of a file or folder.
        key: identifies the settings of the transcripts, and becomes part of the key of every file.
    """
    root = Path(audio).expanduser()
    if root.is_file():
        paths, root = [root], root.parent
    elif root.is_dir():
        search = files_below(root)
        unreadable = [path for path in search.unread if is_audio(path) and not path.is_dir()]
        paths = sorted([*filter(is_audio, search.files), *unreadable])
        for path in sorted(set(search.unread) - set(unreadable)):
            print(f"not searched for audio: {escaped(str(path))}: {search.unread[path]}", file=sys.stderr)
    else:
        raise UserError(f"audio = {audio}: no such file or folder")
    if not paths:
        raise UserError(f"audio = {audio}: no audio file in this folder; looked for {', '.join(AUDIO_SUFFIXES)}")
    names = transcript_names([path.relative_to(root) for path in paths])
    return [audio_file(path, name, key) for path, name in zip(paths, names, strict=True)]


def transcript_names(paths: Sequence[Path]) -> list[str]:
    """Unique names of transcripts: the path without its suffix, which is kept if two names would be equal.

    `a.wav` and `a.mp3` keep their suffixes, and so does `a.wav.flac`, whose name would otherwise be `a.wav`.
    """
    names = [path.with_suffix("").as_posix() for path in paths]
    while shared := {name for name, count in Counter(names).items() if count > 1}:
        names = [path.as_posix() if name in shared else name for path, name in zip(paths, names, strict=True)]
    return names


def audio_file(path: Path, name: str, key: str) -> AudioFile:
    """Describe a file before it is decoded. Unreadable files raise no error here."""
    size = changed = 0
    seconds = 0.0
    with suppress(OSError):
        state = path.stat()
        size, changed = state.st_size, state.st_mtime_ns
        seconds = audio_seconds(path)
    content = json.dumps([key, name, size, changed])
    return AudioFile(path, name, seconds, hashlib.sha256(content.encode()).hexdigest())


def find_audio(folder: str, ids: Sequence[str]) -> dict[str, Path]:
    """Find audio files by recording id: the file name without suffix, or the path relative to the folder.

    Recordings without a file are left out; the result is empty if `folder` is "". Raises UserError if the folder does
    not exist, holds no file of a recording, or several files with the same name.
    """
    if not folder:
        return {}
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"audio = {folder}: no such folder")
    paths = [path for path in files_below(root).files if is_audio(path)]
    by_path = {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}
    stems = Counter(path.stem for path in paths)
    if ambiguous := [id for id in ids if stems[id] > 1 and id not in by_path]:
        raise UserError(
            f"audio = {folder}: {stems[ambiguous[0]]} audio files are named {ambiguous[0]!r}: keep one of them"
        )
    names = {path.stem: path for path in paths} | by_path
    matches = {id: names[id] for id in ids if id in names}
    if not matches:
        raise UserError(f"audio = {folder}: no audio file is named after a recording, such as {ids[0]!r}")
    return matches
