"""Sound files opened so that libsndfile reads all that is there."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import soundfile

from data.audio.headers import Extent, extent

_ENDLESS = 1 << 40
# A length that so many frames fall short of is none: libsndfile says 2**63 - 1 of FLAC without its sample count (which
# has 36 bits), and more than this of MP3 in a file of _ENDLESS bytes.
MOST_FRAMES = 1 << 37


def extent_of(source: str | os.PathLike[str] | BinaryIO) -> Extent:
    """The extent of a path, or of an open file, whose place stays. Raises OSError."""
    if isinstance(source, (str, os.PathLike)):
        state = os.stat(source)
        return _extent_of_file(os.fspath(source), state.st_size, state.st_mtime_ns)
    place = source.tell()
    try:
        return extent(source)
    finally:
        source.seek(place)


@functools.lru_cache(maxsize=1 << 14)
def _extent_of_file(path: str, size: int, changed: int) -> Extent:
    """Once for all segments of a file, in whatever order they come: FLAC is read to its end for it."""
    with open(path, "rb") as file:
        return extent(file)


@contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO, there: Extent) -> Iterator[soundfile.SoundFile]:
    """The sound of a path or an open file, to be read forward.

    Args:
        there: `extent_of` the source.
    Raises:
        soundfile.SoundFileError, OSError: it cannot be opened.
    """
    with ExitStack() as stack:
        if not isinstance(source, (str, os.PathLike)):
            file, audio = source, stack.enter_context(_SoundFile(source))
        else:
            file = stack.enter_context(open(source, "rb"))
            audio = stack.enter_context(opened_path(source, file))
        # libsndfile would stop at a length estimated from the bit rate of the first frames, a third of some files.
        uncounted = there.uncounted and audio.format == "MP3"
        if uncounted or there.unset:
            audio = stack.enter_context(_SoundFile(_Corrected(file, uncounted, there.unset)))
        yield audio


def opened_path(path: str | os.PathLike[str], file: BinaryIO) -> soundfile.SoundFile:
    """The sound of a path that is open as `file`, which must stay open. Raises soundfile.SoundFileError.

    By its path libsndfile takes a file for the sound of the resource fork `._X` beside it, which macOS leaves beside
    every X: no MP3 can be read then. By its descriptor it cannot see the name's ending, which tells of some formats.
    """
    try:
        return _SoundFile(file.fileno(), closefd=False)
    except soundfile.SoundFileError:
        # soundfile encodes text strictly, and a name need not be UTF-8.
        return _SoundFile(os.fsencode(path))


class _SoundFile(soundfile.SoundFile):
    """Read forward: soundfile seeks after every block, which fails at the end of FLAC without its sample count."""

    def seekable(self) -> bool:
        return False


class _Corrected(io.RawIOBase):
    """A file as a decoder has to see it in order to read all of it.

    Args:
        endless: claim to have _ENDLESS bytes, zeros at the last (where decoders look for tags).
        unset: place of four bytes that are read as 0xFF, a length that is not known; 0: none.
    """

    def __init__(self, file: BinaryIO, endless: bool, unset: int) -> None:
        self.file, self.unset, self.place = file, unset, 0
        self.size = _ENDLESS if endless else file.seek(0, io.SEEK_END)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        if self.place > _ENDLESS // 2:
            content = bytearray(max(0, min(len(buffer), self.size - self.place)))
        else:
            self.file.seek(self.place)
            content = bytearray(self.file.read(len(buffer)))
        for place in range(self.unset, self.unset + 4 if self.unset else 0):
            if 0 <= place - self.place < len(content):
                content[place - self.place] = 0xFF
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)
