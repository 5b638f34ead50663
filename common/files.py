"""Atomic writes: a crash leaves the old file or the new one, never a mixture. Also JSON, checksums and paths."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

LEFTOVER = re.compile(r"\.tmp-\d+-[0-9a-f]{8}")
"""names of `temporary_name`"""
MAX_BYTES = 1 << 30
"""size of the largest file that is read at once"""


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Hidden temporary path in the folder of `path`; short, as the name of `path` may have the maximum length."""
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which is synced and renamed to `path` if the block succeeds, and removed otherwise."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Create a temporary folder, which is synced and renamed to `path` if the block succeeds, and removed otherwise.

    Files in subfolders are not synced. `path` must not exist, or be an empty folder. `temporary` may exist already.
    """
    temporary = temporary or temporary_name(path)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        for entry in (*temporary.iterdir(), temporary):
            sync(entry)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of dead writers in a folder, without its subfolders (`temporary_name`).

    Call it only if no other process writes there.
    """
    for path in [path for path in folder.glob(".tmp-*") if LEFTOVER.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file atomically, replacing an existing one (`replace_file`).

    Text is encoded as UTF-8; lone surrogates (of file names, for example) are written as `\\udce9`, as in JSON.
    """
    with replace_file(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value to a file atomically, in ASCII and indented by 1."""
    write_file(path, json.dumps(value, indent=1) + "\n")


def read_bounded(path: Path) -> bytes:
    """Content of a regular file of at most MAX_BYTES: reading a pipe or a device may never end. Raises UserError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise UserError(f"{path}: not a regular file of at most {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_json(path: Path) -> Any:
    """Value of a JSON file in UTF-8. Raises UserError with the path if the file is missing, too large or invalid."""
    return parse_json(read_bounded(path), path)


def parse_json(content: bytes, place: Path | str) -> Any:
    """Value of JSON text in UTF-8, with or without a byte-order mark. Raises UserError with the place."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # invalid UTF-8, invalid JSON, brackets nested a thousand deep
        raise UserError(f"{place}: not JSON in UTF-8 ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Like `read_json`, for a file with a JSON object."""
    return as_object(read_json(path), path)


def as_object(value: Any, place: Path | str) -> dict[str, Any]:
    """Return the value if it is a JSON object. Raises UserError with the place otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, not {type(value).__name__}")
    return value


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes: detects torn writes and flipped bits, not tampering."""
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def hash_of_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_path(path: str) -> str:
    """Absolute path without links, `~` and trailing slash. URLs and "" are returned unchanged."""
    return path if not path or "://" in path else os.path.realpath(os.path.expanduser(path))
