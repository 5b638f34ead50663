"""Storage protocol and settings, retries, and local folders read with positioned reads.

Timeouts, lost connections, 5xx responses and short responses are retried after increasing waits, missing and forbidden
files are not. The last failure is raised as an OSError that names the file, the number of attempts and the cause.
"""

from __future__ import annotations

import errno
import os
import random
import re
import stat
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.errors import UserError

Result = TypeVar("Result")
SMALL_FILE = 2**26
OPEN_FILES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
# Errors of a shared file system while one of its servers is temporarily unavailable.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EAGAIN, errno.EREMOTEIO}


class StorageError(OSError):
    """Failed read after all attempts. The message names the file, the number of attempts and the last cause."""


class TruncatedFile(OSError):
    """File that ends before the end of the requested range."""


_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TruncatedFile)


class Storage(Protocol):
    """Read access to the files of one folder, by plain names. Usable after a fork and after pickling."""

    location: str
    settings: StorageSettings

    def read_into(self, name: str, position: int, out: memoryview) -> None:
        """Fill `out` (writable bytes) from byte `position` of a file. Raises OSError, such as TruncatedFile."""

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, or None if it does not exist. Raises OSError."""

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        """Content of a small file. Raises OSError: missing, or larger than `limit` bytes."""

    def local_copy(self, name: str) -> Path:
        """Path of the whole file on this machine, for memory-mapping. Raises OSError."""

    def forget(self, name: str, position: int, length: int) -> None:
        """Drop a range with wrong content from the cache, so that it is fetched again."""


@dataclass(frozen=True)
class StorageSettings:
    """Retries of reads, and cache of remote datasets."""

    cache_dir: str = ""
    """Folder for blocks of remote files, on the node's local disk. Empty: bestrq-cache-UID in the temporary folder."""
    cache_gb: float = 32.0
    """Maximum size of the cached blocks of a node in gigabytes (1e9); 0 disables the cache. Indexes are not counted."""
    block_mb: float = 1.0
    """Size of a block in megabytes (2**20). Small blocks fetch fewer unused bytes, large ones need fewer requests."""
    attempts: int = 6
    """Maximum number of attempts per read."""
    timeout_seconds: float = 30.0
    """Maximum duration of an attempt (remote storage)."""
    wait_seconds: float = 0.5
    """Wait before the second attempt. It doubles with each attempt, up to 30 s, and is reduced by a random share."""
    seed: int = 0
    """Seed of the random shares, which spread the retries of many workers over time."""

    def __post_init__(self) -> None:
        minimum = {"cache_gb": 0, "block_mb": 1 / 256, "attempts": 1, "timeout_seconds": 0.001, "wait_seconds": 0}
        for name, value in minimum.items():
            if getattr(self, name) < value:
                raise UserError(f"storage.{name} is {getattr(self, name)}: it must be at least {value}")

    def cache_folder(self) -> Path:
        return Path(self.cache_dir or Path(tempfile.gettempdir()) / f"bestrq-cache-{os.geteuid()}")


class LocalStorage:
    """Folder on a local or shared file system."""

    def __init__(self, location: str, settings: StorageSettings) -> None:
        self.location, self.settings = location, settings
        self._files: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self.location, self.settings)

    def read_into(self, name: str, position: int, out: memoryview) -> None:
        try:
            complete = fill(self._file(name), position, out)
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            complete = retry(lambda: self._read_again(name, position, out), self._path(name), self.settings, position)
        if not complete:
            raise TruncatedFile(f"{self._path(name)} ends before byte {position + len(out)}")

    def size(self, name: str) -> int | None:
        try:
            status = os.stat(self._path(name), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return status.st_size

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        size = self.size(name)
        check_small(self._path(name), size, limit)
        data = bytearray(size or 0)
        self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def local_copy(self, name: str) -> Path:
        return Path(self._path(name))

    def forget(self, name: str, position: int, length: int) -> None:
        pass

    def _path(self, name: str) -> str:
        return os.path.join(self.location, check_name(name))

    def _file(self, name: str) -> int:
        """Descriptor of an open file. Positioned reads share no state, so a forked process may use its parent's."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        # Opening a pipe would wait for a writer; O_NONBLOCK has no effect on files.
        file = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(f"{name} is not a regular file")
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[name] = file
        return file

    def _read_again(self, name: str, position: int, out: memoryview) -> bool:
        if name in self._files:  # a stale handle remains stale
            os.close(self._files.pop(name))
        return fill(self._file(name), position, out)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def check_name(name: str) -> str:
    """Return the name. Raises UserError unless it is a plain file name, which cannot refer to another folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"invalid file name {name!r}: use letters, digits, '.', '_', '-', a letter or digit first")
    return name


def check_small(place: str, size: int | None, limit: int) -> None:
    """Raise FileNotFoundError if the file does not exist (size None), StorageError if it is larger than `limit`."""
    if size is None:
        raise FileNotFoundError(errno.ENOENT, "does not exist", place)
    if size > limit:
        raise StorageError(f"{place} has {size} bytes, expected at most {limit}: it is not a file of a dataset")


def fill(file: int, position: int, out: memoryview) -> bool:
    """Fill `out` from byte `position` of an open file; False if the file ends before. Raises OSError."""
    while out:
        size = os.preadv(file, [out], position)
        if size == 0:
            return False
        out, position = out[size:], position + size
    return True


def retry(action: Callable[[], Result], place: str, settings: StorageSettings, salt: int = 0) -> Result:
    """Call `action` until it succeeds, and return its result. Permanent errors are not retried.

    Raises OSError that names `place` and the last cause. `salt`, the place and the seed determine the random waits.
    """
    for attempt in range(1, settings.attempts + 1):
        try:
            return action()
        # The errors of the back ends have no common base class; programming errors are not caught.
        except Exception as error:
            if isinstance(error, (TypeError, AttributeError, NameError, ImportError, AssertionError, UserError)):
                raise
            cause = _cause(error)
            if not is_transient(cause):
                raise _permanent_error(cause, place) from error
            if attempt == settings.attempts:
                last = f"{type(cause).__name__}: {cause}".rstrip(": ")
                raise StorageError(f"{place}: failed {attempt} times; last error: {last}") from error
        wait = min(30.0, settings.wait_seconds * 2 ** (attempt - 1))
        time.sleep(wait * random.Random(f"{settings.seed} {place} {salt} {attempt}").uniform(0.5, 1.0))
    raise AssertionError("attempts is at least 1")


def is_transient(error: BaseException) -> bool:
    """True if the same read may succeed later."""
    status = _http_status(error)
    if status is not None:
        # 400: S3 for a slow request, aiohttp for a response that is not HTTP.
        return status >= 500 or status in (400, 408, 425, 429)
    # ELOOP: a symbolic link in place of a file.
    return not isinstance(error, _PERMANENT) and getattr(error, "errno", None) not in (errno.ELOOP, errno.ENAMETOOLONG)


def _permanent_error(error: BaseException, place: str) -> OSError:
    status = _http_status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "does not exist", place)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, f"not allowed ({error})", place)
    return StorageError(f"{place}: {type(error).__name__}: {error}")


def _http_status(error: BaseException) -> int | None:
    for holder in (error, getattr(error, "response", None)):  # aiohttp, gcsfs, azure; huggingface_hub
        for name in ("status", "code", "status_code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def _cause(error: BaseException) -> BaseException:
    """Cause of the "not found" that fsspec's HTTP raises for every file whose size it could not determine."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return error.__cause__
    return error
