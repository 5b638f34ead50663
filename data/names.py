"""Valid names of recordings, speakers and files, and fields of lines separated by ASCII white space."""

from __future__ import annotations

import re

# Control characters break lines, fields and terminals; surrogates are bytes of a file name that are not UTF-8. Other
# spaces, soft hyphens, joiners and private-use characters occur in real names.
_REFUSED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SPACES = " \t\n\r\f\v"
_SPACE = re.compile(f"[{_SPACES}]+")


def name_fault(name: str) -> str | None:
    """Reason why a text is not a valid name (empty, control characters, surrogates), or None."""
    if not name.strip():
        return "is empty"
    match = _REFUSED.search(name)
    if match is None:
        return None
    if match[0] >= "\ud800":
        return "is not Unicode text (not UTF-8)"
    return f"has the control character U+{ord(match[0]):04X}"


def escaped(name: str) -> str:
    """Printable form of a name, with invalid characters as backslash escapes."""
    return _REFUSED.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def space_fields(line: str, max_splits: int = -1) -> list[str]:
    """Fields of a line, separated by ASCII white space as in NIST's tools; at most `max_splits` + 1 of them.

    Unlike `str.split()`, it keeps spaces that are part of names, such as U+00A0 and U+3000.
    """
    line = line.strip(_SPACES)
    return _SPACE.split(line, max(0, max_splits)) if line else []
