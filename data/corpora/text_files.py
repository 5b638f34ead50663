"""Text files and folders of corpora. Errors name the file and line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from data.audio.folders import is_clutter

# Much longer than any line of a transcript or table; without a limit, a file without line ends would fill the memory.
MAX_LINE_BYTES = 1 << 20


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ('FILE:LINE', text without its line end) of every line that is not blank.

    Lines end in a line feed, or carriage return and line feed: other Unicode line ends occur within sentences.
    Raises UserError: no such file, not UTF-8, a NUL byte, a line of more than MAX_LINE_BYTES.
    """
    for where, line in lines_or_faults(path):
        if isinstance(line, UserError):
            raise line
        yield where, line


def lines_or_faults(path: Path) -> Iterator[tuple[str, str | UserError]]:
    """`numbered_lines`, with an error instead of a line that is not UTF-8 or has a NUL byte."""
    try:
        with open(path, "rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}:{number}"
                if len(raw) > MAX_LINE_BYTES:
                    raise UserError(f"{where}: a line of more than {MAX_LINE_BYTES} bytes; is this another file?")
                line = _decode(raw, where, first=number == 1)
                if isinstance(line, UserError):
                    yield where, line
                elif line.strip():
                    yield where, line.rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode(raw: bytes, where: str, first: bool) -> str | UserError:
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert the file")
    return UserError(f"{where}: a NUL byte; the file is damaged: fetch it again") if "\0" in line else line


def existing_folder(field: str, value: str) -> Path:
    """Folder of a setting. Raises UserError naming the setting if it is empty or not a folder."""
    if not value:
        raise UserError(f"{field} is empty: give the folder of the corpus with --{field} DIR")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise UserError(f"{field} is {value!r}: no such folder")
    return folder


def listed_names(folder: Path) -> set[str]:
    """Names of the entries of a folder, without clutter (`is_clutter`); faster than a test of every file."""
    try:
        return {name for name in os.listdir(folder) if not is_clutter(name)}
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror or error})") from error


def summary(names: list[str], shown: int = 5) -> str:
    """First few names, for an error message."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
