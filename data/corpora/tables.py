"""Tables in text files: tab- or comma-separated values under a header. An unreadable row becomes an error value.

Corpora use two forms: plain values, in which quotation marks have no meaning (a sentence may start with one that is
never closed), and CSV, in which a quoted value may contain the separator and line ends, and doubles its quotation
marks. A tab-separated row is parsed as CSV if the header is quoted, or if only this gives the number of values of the
header; else as plain values.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data.corpora.text_files import lines_or_faults

# Maximum number of lines of a row, so that an unclosed quotation mark does not extend to the end of the file.
_MOST_LINES = 32
# A quoted value with doubled quotation marks inside, unlike any plain sentence.
_DOUBLED = re.compile(r'"(?=[^"]*"")((?:[^"]|"")*)"')

_Line = tuple[str, str | UserError]


def table_rows(
    path: Path, needed: tuple[str, ...], separator: Literal["\t", ","] = "\t"
) -> Iterator[tuple[str, dict[str, str] | UserError]]:
    """Yield ('FILE:LINE', values by column) of every row; for an unreadable row, the error instead of the values.

    Args:
        needed: required columns.
    Raises:
        UserError: the file cannot be read, is empty, or lacks a required column.
    """
    lines = lines_or_faults(path)
    where, first = next(lines, (str(path), ""))
    if isinstance(first, UserError):
        raise first
    if not first:
        raise UserError(f"{path}: is empty; fetch it again")
    csv = separator == "," or first.startswith('"')
    header = _quoted(first, separator) or first.split(separator)
    if set(needed) - set(header) or len(set(header)) < len(header):
        raise UserError(f"{where}: expected the columns {', '.join(needed)}, found {', '.join(header)[:300]}")
    lookahead: deque[_Line] = deque()
    while row := lookahead.popleft() if lookahead else next(lines, None):
        where, line = row
        values = line if isinstance(line, UserError) else _row(line, lines, lookahead, len(header), separator, csv)
        if isinstance(values, int):
            values = UserError(f"{where}: {values} values where the header has {len(header)}: {str(line)[:80]!r}")
        yield where, values if isinstance(values, UserError) else dict(zip(header, values, strict=True))


def _row(
    line: str, lines: Iterator[_Line], lookahead: deque[_Line], count: int, separator: str, csv: bool
) -> list[str] | int:
    """Values of the row that starts with this line and may continue in `lookahead`.

    Returns the number of values of this line if the row does not have `count` values. `csv`: all rows are CSV.
    """
    plain = line.split(separator)
    is_complete = not csv and len(plain) == count
    # A last value with an opening but no closing quotation mark may continue in the next line.
    if is_complete and not (plain[-1].startswith('"') and _quoted(plain[-1], separator) is None):
        return [_DOUBLED.sub(_undoubled, value) if _DOUBLED.fullmatch(value) else value for value in plain]
    text = line
    for taken in range(_MOST_LINES):
        values = _quoted(text, separator)
        if values is not None and len(values) == count:
            for _ in range(taken):
                lookahead.popleft()
            return values
        if '"' not in text:
            break
        if len(lookahead) == taken:
            lookahead.extend([after] if (after := next(lines, None)) else [])
        following = lookahead[taken][1] if taken < len(lookahead) else None
        # A line that is a complete row does not continue another one.
        if not isinstance(following, str) or count in (
            len(following.split(separator)),
            len(_quoted(following, separator) or ()),
        ):
            break
        text += f"\n{following}"
    return plain if is_complete else len(plain)


def _quoted(text: str, separator: str) -> list[str] | None:
    """Values of a CSV row; None if it is not CSV or continues in the next line."""
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
