"""Bounded cache of blocks of remote files on a node's local disk, shared by all processes of the node.

FOLDER/blocks/KEY-NUMBER    a block of a file; its modification time is the time of the last read, to a minute
FOLDER/blocks.lock          lock for adding a block; contains the total size of all blocks
FOLDER/copies/URL-VERSION-NAME    a complete file, for memory-mapping; neither counted nor evicted

Readers take no lock: a block appears complete, by a rename, and an evicted block stays readable while it is open.
Writers hold the lock, so an existing temporary file was left by a killed process and may be overwritten. A power
failure may leave a truncated block, which is detected by its length.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from data.storage.local import fill

# Eviction continues to this share of the limit, so that the folder is listed once per many blocks.
EVICT_TO = 0.9
# Minimum interval in seconds between two updates of a block's read time, which are writes to the disk.
_MARK_INTERVAL = 60
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class BlockCache:
    """Blocks and whole copies of remote files in `folder`; the total size of the blocks is at most `limit` bytes.

    Raises UserError if the folder belongs to another user, OSError if it cannot be created.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._blocks, self._copies = folder / "blocks", folder / "copies"
        for path in (folder, self._blocks, self._copies):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # In a shared temporary folder, another user could have prepared blocks under this name.
            if path.lstat().st_uid != os.geteuid():
                raise UserError(f"storage.cache_dir: {path} belongs to another user; choose a folder that you own")

    def read_into(self, key: str, number: int, length: int, skip: int, out: memoryview) -> bool:
        """Fill `out` from byte `skip` of a block of `length` bytes; False if the block is missing or truncated."""
        path = self._path(key, number)
        try:
            file = os.open(path, _READ)
        except FileNotFoundError:
            return False
        try:
            status = os.fstat(file)
            if status.st_size != length or not fill(file, skip, out):
                os.unlink(path)
                return False
            if abs(time.time() - status.st_mtime) > _MARK_INTERVAL:
                os.utime(file)
        finally:
            os.close(file)
        return True

    def add(self, key: str, number: int, data: memoryview) -> None:
        """Store a block, and evict the least recently read ones if necessary. Raises OSError."""
        if len(data) > self.limit:
            return
        with _locked(self.folder / "blocks.lock") as lock:
            path = self._path(key, number)
            if os.path.exists(path):  # added by another process in the meantime
                return
            used = self._used(lock)
            if used + len(data) > self.limit:
                used = self._evict(int(EVICT_TO * self.limit) - len(data))
            # Counted first: a kill before the rename leaves the count too high, never too low.
            os.pwrite(lock, b"%20d" % (used + len(data)), 0)
            temporary = self.folder / "block.tmp"
            _write(temporary, data)
            os.rename(temporary, path)

    def forget(self, key: str, number: int) -> None:
        """Remove a block, so that it is fetched again."""
        Path(self._path(key, number)).unlink(missing_ok=True)

    def copy(self, key: str, version: str, name: str, size: int, download: Callable[[BinaryIO], None]) -> Path:
        """Path of a local copy of a file; the first process of the node calls `download` to write it.

        key: identifies the file; version: its content (older versions are removed); size: expected size in bytes.
        """
        path = self._copies / f"{key}-{version}-{name}"
        with _locked(self._copies / f"{key}.lock"):
            if path.is_file() and path.stat().st_size == size:
                return path
            temporary = self._copies / f"{key}.tmp"
            with os.fdopen(os.open(temporary, _WRITE | os.O_TRUNC, 0o600), "wb") as file:
                download(file)
                file.flush()
                os.fsync(file.fileno())
                written = os.fstat(file.fileno()).st_size
            if written != size:
                raise OSError(f"{name}: received {written} of {size} bytes")
            os.rename(temporary, path)
            for other in self._copies.glob(f"{key}-*"):
                if other != path:  # stays readable for processes that have it mapped
                    other.unlink(missing_ok=True)
        return path

    def _path(self, key: str, number: int) -> str:
        return f"{self._blocks}/{key}-{number:08d}"

    def _used(self, lock: int) -> int:
        """Total size of all blocks in bytes, from the lock file; from the sizes of the blocks if it is empty."""
        stored = os.pread(lock, 20, 0).strip()
        return int(stored) if stored.isdigit() else self._evict(self.limit)

    def _evict(self, target: int) -> int:
        """Remove the least recently read blocks until at most `target` bytes are left; return the bytes left."""
        with os.scandir(self._blocks) as entries:
            blocks = sorted((s.st_mtime_ns, s.st_size, e.name) for e in entries for s in [_stat(e)] if s is not None)
        total = sum(size for _, size, _ in blocks)
        for _, size, name in blocks:
            if total <= target:
                break
            (self._blocks / name).unlink(missing_ok=True)
            total -= size
        return total


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a file's lock, which the system releases if the process ends; yields the file descriptor."""
    file = os.open(path, _WRITE, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _write(path: Path, data: memoryview) -> None:
    with os.fdopen(os.open(path, _WRITE | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # a reader removed a damaged block
        return None
