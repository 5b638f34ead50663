"""Writing files so that a crash leaves the old state or the new one, never a mixture."""

from __future__ import annotations

import hashlib
import os
import secrets
import zlib
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Hidden temporary path beside `path`; short, because the name of `path` may already have the maximum length."""
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file: temporary name in the same folder, fsync, rename over `path`, fsync of the folder.

    Text is encoded as UTF-8; lone surrogates (of a file name, say) are written as `\\udce9`, as in JSON and YAML.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes: finds a torn write or a flipped bit, not a forgery."""
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def hash_of_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
