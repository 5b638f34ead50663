"""JSON-lines manifests, plain or gzipped, read line by line. Errors name the file and line."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError
from data.names import name_fault

# A cut of three hours with word times takes 2 MB; a file without line ends must not fill the memory.
MAX_LINE_BYTES = 32 << 20
# Manifests compress by a factor of 10 to 30. A much higher factor, after the first 64 MB, is an error.
_MAX_EXPANSION = 200
_FREE_BYTES = 64 << 20
# A file of line ends alone would take minutes to read.
_MOST_BLANK_LINES = 10_000
_GZIP_MAGIC = b"\x1f\x8b"


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ('FILE:LINE', JSON object) of every line that is not blank.

    Raises UserError: no such file, damaged gzip, excessive expansion of gzip, not UTF-8, not an object, a line of more
    than MAX_LINE_BYTES.
    """
    for where, fields in json_lines_or_faults(path):
        if isinstance(fields, UserError):
            raise fields
        yield where, fields


def json_lines_or_faults(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """`json_lines`, with an error instead of a line that is not UTF-8 or not an object."""
    where = str(path)
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            size = raw.seek(0, 2)
            raw.seek(0)
            if not zipped:
                yield from _objects(raw, path, math.inf)
            else:
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield from _objects(unzipped, path, _FREE_BYTES + _MAX_EXPANSION * size)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{where}: damaged gzip ({error}); fetch or write it again") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error


def _objects(file: BinaryIO, path: Path, max_bytes: float) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    number = blank = read = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        read += len(line)
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{where}: a line of more than {MAX_LINE_BYTES >> 20} MB; is this a JSON-lines manifest?")
        if read > max_bytes:
            raise UserError(f"{where}: gzip that expands more than {_MAX_EXPANSION} times; refused")
        if not line.strip():
            blank += 1
            if blank > _MOST_BLANK_LINES:
                raise UserError(f"{where}: more than {_MOST_BLANK_LINES} blank lines; is this a JSON-lines manifest?")
        else:
            try:
                fields: dict[str, Any] | UserError = parse_object(line, where, first=number == 1)
            except UserError as error:
                fields = error
            yield where, fields


def parse_object(line: bytes, where: str, first: bool = True) -> dict[str, Any]:
    """JSON object of a line. Raises UserError naming the place."""
    try:
        # RecursionError: brackets nested a thousand deep.
        fields = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object ({error}): {line[:80]!r}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object: {line[:80]!r}")
    return fields


def text_field(fields: Mapping[str, Any], name: str, where: str) -> str | None:
    """Text of a field; None if it is missing or null. Raises UserError if it is not text, or not Unicode."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {shorten(value)}, expected str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} {shorten(value)} is not Unicode text ({error.reason})") from error
    return value


def seconds_field(fields: Mapping[str, Any], name: str, where: str, negative: bool = False) -> float | None:
    """Seconds of a field; None if it is missing or null. Raises UserError unless it is finite, and 0 or more."""
    value = fields.get(name)
    if value is None:
        return None
    try:
        seconds = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:
        seconds = math.nan
    if not math.isfinite(seconds) or (seconds < 0 and not negative):
        raise UserError(f"{where}: {name} is {shorten(value)}, expected seconds{'' if negative else ', 0 or more'}")
    return seconds


def label_field(fields: Mapping[str, Any], name: str, where: str) -> str:
    """Name, such as a speaker, in a field; may be written as an integer; "" if missing or null. Raises UserError."""
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return str(value)
    return text_field(fields, name, where) or ""


def audio_path(name: str, base: Path, where: str) -> Path:
    """Path of an audio file; a relative path starts at `base`. Raises UserError.

    Manifests come from the user and may name files anywhere, so absolute paths and `..` are allowed. Files are only
    decoded as audio, and never written.
    """
    if fault := name_fault(name):
        raise UserError(f"{where}: {shorten(name)} is not the path of an audio file: it {fault}")
    try:
        return base / Path(name).expanduser()
    except RuntimeError as error:  # `~user` of an unknown user
        raise UserError(f"{where}: {shorten(name)}: {error}") from error


def is_file(path: Path) -> bool:
    """True if the file exists; False also for an invalid file name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def shorten(value: Any) -> str:
    """Repr of a value, at most 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
