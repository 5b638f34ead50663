"""Opening of audio files with corrections, so that libsndfile reads all of their audio."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import soundfile

from data.audio.headers import Extent, read_extent

_ENDLESS = 1 << 40
# Lengths of at least this mean "unknown": libsndfile reports 2**63 - 1 for FLAC without a sample count (which has 36
# bits), and more than this for MP3 in a file of _ENDLESS bytes.
UNKNOWN_FRAMES = 1 << 37


def extent_of(source: str | os.PathLike[str] | BinaryIO) -> Extent:
    """Extent of a path or an open file, whose position is restored. Raises OSError."""
    if isinstance(source, (str, os.PathLike)):
        state = os.stat(source)
        return _extent_of_file(os.fspath(source), state.st_size, state.st_mtime_ns)
    position = source.tell()
    try:
        return read_extent(source)
    finally:
        source.seek(position)


@functools.lru_cache(maxsize=1 << 14)
def _extent_of_file(path: str, size: int, changed: int) -> Extent:
    """Cached extent for all segments of a file: FLAC is read to its end to determine it."""
    with open(path, "rb") as file:
        return read_extent(file)


@contextmanager
def open_audio(source: str | os.PathLike[str] | BinaryIO, extent: Extent) -> Iterator[soundfile.SoundFile]:
    """Open a path or a binary file for forward reading.

    Args:
        extent: `extent_of` the source.
    Raises:
        soundfile.SoundFileError, OSError: it cannot be opened.
    """
    with ExitStack() as stack:
        if not isinstance(source, (str, os.PathLike)):
            file, audio = source, stack.enter_context(_SoundFile(source))
        else:
            file = stack.enter_context(open(source, "rb"))
            audio = stack.enter_context(open_audio_path(source, file))
        # libsndfile would stop at a length estimated from the bit rate of the first frames, a third of the true length
        # for some files.
        uncounted = extent.uncounted and audio.format == "MP3"
        if uncounted or extent.unset:
            audio = stack.enter_context(_SoundFile(_CorrectedFile(file, uncounted, extent.unset)))
        yield audio


def open_audio_path(path: str | os.PathLike[str], file: BinaryIO) -> soundfile.SoundFile:
    """Open a path that is already open as `file`, which must stay open. Raises soundfile.SoundFileError.

    Given a path, libsndfile reads the resource fork `._X` that macOS creates next to X, and then fails for MP3. Given a
    descriptor, it lacks the suffix, which some formats need.
    """
    try:
        return _SoundFile(file.fileno(), closefd=False)
    except soundfile.SoundFileError:
        # As bytes, because soundfile requires text to be valid UTF-8.
        return _SoundFile(os.fsencode(path))


class _SoundFile(soundfile.SoundFile):
    """Forward reader: soundfile would seek after every block, which fails at the end of FLAC without a sample count."""

    def seekable(self) -> bool:
        return False


class _CorrectedFile(io.RawIOBase):
    """File with corrections that make a decoder read all of it.

    Args:
        endless: report a size of _ENDLESS bytes, with zeros at the end, which decoders search for tags.
        unset: position of four bytes that are read as 0xFF, an unknown length; 0: none.
    """

    def __init__(self, file: BinaryIO, endless: bool, unset: int) -> None:
        self.file, self.unset, self.position = file, unset, 0
        self.size = _ENDLESS if endless else file.seek(0, io.SEEK_END)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position > _ENDLESS // 2:
            content = bytearray(max(0, min(len(buffer), self.size - self.position)))
        else:
            self.file.seek(self.position)
            content = bytearray(self.file.read(len(buffer)))
        for position in range(self.unset, self.unset + 4 if self.unset else 0):
            if 0 <= position - self.position < len(content):
                content[position - self.position] = 0xFF
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)
