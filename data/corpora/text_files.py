"""Lines of the text files that corpora are described in, with an error that names the file and the line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from data.audio.folders import is_clutter

# No line of a transcript or a table comes near; without a limit, a file with no line end would be read into memory.
MAX_LINE_BYTES = 1 << 20


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Every line that is not blank, as ('FILE:LINE', text without its line end), read as they are asked for.

    Lines end in a line feed (and perhaps a carriage return) alone: other Unicode line ends occur within sentences.
    Raises UserError: no such file, not UTF-8, a NUL byte, a line of more than MAX_LINE_BYTES.
    """
    for where, line in lines_or_faults(path):
        if isinstance(line, UserError):
            raise line
        yield where, line


def lines_or_faults(path: Path) -> Iterator[tuple[str, str | UserError]]:
    """`numbered_lines`, with the error in place of a line that is not UTF-8 or has a NUL byte."""
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
    """The folder that a setting names. Raises UserError naming the setting where it is empty or no folder."""
    if not value:
        raise UserError(f"{field} is empty: say where the corpus lies with --{field} DIR")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise UserError(f"{field} is {value!r}: there is no such folder")
    return folder


def listed_names(folder: Path) -> set[str]:
    """Names of a folder's entries except clutter (`is_clutter`), listed at once and not by a call per entry."""
    try:
        return {name for name in os.listdir(folder) if not is_clutter(name)}
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror or error})") from error


def summary(names: list[str], shown: int = 5) -> str:
    """The first few names, for an error message."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
