"""Structure of audio files: missing bytes of the declared audio, and data or a second stream after it.

libsndfile reads a truncated WAV, AIFF, AU, W64, CAF or SPHERE file as a shorter one, ignores the truncated page of an
Ogg file and data after the declared audio, reads only the first of several streams in a file (chained Ogg,
`cat a.flac b.flac`), and estimates the length of MP3 without a frame count from the bit rate of the first frames.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO


@dataclass(frozen=True)
class Extent:
    """Extent of the audio in a file, from the structure of the file. Unknown formats have the default values."""

    held: int = 0
    """Existing bytes of the declared audio (of complete pages for Ogg), if some are missing or data follow it."""
    missing: int = 0
    """Missing bytes of the declared audio."""
    several: bool = False
    """A second file or stream follows the first."""
    unterminated: bool = False
    """Ogg without an end-of-stream page: a recording of a live stream, or a file truncated between two pages."""
    trailing: int = 0
    """Bytes after the declared audio that are not a chunk, tag or zeros: audio, if the header was never updated or
    counts modulo 2**32. Not for W64 and SPHERE, which libsndfile reads to the end."""
    unset: int = 0
    """Position of the length field of a WAV file, if the length is 0 and audio follows."""
    uncounted: bool = False
    """MP3 without a frame count."""


def read_extent(file: BinaryIO) -> Extent:
    """Extent of an open, seekable file of any format. Raises OSError."""
    size = file.seek(0, 2)
    start = _after_tags(file, 0)
    magic = _at(file, start, 4)
    try:
        if magic in _CHUNKS:
            return _chunk_extent(file, size, start, magic)
        if magic in (b".snd", b"dns."):
            offset, length = struct.unpack(">II" if magic == b".snd" else "<II", _at(file, start + 4, 8))
            return _range_extent(file, size, start, offset, length)
        if magic == b"NIST":
            return _sphere_extent(file, size, start)
    except struct.error:  # truncated within its header, which libsndfile rejects
        return Extent()
    if magic == b"fLaC":
        return Extent(several=_second_flac(file, start))
    if magic == b"OggS":
        return _ogg_extent(file, size, start)
    return _mpeg_extent(file, size, start)


# First bytes of chunk containers: offset of the first chunk, header of a chunk (id, length), and alignment.
_CHUNKS = {
    b"RIFF": (12, "<4sI", 2),
    b"RIFX": (12, ">4sI", 2),
    b"RF64": (12, "<4sI", 2),
    b"BW64": (12, "<4sI", 2),
    b"FORM": (12, ">4sI", 2),  # AIFF, AIFC, 8SVX
    b"riff": (40, "<16sQ", 8),  # W64: ids are GUIDs that start with the names of RIFF, and lengths include the header
    b"caff": (8, ">4sQ", 1),
}
_AUDIO_CHUNKS = {b"data", b"SSND", b"BODY"}
_CHUNK_ID = re.compile(rb"[ -~]{4}")
# Numbers have type -i, but libsndfile writes the bytes per sample of u-law as text, -s1.
_SPHERE_FIELD = re.compile(rb"^(sample_count|sample_n_bytes|channel_count) +-\w+ +(\d{1,12})\s*$", re.MULTILINE)
# A STREAMINFO block after the magic; any page.
_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_OGG_PAGE_START = re.compile(rb"OggS\x00")
_OGG_HEAD, _OGG_PAGE = 27 + 255, 27 + 255 * 256
"""Maximum bytes of the header of a page, and of a page."""
_MPEG_FRAME = 2881
"""Maximum bytes of a frame."""
_MAX_CHUNKS = 10_000
_READ_BYTES = 1 << 20
_PROBE_BYTES = 1 << 12


def _chunk_extent(file: BinaryIO, size: int, start: int, magic: bytes) -> Extent:
    """Extent of a chunk container (RIFF, AIFF, W64, CAF)."""
    first, head, alignment = _CHUNKS[magic]
    position, head_bytes, long_length = start + first, struct.calcsize(head), 0
    audio: int | None = None  # bytes of the audio chunk, once it has been read
    for _ in range(_MAX_CHUNKS):
        if position + head_bytes > size:
            break
        id, length = struct.unpack(head, _at(file, position, head_bytes))
        if id[:4] in _CHUNKS:
            return Extent(several=True)
        if audio is not None and not _CHUNK_ID.match(id):
            result = _trailing_extent(file, size, position, audio)
            if magic == b"riff":
                return replace(result, trailing=0)
            unset = magic in (b"RIFF", b"RIFX") and not audio and result.trailing
            return Extent(unset=position - 4) if unset else result
        position += head_bytes
        length -= head_bytes if magic == b"riff" else 0
        if id == b"ds64":  # RF64: a length of more than 32 bits
            (long_length,) = struct.unpack("<8xQ", _at(file, position, 16))
        if id[:4] in _AUDIO_CHUNKS:
            length = long_length or length  # as in libsndfile
            # For length 0 libsndfile reads nothing in RIFF, and everything in the others.
            if _is_placeholder(length) and (length or magic in (b"FORM", b"riff", b"caff")):
                return Extent()
            if position + length > size:
                return Extent(size - position, position + length - size)
            audio = length
        position += max(0, length)
        padding = -length % alignment
        # Some writers omit the padding byte of an odd length.
        unpadded = (
            padding == 1 and _CHUNK_ID.match(_at(file, position, 4)) and not _CHUNK_ID.match(_at(file, position + 1, 4))
        )
        position += 0 if unpadded else padding
    return Extent()


def _trailing_extent(file: BinaryIO, size: int, position: int, audio: int) -> Extent:
    """Extent of a file with something other than a chunk after its audio: tags, reserved zeros, or more audio."""
    if any(magic in _at(file, position, 16) for magic in _CHUNKS):  # after padding of the first container
        return Extent(several=True)
    position = min(size, _after_tags(file, position))
    places = (position, (position + size) // 2, max(position, size - _PROBE_BYTES))
    filled = any(_at(file, place, _PROBE_BYTES).strip(b"\0") for place in places)
    return Extent(held=audio, trailing=size - position if filled else 0)


def _range_extent(file: BinaryIO, size: int, start: int, offset: int, length: int) -> Extent:
    """Extent of audio of `length` bytes at `offset` bytes after `start`."""
    if _is_placeholder(length):
        return Extent()
    end = start + offset + length
    if end > size:
        return Extent(max(0, size - start - offset), min(length, end - size))
    if _at(file, end, 4) == _at(file, start, 4):
        return Extent(several=True)
    return _trailing_extent(file, size, end, length)


def _is_placeholder(length: int) -> bool:
    """True for placeholders of an unknown length: 0, or about the maximum of 31, 32 or 63 bits.

    Writers to a pipe use 0xFFFFFFFF, 0x7FFFFFFF, or slightly less for whole samples (sox: 0x7FFFF000, 0x7F000000); a
    crash during writing often leaves 0.
    """
    return length <= 0 or 0x7F000000 <= length <= 0x80010000 or 0xFF000000 <= length < 1 << 32 or length >= 1 << 62


def _sphere_extent(file: BinaryIO, size: int, start: int) -> Extent:
    """Extent of NIST SPHERE, whose header is text with its length in the second line."""
    length = _at(file, start + 8, 8).strip()
    header = _at(file, start, int(length)) if length.isdigit() and int(length) < 1 << 16 else b""
    fields = {name: int(value) for name, value in _SPHERE_FIELD.findall(header)}
    sample = fields.get(b"sample_n_bytes", 0) * fields.get(b"channel_count", 1)
    if not sample or b"shorten" in header:  # compressed: the size is unknown
        return Extent()
    result = _range_extent(file, size, start, len(header), fields.get(b"sample_count", 0) * sample)
    return replace(result, trailing=0)


def _second_flac(file: BinaryIO, start: int) -> bool:
    """True if another FLAC stream starts after the metadata of the one at `start`.

    Pictures, comments and audio may hold any bytes, so the start of a stream must lead through its metadata to a frame.
    """
    frames = _after_metadata(file, start + 4)
    return any(
        re.match(rb"\xff[\xf8\xf9]", _at(file, _after_metadata(file, place + 4), 2))
        for place in _places(file, _FLAC, frames)
    )


def _after_metadata(file: BinaryIO, position: int) -> int:
    """Position after the FLAC metadata blocks at `position`."""
    while len(head := _at(file, position, 4)) == 4:
        position += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    return position


def _ogg_extent(file: BinaryIO, size: int, start: int) -> Extent:
    """Extent of Ogg, page by page, because the content of a page may be any bytes."""
    position, held, at_start = start, 0, True
    open_streams: set[bytes] = set()
    while position < size:
        head = _at(file, position, _OGG_HEAD)
        lengths = head[27 : 27 + head[26]] if len(head) > 26 else b""
        if head[:5] != b"OggS\0"[: len(head)]:  # garbage, which libsndfile ignores
            position = next(_places(file, _OGG_PAGE_START, position + 1), size)
            continue
        complete_header = len(head) > 26 and len(lengths) == head[26]
        end = position + (27 + len(lengths) + sum(lengths) if complete_header else _OGG_PAGE)
        if end > size:  # libsndfile reads complete pages
            return Extent(held, end - position, unterminated=True)
        starts, ends, stream = head[5] & 2, head[5] & 4, head[14:18]
        if starts and not at_start:  # multiplexed streams all start first
            return Extent(several=True)
        at_start = bool(starts)
        open_streams = open_streams - {stream} if ends else open_streams | {stream}
        position = held = end
    return Extent(unterminated=bool(open_streams))


def _mpeg_extent(file: BinaryIO, size: int, start: int) -> Extent:
    """Extent of MP3, whose decoder stops after the frame count of the Xing or Info frame, if there is one.

    That frame has the number of bytes too. A single frame may follow because of a wrong count, but not several.
    """
    first = _at(file, start, 64)
    tag = re.search(rb"Xing|Info", first)
    if not _is_frame(first, first):
        return Extent()
    flags = int.from_bytes(first[tag.end() : tag.end() + 4], "big") if tag else 0
    if not tag or not flags & 1:
        return Extent(uncounted=True)
    place = tag.end() + 8
    length = int.from_bytes(first[place : place + 4], "big") if flags & 2 else 0
    if not 0 < length < size - start:
        return Extent()
    end = _after_tags(file, start + length)
    following = _at(file, end, 64)
    several_frames = size - end > 2 * _MPEG_FRAME or re.search(rb"Xing|Info", following)
    return Extent(several=bool(_is_frame(following, first) and several_frames))


def _is_frame(head: bytes, like: bytes) -> bool:
    """True if a layer III frame of the same MPEG version starts here."""
    return len(head) > 4 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and (head[1] ^ like[1]) & 0x18 == 0


def _after_tags(file: BinaryIO, position: int) -> int:
    """Position after tags of ID3v2, ID3v1 and APEv2."""
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


def _places(file: BinaryIO, pattern: re.Pattern[bytes], position: int) -> Iterator[int]:
    """Yield the positions of a pattern of at most 16 bytes from `position` on; some twice."""
    tail = b""
    while block := _at(file, position, _READ_BYTES):
        for match in pattern.finditer(tail + block):
            yield position - len(tail) + match.start()
        position += len(block)
        tail = block[-16:]


def _at(file: BinaryIO, position: int, length: int) -> bytes:
    """Read at most `length` bytes at `position`."""
    file.seek(position)
    return file.read(length)
