"""Files with one JSON object per line, such as logs and metrics; lines are bounded, so that memory is."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError
from common.files import as_object, parse_json

MAX_LINE = 1 << 26
"""longest line of a text file, in bytes: ten hours of words with times are about 10 MB"""


def bounded_lines(file: BinaryIO, place: Path | str, most: int = MAX_LINE) -> Iterator[bytes]:
    """Lines of a binary file, with their line ends. Raises UserError, with the place, for a line of more bytes."""
    number = 0
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise UserError(f"{place}, line {number}: more than {most >> 10} KiB; is this another file?")
        yield line


def regular_lines(path: Path, most: int = MAX_LINE) -> Iterator[bytes]:
    """`bounded_lines` of a regular file. Raises UserError for a pipe, a device, or a file that cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            yield from bounded_lines(file, path, most)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of the lines of a file. Other lines, such as a truncated one, are skipped. Raises UserError."""
    for line in regular_lines(path):
        with suppress(UserError):
            yield as_object(parse_json(line, path), path)


def read_strict_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """JSON object and place (PATH, line N) of every line that is not blank. Raises UserError for any other line."""
    for number, line in enumerate(regular_lines(path), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield as_object(parse_json(line, place), place), place
