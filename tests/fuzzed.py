"""Damage to bytes and JSON for fuzz tests of readers."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# Holds one file per name, which every example overwrites.
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzzed-")


def damage(data: st.DataObject, valid: bytes, most: int = 4) -> bytes:
    """Content with a few bytes flipped, deleted, inserted or repeated, or truncated."""
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(0, most), label="damages")):
        position = data.draw(st.integers(0, len(content)), label="position")
        kind = data.draw(st.sampled_from(["flip", "delete", "insert", "repeat", "cut", "swap"]), label="kind")
        if kind == "flip" and position < len(content):
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "delete":
            del content[position : position + data.draw(st.integers(1, 30))]
        elif kind == "insert":
            extra = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from(_SPECIAL_BYTES)))
            content[position:position] = extra
        elif kind == "repeat":
            content[position:position] = content[position : position + 40] * data.draw(st.integers(1, 3))
        elif kind == "cut":
            del content[position:]
        elif kind == "swap":
            other = data.draw(st.integers(0, len(content)))
            a, b = sorted((position, other))
            content[a:b] = content[a:b][::-1]
    return bytes(content)


def damaged(data: st.DataObject, valid: bytes, name: str, most: int = 4) -> Path:
    """Write content with random damage to a file; return its path."""
    path = Path(_FOLDER.name) / name
    path.write_bytes(damage(data, valid, most))
    return path


_SPECIAL_BYTES = [
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\n", b"\r", b"\xe2\x80\xa8", b" ", b"|", b'"', b"{",
    b"[" * 3000,
    b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"1_0", b"../../../etc/passwd", b"~nobody_here/x",
    b"true", b"{}", b"[]", b"<", b"(2)", b"\x1b[2J",
]  # fmt: skip

_VALUES = [
    None, True, 0, -1, 7, 1.5, 10**400, -(10**30), float("nan"), float("inf"), 1e300, "", " ", "x", "-1", "\ud800",
    "a\0b", "a\nb", "../../x", "/", "~nobody-of-that-name", "x" * 5000, [], [[]], {}, [None], {"x": None}, [1, 2, 3, 4],
    {"word": [["x", 0, 1]]},
]  # fmt: skip


def damaged_json(data: st.DataObject, valid: Any, most: int = 2) -> Any:
    """Copy of a JSON value with a few parts replaced, removed or repeated."""
    value = json.loads(json.dumps(valid))
    for _ in range(data.draw(st.integers(1, most), label="damages")):
        inner = value
        while isinstance(inner, dict | list) and inner:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = data.draw(st.sampled_from(keys), label="key")
            child = inner[key]
            if isinstance(child, dict | list) and child and data.draw(st.integers(0, 3)):
                inner = child
                continue
            kind = data.draw(st.sampled_from(["replace", "replace", "replace", "delete", "double"]), label="kind")
            if kind == "delete":
                del inner[key]
            elif kind == "double" and isinstance(inner, list):
                inner.insert(key, child)
            else:
                inner[key] = json.loads(json.dumps(data.draw(st.sampled_from(_VALUES), label="value")))
            break
    return value
