"""Tables in text files: tab- or comma-separated values under a header. A row that cannot be read costs itself.

Corpora write their tables in two ways: with quotation marks that mean nothing (a sentence may begin with one and never
end it), and as CSV, where a quoted value may hold the separator and line ends, and doubles its quotation marks. A row
of tab-separated values is taken as it stands wherever it has as many values as the header, and for CSV where only that
makes it whole, or the header is quoted.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data.corpora.text_files import lines_or_faults
from data.errors import DataError

# Lines that one row may have: a quotation mark that is never closed must not be searched for to the end of the file.
_MOST_LINES = 32
# A quoted value whose own quotation marks are doubled: nobody's sentence looks so.
_DOUBLED = re.compile(r'"(?=[^"]*"")((?:[^"]|"")*)"')

_Line = tuple[str, str | DataError]


def table_rows(
    path: Path, needed: tuple[str, ...], separator: Literal["\t", ","] = "\t"
) -> Iterator[tuple[str, dict[str, str] | DataError]]:
    """('FILE:LINE', values by column) of every row; where it cannot be read, the error in the place of the values.

    Args:
        needed: columns that the header must have.
    Raises:
        DataError: the file cannot be read, is empty, or has another header.
    """
    lines = lines_or_faults(path)
    where, first = next(lines, (str(path), ""))
    if isinstance(first, DataError):
        raise first
    if not first:
        raise DataError(f"{path}: is empty; fetch it again")
    csv = separator == "," or first.startswith('"')
    header = _quoted(first, separator) or first.split(separator)
    if set(needed) - set(header) or len(set(header)) < len(header):
        raise DataError(f"{where}: expected the columns {', '.join(needed)}, found {', '.join(header)[:300]}")
    ahead: deque[_Line] = deque()
    while row := ahead.popleft() if ahead else next(lines, None):
        where, line = row
        values = line if isinstance(line, DataError) else _row(line, lines, ahead, len(header), separator, csv)
        if isinstance(values, int):
            values = DataError(f"{where}: {values} values where the header has {len(header)}: {str(line)[:80]!r}")
        yield where, values if isinstance(values, DataError) else dict(zip(header, values, strict=True))


def _row(
    line: str, lines: Iterator[_Line], ahead: deque[_Line], count: int, separator: str, csv: bool
) -> list[str] | int:
    """The `count` values of the row that begins with this line, and perhaps takes lines from `ahead`; else how many
    values the line has by itself. `csv`: quotation marks are CSV's everywhere."""
    plain = line.split(separator)
    whole = not csv and len(plain) == count
    # A last value with a quotation mark in front and none behind may go on in the next line.
    if whole and not (plain[-1].startswith('"') and _quoted(plain[-1], separator) is None):
        return [_DOUBLED.sub(_undoubled, value) if _DOUBLED.fullmatch(value) else value for value in plain]
    text = line
    for taken in range(_MOST_LINES):
        values = _quoted(text, separator)
        if values is not None and len(values) == count:
            for _ in range(taken):
                ahead.popleft()
            return values
        if '"' not in text:
            break
        if len(ahead) == taken:
            ahead.extend([after] if (after := next(lines, None)) else [])
        following = ahead[taken][1] if taken < len(ahead) else None
        # A line that is a row by itself is none's continuation.
        if not isinstance(following, str) or count in (
            len(following.split(separator)),
            len(_quoted(following, separator) or ()),
        ):
            break
        text += f"\n{following}"
    return plain if whole else len(plain)


def _quoted(text: str, separator: str) -> list[str] | None:
    """The values of a row of CSV; None where it is none, or goes on in the next line."""
    field = re.compile(rf'"((?:[^"]|"")*)"(?={separator}|\Z)|(?!")([^{separator}\n]*)')
    values, place = [], 0
    while match := field.match(text, place):
        values.append(match[2] if match[1] is None else match[1].replace('""', '"'))
        place = match.end() + 1
        if match.end() == len(text):
            return values
        if text[match.end()] != separator:
            return None
    return None


def _undoubled(match: re.Match[str]) -> str:
    return match[1].replace('""', '"')
