"""Where a dataset's files lie: a local or shared folder, or a URL of object storage; both are read by byte ranges.

`open_storage(location, settings)` gives a `Storage`. A folder is read with positioned reads. A URL (s3://, gs://,
az://, hf://, https://, ...) is read through fsspec, with a bounded cache of blocks on the node's own disk.

Timeouts, lost connections, answers 5xx and short answers are tried again, with growing waits; a file that is not there
or not allowed is not. What is still wrong then is one OSError with the place, the number of attempts, the last cause.
"""

from __future__ import annotations

import errno
import os
import random
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.errors import UserError
from data.storage.block_cache import fill

Result = TypeVar("Result")
SMALL_FILE = 2**26
OPEN_FILES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
# What a shared file system answers while a server of it is gone for a moment.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EAGAIN, errno.EREMOTEIO}


class StorageError(OSError):
    """Reading failed as often as the settings allow. The message names the place, the attempts and the last cause."""


class CutShort(OSError):
    """The file ends before the range that was asked for."""


_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, CutShort)


class Storage(Protocol):
    """Read access to the files of one folder, by plain names. Usable in forked processes and where it is unpickled."""

    location: str
    settings: StorageSettings

    def read_into(self, name: str, position: int, out: memoryview) -> None:
        """Fill `out` (writable bytes) from byte `position` of a file. Raises OSError; CutShort where the file ends."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where it is not there. Raises OSError."""

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        """A small file whole. Raises OSError: not there, more than `limit` bytes."""

    def local_copy(self, name: str) -> Path:
        """A path of the whole file that can be memory-mapped. Raises OSError."""

    def forget(self, name: str, position: int, length: int) -> None:
        """Drop what is cached of a range: its content proved wrong and should be fetched again."""


@dataclass(frozen=True)
class StorageSettings:
    cache_dir: str = ""
    """Folder on the node's own disk for blocks of remote files; empty: bestrq-cache-UID in the temporary folder."""
    cache_gb: float = 32.0
    """Gigabytes (1e9) of blocks kept, by all processes of a node together; 0 keeps none. Indexes come on top."""
    block_mb: float = 1.0
    """Megabytes (2**20) of a block. Smaller ones fetch less that is not needed, larger ones need fewer requests."""
    attempts: int = 6
    """How often a read is tried before it is an error."""
    timeout_seconds: float = 30.0
    """Longest time that one attempt may take (remote storage)."""
    wait_seconds: float = 0.5
    """Wait before the second attempt; each further one is twice as long, at most 30 s, less a random share."""
    seed: int = 0
    """Of these random shares, which keep a thousand workers from returning at once."""

    def __post_init__(self) -> None:
        for name, least in (("cache_gb", 0), ("block_mb", 1 / 256), ("attempts", 1), ("timeout_seconds", 0.001)):
            if getattr(self, name) < least:
                raise UserError(f"storage.{name} is {getattr(self, name)}: it must be at least {least}")
        if self.wait_seconds < 0:
            raise UserError(f"storage.wait_seconds is {self.wait_seconds}: it must not be negative")

    def cache_folder(self) -> Path:
        return Path(self.cache_dir or Path(tempfile.gettempdir()) / f"bestrq-cache-{os.geteuid()}")


def open_storage(location: str | os.PathLike[str], settings: StorageSettings | None = None) -> Storage:
    """The storage of a folder or a URL. Raises UserError: a URL of an unknown kind, or whose package is missing."""
    location, settings = os.fspath(location), settings or StorageSettings()
    if "://" not in location:
        return LocalStorage(location, settings)
    from data.storage.remote import RemoteStorage  # fsspec is loaded only where it is used

    return RemoteStorage(location, settings)


class LocalStorage:
    """A folder on a local or shared file system."""

    def __init__(self, location: str, settings: StorageSettings) -> None:
        self.location, self.settings = location, settings
        self._files: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self.location, self.settings)

    def read_into(self, name: str, position: int, out: memoryview) -> None:
        try:
            whole = fill(self._file(name), position, out)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            whole = retry(lambda: self._reopened(name, position, out), self._path(name), self.settings, position)
        if not whole:
            raise CutShort(f"{self._path(name)} ends before byte {position + len(out)}")

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
        """An open file. Positioned reads share no state, so a forked process may use its parent's."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        file = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[name] = file
        return file

    def _reopened(self, name: str, position: int, out: memoryview) -> bool:
        if name in self._files:  # a stale handle stays stale
            os.close(self._files.pop(name))
        return fill(self._file(name), position, out)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def check_name(name: str) -> str:
    """The name itself. UserError unless it is a plain file name: an index must not reach outside its folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"file name {name!r} is not plain letters, digits, '.', '_' and '-'; refused")
    return name


def check_small(place: str, size: int | None, limit: int) -> None:
    """Raise FileNotFoundError where there is no such file, StorageError where it has more than `limit` bytes."""
    if size is None:
        raise FileNotFoundError(errno.ENOENT, "not there", place)
    if size > limit:
        raise StorageError(f"{place} has {size} bytes where at most {limit} are expected; it is another file")


def retry(action: Callable[[], Result], place: str, settings: StorageSettings, salt: int = 0) -> Result:
    """The result of `action`, tried again after failures that may pass. OSError names `place` and the last cause.

    salt: together with the place and the seed, it determines the random part of the waits.
    """
    for attempt in range(1, settings.attempts + 1):
        try:
            return action()
        # Every back end has errors of its own, with no common base; those of a wrong program are let through.
        except Exception as error:
            if isinstance(error, (TypeError, AttributeError, NameError, ImportError, AssertionError, UserError)):
                raise
            cause = _cause(error)
            if not is_transient(cause):
                raise _permanent(cause, place) from error
            if attempt == settings.attempts:
                last = f"{type(cause).__name__}: {cause}".rstrip(": ")
                raise StorageError(f"{place}: failed {attempt} times; the last time {last}") from error
        wait = min(30.0, settings.wait_seconds * 2 ** (attempt - 1))
        time.sleep(wait * random.Random(f"{settings.seed} {place} {salt} {attempt}").uniform(0.5, 1.0))
    raise AssertionError("attempts is at least 1")


def is_transient(error: BaseException) -> bool:
    """Whether the same read may go well a moment later."""
    status = _http_status(error)
    if status is not None:
        # S3 calls a slow request 400, and aiohttp an answer that is not HTTP.
        return status >= 500 or status in (400, 408, 425, 429)
    # ELOOP: a symbolic link where a file should be.
    return not isinstance(error, _LASTING) and getattr(error, "errno", None) not in (errno.ELOOP, errno.ENAMETOOLONG)


def _permanent(error: BaseException, place: str) -> OSError:
    status = _http_status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "not there", place)
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
    """fsspec's HTTP calls a file whose size it did not learn 'not found', whatever the reason: the reason."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return error.__cause__
    return error
