"""Sound files as containers: whether all announced sound is there, and whether a second stream follows the first.

libsndfile takes a WAV, AIFF, AU, W64, CAF or SPHERE file that was cut short for a shorter one, leaves out the page that
an Ogg file was cut in and what lies behind the announced sound, reads the first alone of several streams in one file
(chained Ogg, `cat a.flac b.flac`), and takes the length of MP3 that announces none from its first frames' bit rate.
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
    """What a file's structure tells of its sound. Formats that are not known here tell nothing."""

    held: int = 0
    """Bytes of the announced sound (of Ogg: of whole pages) that the file holds, where some are missing or beyond."""
    missing: int = 0
    """Bytes of the announced sound that the file lacks."""
    several: bool = False
    """A second file or stream follows the first."""
    unended: bool = False
    """Ogg without a page that ends the stream: a recording of a live stream, or a file cut between two pages."""
    beyond: int = 0
    """Bytes behind the announced sound that are no chunk, tag or zeros: sound, where a header was never brought up to
    date or counts modulo 2**32. Not of W64 and SPHERE, which libsndfile reads to the end."""
    unset: int = 0
    """Where a WAV file has the length of its sound, if that is 0 and sound follows."""
    uncounted: bool = False
    """MP3 that does not tell how many frames it has."""


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
        return Extent(several=_second_flac(file, start))
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
_CHUNK_ID = re.compile(rb"[ -~]{4}")
# Numbers are of type -i, but libsndfile itself writes the bytes of a sample of u-law as text, -s1.
_SPHERE_FIELD = re.compile(rb"^(sample_count|sample_n_bytes|channel_count) +-\w+ +(\d{1,12})\s*$", re.MULTILINE)
# A STREAMINFO block after the magic; any page.
_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_OGG_PAGE_BEGIN = re.compile(rb"OggS\x00")
_OGG_HEAD, _OGG_PAGE = 27 + 255, 27 + 255 * 256
"""The most bytes that the head of a page has, and a page."""
_MPEG_FRAME = 2881
"""The most bytes that a frame has."""
_MOST_CHUNKS = 10_000
_READ_BYTES = 1 << 20
_PROBE_BYTES = 1 << 12


def _of_chunks(file: BinaryIO, size: int, start: int, magic: bytes) -> Extent:
    first, head, alignment = _CHUNKS[magic]
    position, head_bytes, long = start + first, struct.calcsize(head), 0
    sound: int | None = None  # bytes of it, once it has been passed
    for _ in range(_MOST_CHUNKS):
        if position + head_bytes > size:
            break
        id, length = struct.unpack(head, _at(file, position, head_bytes))
        if id[:4] in _CHUNKS:
            return Extent(several=True)
        if sound is not None and not _CHUNK_ID.match(id):
            found = _with_beyond(file, size, position, sound)
            if magic == b"riff":
                return replace(found, beyond=0)
            unset = magic in (b"RIFF", b"RIFX") and not sound and found.beyond
            return Extent(unset=position - 4) if unset else found
        position += head_bytes
        length -= head_bytes if magic == b"riff" else 0
        if id == b"ds64":  # RF64: the length of what is too long for 32 bits
            (long,) = struct.unpack("<8xQ", _at(file, position, 16))
        if id[:4] in _SOUND:
            length = long or length  # whatever the chunk says: so libsndfile takes it
            # Of length 0 libsndfile reads none in RIFF, and all in the others.
            if _is_placeholder(length) and (length or magic in (b"FORM", b"riff", b"caff")):
                return Extent()
            if position + length > size:
                return Extent(size - position, position + length - size)
            sound = length
        position += max(0, length)
        padding = -length % alignment
        # Some writers leave out the byte that makes an odd length even.
        unpadded = (
            padding == 1 and _CHUNK_ID.match(_at(file, position, 4)) and not _CHUNK_ID.match(_at(file, position + 1, 4))
        )
        position += 0 if unpadded else padding
    return Extent()


def _with_beyond(file: BinaryIO, size: int, position: int, sound: int) -> Extent:
    """Of a file that goes on behind its sound with what is no chunk: tags, zeros that were reserved, or more sound."""
    if any(magic in _at(file, position, 16) for magic in _CHUNKS):  # behind bytes that fill up the first
        return Extent(several=True)
    position = min(size, _after_tags(file, position))
    places = (position, (position + size) // 2, max(position, size - _PROBE_BYTES))
    filled = any(_at(file, place, _PROBE_BYTES).strip(b"\0") for place in places)
    return Extent(held=sound, beyond=size - position if filled else 0)


def _of_stretch(file: BinaryIO, size: int, start: int, begin: int, length: int) -> Extent:
    """Of sound that fills `length` bytes, from `begin` bytes behind `start`."""
    if _is_placeholder(length):
        return Extent()
    end = start + begin + length
    if end > size:
        return Extent(max(0, size - start - begin), min(length, end - size))
    if _at(file, end, 4) == _at(file, start, 4):
        return Extent(several=True)
    return _with_beyond(file, size, end, length)


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
    there = _of_stretch(file, size, start, len(header), fields.get(b"sample_count", 0) * sample)
    return replace(there, beyond=0)


def _second_flac(file: BinaryIO, start: int) -> bool:
    """Whether a FLAC stream begins behind the metadata of the one at `start`: pictures and comments may hold any bytes.

    Sound may, too: what looks like a beginning must lead over its metadata to a frame.
    """
    frames = _after_metadata(file, start + 4)
    return any(
        re.match(rb"\xff[\xf8\xf9]", _at(file, _after_metadata(file, place + 4), 2))
        for place in _places(file, _FLAC, frames)
    )


def _after_metadata(file: BinaryIO, position: int) -> int:
    """The place behind blocks of FLAC's metadata, the first of which is at `position`."""
    while len(head := _at(file, position, 4)) == 4:
        position += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    return position


def _of_ogg(file: BinaryIO, size: int, start: int) -> Extent:
    """Page by page, as the bytes of a page may be any."""
    position, held, beginning = start, 0, True
    open_streams: set[bytes] = set()
    while position < size:
        head = _at(file, position, _OGG_HEAD)
        lengths = head[27 : 27 + head[26]] if len(head) > 26 else b""
        if head[:5] != b"OggS\0"[: len(head)]:  # junk, of which libsndfile takes no notice
            position = next(_places(file, _OGG_PAGE_BEGIN, position + 1), size)
            continue
        whole = len(head) > 26 and len(lengths) == head[26]
        end = position + (27 + len(lengths) + sum(lengths) if whole else _OGG_PAGE)
        if end > size:  # libsndfile reads whole pages
            return Extent(held, end - position, unended=True)
        begins, ends, stream = head[5] & 2, head[5] & 4, head[14:18]
        if begins and not beginning:  # streams beside each other all begin first
            return Extent(several=True)
        beginning = bool(begins)
        open_streams = open_streams - {stream} if ends else open_streams | {stream}
        position = held = end
    return Extent(unended=bool(open_streams))


def _of_mpeg(file: BinaryIO, size: int, start: int) -> Extent:
    """MP3: its decoder stops after the frames that a first frame without sound (Xing, Info) announces, if there is one.

    Their bytes stand there too. Where they end, a frame may begin that is counted wrongly, but not many.
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


def _places(file: BinaryIO, pattern: re.Pattern[bytes], position: int) -> Iterator[int]:
    """Where the pattern, of up to 16 bytes, is found from `position` on; some places twice."""
    held = b""
    while block := _at(file, position, _READ_BYTES):
        for match in pattern.finditer(held + block):
            yield position - len(held) + match.start()
        position += len(block)
        held = block[-16:]


def _at(file: BinaryIO, position: int, length: int) -> bytes:
    """At most so many bytes from there; fewer where the file ends."""
    file.seek(position)
    return file.read(length)
