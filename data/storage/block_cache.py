"""A bounded folder of blocks of remote files, on a node's own disk, shared by all processes of the node.

FOLDER/blocks/KEY-NUMBER    one block of a file; its time of change is when it was last read, to a minute
FOLDER/blocks.lock          held while a block is added; holds the bytes that all blocks have together
FOLDER/copies/URL-VERSION-NAME    a whole file, for memory-mapping; not counted and not evicted

Readers take no lock: a block appears whole, by a rename, and an evicted one stays readable to whoever has it open.
Writers hold the lock, so that whatever stands under a temporary name is left from a killed process and written over.
A machine that loses power may leave a short block, which its length gives away.
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

# Eviction goes on to this share of the limit, so that the folder is listed once in many blocks.
EVICT_TO = 0.9
# Seconds within which a block that is read again is not marked again: the mark is a write to the disk.
_MARKED = 60
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class BlockCache:
    """Blocks and whole copies of remote files in `folder`; the blocks have at most `limit` bytes together (0: none).

    Raises UserError where the folder belongs to another user, OSError where it cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._blocks, self._copies = folder / "blocks", folder / "copies"
        for made in (folder, self._blocks, self._copies):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            # In a folder for everybody's temporary files, another user could have laid out blocks under our name.
            if made.lstat().st_uid != os.geteuid():
                raise UserError(f"storage.cache_dir: {made} belongs to another user; give a folder of your own")

    def read_into(self, key: str, number: int, length: int, skip: int, out: memoryview) -> bool:
        """Fill `out` from byte `skip` of a block of `length` bytes; False where the block is not there whole."""
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
            if abs(time.time() - status.st_mtime) > _MARKED:
                os.utime(file)
        finally:
            os.close(file)
        return True

    def add(self, key: str, number: int, data: memoryview) -> None:
        """Keep a block; those longest unread make room for it. OSError where the disk is full or broken."""
        if len(data) > self.limit:
            return
        with _locked(self.folder / "blocks.lock") as lock:
            path = self._path(key, number)
            if os.path.exists(path):  # another process was quicker
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
        """Drop a block, so that it is fetched again."""
        Path(self._path(key, number)).unlink(missing_ok=True)

    def copy(self, key: str, version: str, name: str, size: int, download: Callable[[BinaryIO], None]) -> Path:
        """Path of the whole file on this disk; the first process of the node lets `download` write it.

        key: of the file; version: of its content (older versions are removed); size: bytes that it must have.
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
                raise OSError(f"{name}: {written} bytes arrived of {size}")
            os.rename(temporary, path)
            for other in self._copies.glob(f"{key}-*"):
                if other != path:  # a process that has it mapped keeps it
                    other.unlink(missing_ok=True)
        return path

    def _path(self, key: str, number: int) -> str:
        return f"{self._blocks}/{key}-{number:08d}"

    def _used(self, lock: int) -> int:
        """Bytes of all blocks, as counted; as found where nothing was counted yet."""
        counted = os.pread(lock, 20, 0).strip()
        return int(counted) if counted.isdigit() else self._evict(self.limit)

    def _evict(self, target: int) -> int:
        """Remove the blocks longest unread until at most `target` bytes are left; the bytes that are left."""
        with os.scandir(self._blocks) as entries:
            found = sorted((s.st_mtime_ns, s.st_size, e.name) for e in entries for s in [_stat(e)] if s is not None)
        total = sum(size for _, size, _ in found)
        for _, size, name in found:
            if total <= target:
                break
            (self._blocks / name).unlink(missing_ok=True)
            total -= size
        return total


def fill(file: int, position: int, out: memoryview) -> bool:
    """Fill `out` from byte `position` of an open file; False where the file ends before. Raises OSError."""
    while out:
        got = os.preadv(file, [out], position)
        if got == 0:
            return False
        out, position = out[got:], position + got
    return True


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a file's lock, which ends with its holder; its file descriptor."""
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
    except FileNotFoundError:  # a reader dropped a broken block
        return None
