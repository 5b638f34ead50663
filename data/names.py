"""Names: which characters a recording, a speaker or a file may have in its own, and fields that ASCII spaces part."""

from __future__ import annotations

import re

# Control characters end lines, fields and terminals; surrogates are no text (a file name's bytes that are not UTF-8).
# Spaces of any kind, soft hyphens, joiners, private characters are somebody's spelling.
_REFUSED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SPACES = " \t\n\r\f\v"
_SPACE = re.compile(f"[{_SPACES}]+")


def name_fault(name: str) -> str | None:
    """The reason why a text cannot be a name, or None: it is empty, or has control characters or surrogates."""
    if not name.strip():
        return "is empty"
    found = _REFUSED.search(name)
    if found is None:
        return None
    if found[0] >= "\ud800":
        return "is not Unicode text (not UTF-8)"
    return f"has the control character U+{ord(found[0]):04X}"


def escaped(name: str) -> str:
    """A name that can be printed and stored, whatever its characters: those that are refused as backslash escapes."""
    return _REFUSED.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def space_fields(line: str, most: int = -1) -> list[str]:
    """The fields of a line that spaces and tabs separate, at most `most` + 1 of them, as NIST's tools split it.

    Not `str.split()`, which also splits at spaces that are part of names, such as U+00A0 and U+3000.
    """
    line = line.strip(_SPACES)
    return _SPACE.split(line, max(0, most)) if line else []
