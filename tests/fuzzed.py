"""Damage to files of bytes, for the fuzz tests of readers."""

import tempfile
from pathlib import Path

from hypothesis import strategies as st

# One file a name, over and over: an example costs a write and a read.
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzzed-")


def damage(data: st.DataObject, valid: bytes, most: int = 4) -> bytes:
    """A few bytes flipped, deleted, inserted or repeated; or the end cut off."""
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(0, most), label="damages")):
        place = data.draw(st.integers(0, len(content)), label="place")
        kind = data.draw(st.sampled_from(["flip", "delete", "insert", "repeat", "cut", "swap"]), label="kind")
        if kind == "flip" and place < len(content):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "delete":
            del content[place : place + data.draw(st.integers(1, 30))]
        elif kind == "insert":
            extra = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from(_NASTY)))
            content[place:place] = extra
        elif kind == "repeat":
            content[place:place] = content[place : place + 40] * data.draw(st.integers(1, 3))
        elif kind == "cut":
            del content[place:]
        elif kind == "swap":
            other = data.draw(st.integers(0, len(content)))
            a, b = sorted((place, other))
            content[a:b] = content[a:b][::-1]
    return bytes(content)


def damaged(data: st.DataObject, valid: bytes, name: str) -> Path:
    """A file with `damage`d content."""
    path = Path(_FOLDER.name) / name
    path.write_bytes(damage(data, valid))
    return path


_NASTY = [
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\n", b"\r", b"\xe2\x80\xa8", b" ", b"|", b'"', b"{",
    b"[" * 3000,
    b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"1_0", b"../../../etc/passwd", b"~nobody_here/x",
    b"true", b"{}", b"[]", b"<", b"(2)", b"\x1b[2J",
]  # fmt: skip
