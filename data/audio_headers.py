"""Sound files as containers: whether all announced sound is there, and whether a second stream follows the first.

libsndfile takes a WAV, AIFF, AU, W64, CAF or SPHERE file that was cut short for a shorter one, leaves out the page that
an Ogg file was cut in, and reads the first alone of several streams in one file (chained Ogg, `cat a.flac b.flac`).
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class Extent:
    """What a file's structure tells of its sound. Formats that are not known here tell nothing."""

    held: int = 0
    """Bytes of the announced sound (of Ogg: bytes of whole pages) that the file holds, where some are missing."""
    missing: int = 0
    """Bytes of the announced sound that the file lacks."""
    several: bool = False
    """A second file or stream follows the first."""
    unended: bool = False
    """Ogg without a page that ends the stream: a recording of a live stream, or a file cut between two pages."""


def extent(file: BinaryIO) -> Extent:
    """The extent of an open, seekable file of any format. Raises OSError."""
    size = file.seek(0, 2)
    start = _after_tags(file, 0)
    magic = _at(file, start, 4)
    try:
        if magic in _CHUNKS:
            return _of_chunks(file, size, start, magic)
        if magic in (b".snd", b"dns."):
            begin, length = struct.unpack(">II" if magic == b".snd" else "<II", _at(file, start + 4, 8))
            return _of_stretch(file, size, start, begin, length)
        if magic == b"NIST":
            return _of_sphere(file, size, start)
    except struct.error:  # cut within its header, which libsndfile refuses
        return Extent()
    if magic == b"fLaC":
        return Extent(several=_found(file, _FLAC, start + 4))
    if magic == b"OggS":
        return _of_ogg(file, size, start)
    return _of_mpeg(file, size, start)


# The first bytes of containers of chunks: where their chunks begin, a chunk's head (id, length), and their alignment.
_CHUNKS = {
    b"RIFF": (12, "<4sI", 2),
    b"RIFX": (12, ">4sI", 2),
    b"RF64": (12, "<4sI", 2),
    b"BW64": (12, "<4sI", 2),
    b"FORM": (12, ">4sI", 2),  # AIFF, AIFC, 8SVX
    b"riff": (40, "<16sQ", 8),  # W64: ids are GUIDs that begin with the names of RIFF, and lengths count the head
    b"caff": (8, ">4sQ", 1),
}
_SOUND = {b"data", b"SSND", b"BODY"}
_SPHERE_FIELD = re.compile(rb"^(sample_count|sample_n_bytes|channel_count) -i (\d{1,12})\s*$", re.MULTILINE)
# A STREAMINFO block after the magic; a page that begins a stream.
_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_OGG_BEGIN = re.compile(rb"OggS\x00[\x02\x03\x06\x07]")
_OGG_PAGE = 27 + 255 * 256
"""The most bytes that a page has."""
_MPEG_FRAME = 2881
"""The most bytes that a frame has."""
_MOST_CHUNKS = 10_000
_READ_BYTES = 1 << 20


def _of_chunks(file: BinaryIO, size: int, start: int, magic: bytes) -> Extent:
    first, head, alignment = _CHUNKS[magic]
    position, head_bytes, long = start + first, struct.calcsize(head), 0
    for _ in range(_MOST_CHUNKS):
        if position + head_bytes > size:
            break
        id, length = struct.unpack(head, _at(file, position, head_bytes))
        if id[:4] in _CHUNKS:
            return Extent(several=True)
        position += head_bytes
        length -= head_bytes if magic == b"riff" else 0
        if id == b"ds64":  # RF64: the length of what is too long for 32 bits
            (long,) = struct.unpack("<8xQ", _at(file, position, 16))
        if id[:4] in _SOUND:
            length = long if long and length == 0xFFFFFFFF else length
            if _is_placeholder(length):
                return Extent()
            if position + length > size:
                return Extent(size - position, position + length - size)
        position += max(0, length) + -length % alignment
    return Extent()


def _of_stretch(file: BinaryIO, size: int, start: int, begin: int, length: int) -> Extent:
    """Of sound that fills `length` bytes, from `begin` bytes behind `start`."""
    if _is_placeholder(length):
        return Extent()
    end = start + begin + length
    if end > size:
        return Extent(max(0, size - start - begin), min(length, end - size))
    return Extent(several=_at(file, end, 4) == _at(file, start, 4))


def _is_placeholder(length: int) -> bool:
    """Whether a length stands for one that was not known: 0, or about the most that 31, 32 or 63 bits hold.

    What writes into a pipe says 0xFFFFFFFF, 0x7FFFFFFF, or a little less to keep to whole samples (sox: 0x7FFFF000,
    0x7F000000); a file that was being written at a crash often says 0.
    """
    return length <= 0 or 0x7F000000 <= length <= 0x80010000 or 0xFF000000 <= length < 1 << 32 or length >= 1 << 62


def _of_sphere(file: BinaryIO, size: int, start: int) -> Extent:
    """NIST SPHERE: lines of text, which tell their own length in the second one."""
    begin = _at(file, start + 8, 8).strip()
    header = _at(file, start, int(begin)) if begin.isdigit() and int(begin) < 1 << 16 else b""
    fields = {name: int(value) for name, value in _SPHERE_FIELD.findall(header)}
    sample = fields.get(b"sample_n_bytes", 0) * fields.get(b"channel_count", 1)
    if not sample or b"shorten" in header:  # compressed: its size tells nothing
        return Extent()
    return _of_stretch(file, size, start, len(header), fields.get(b"sample_count", 0) * sample)


def _of_ogg(file: BinaryIO, size: int, start: int) -> Extent:
    begun = start
    while _OGG_BEGIN.match(_at(file, begun, 6)):  # streams beside each other all begin here
        begun += _page_bytes(file, begun)
    several = _found(file, _OGG_BEGIN, begun)
    tail = max(start, size - _OGG_PAGE)
    place = _at(file, tail, _OGG_PAGE).rfind(b"OggS\0")
    if place < 0:
        return Extent(several=several, unended=True)
    last = tail + place
    end = last + _page_bytes(file, last)
    flags = _at(file, last + 5, 1) or b"\0"
    # libsndfile reads whole pages.
    return Extent(last, end - last if end > size else 0, several, unended=not flags[0] & 4)


def _page_bytes(file: BinaryIO, position: int) -> int:
    """Bytes of the Ogg page there; of one without a whole head, more than there are."""
    head = _at(file, position, 27)
    segments = _at(file, position + 27, head[26]) if len(head) == 27 else b""
    whole = len(head) == 27 and len(segments) == head[26]
    return 27 + len(segments) + sum(segments) if whole else _OGG_PAGE


def _of_mpeg(file: BinaryIO, size: int, start: int) -> Extent:
    """MP3: its decoder stops after the frames that a first frame without sound (Xing, Info) announces, if there is one.

    Their bytes stand there too. Where they end, a frame may begin that is counted wrongly, but not many.
    """
    first = _at(file, start, 64)
    tag = re.search(rb"Xing|Info", first)
    if not _is_frame(first, first) or not tag:
        return Extent()
    flags = int.from_bytes(first[tag.end() : tag.end() + 4], "big")
    place = tag.end() + (8 if flags & 1 else 4)
    length = int.from_bytes(first[place : place + 4], "big") if flags & 2 else 0
    if not 0 < length < size - start:
        return Extent()
    end = _after_tags(file, start + length)
    following = _at(file, end, 64)
    many = size - end > 2 * _MPEG_FRAME or re.search(rb"Xing|Info", following)
    return Extent(several=bool(_is_frame(following, first) and many))


def _is_frame(head: bytes, like: bytes) -> bool:
    """Whether a frame of layer III and of the same MPEG version begins here."""
    return len(head) > 4 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and (head[1] ^ like[1]) & 0x18 == 0


def _after_tags(file: BinaryIO, position: int) -> int:
    """The place behind tags of ID3v2, ID3v1 and APEv2."""
    while head := _at(file, position, 32):
        if head[:3] == b"ID3" and len(head) >= 10:
            length = functools.reduce(lambda sum, byte: sum << 7 | byte & 0x7F, head[6:10], 0)
            position += 10 + length + (10 if head[5] & 0x10 else 0)
        elif head[:3] == b"TAG":
            position += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            position += 32 + int.from_bytes(head[12:16], "little")
        else:
            break
    return position


def _found(file: BinaryIO, pattern: re.Pattern[bytes], position: int) -> bool:
    return any(pattern.search(block) for block in _overlapping(file, position))


def _overlapping(file: BinaryIO, position: int) -> Iterator[bytes]:
    """The rest of a file in blocks, each with the last bytes of the one before it."""
    file.seek(position)
    held = b""
    while block := file.read(_READ_BYTES):
        yield held + block
        held = block[-16:]


def _at(file: BinaryIO, position: int, length: int) -> bytes:
    """At most so many bytes from there; fewer where the file ends."""
    file.seek(position)
    return file.read(length)
