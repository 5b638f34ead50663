"""Whole files of a remote store (the Hugging Face hub, or any that fsspec knows) as local ones, while they are needed.

A file is fetched once for all processes that share the cache folder, in ranges that are retried one by one, and takes
its name when it is complete. With a limit, the files that were used longest ago make room.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import fsspec
import pyarrow as pa

from common.errors import UserError
from data.storage.local import StorageSettings, retry

RANGE_BYTES = 16 << 20
RETRIES = StorageSettings()
_T = TypeVar("_T")


@dataclass(frozen=True)
class FileCache:
    """Where fetched files are kept, and how much of them."""

    folder: str
    """Made where it is missing."""
    limit: int = 0
    """Bytes that fetched files may take together, or 0 for no limit; the newest one is kept whatever its size."""

    def open(self, address: str) -> pa.NativeFile:
        """The file at a local path or a fetched copy, open for reading (and readable even when it must make room).

        Raises UserError naming the address: no such file, no permission, or unreachable after several attempts.
        """
        if "://" not in address:
            try:
                return pa.OSFile(address)
            except OSError as error:
                raise UserError(f"{address}: cannot be read ({error})") from error
        folder = Path(self.folder).expanduser()
        path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{address.rsplit('/', 1)[-1][-100:]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{path.name}.lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    temporary = path.with_name(path.name + ".part")
                    _fetch(address, temporary)
                    os.replace(temporary, path)
                    self._make_room(path)
                os.utime(path)
                return pa.OSFile(str(path))
        except OSError as error:
            raise UserError(f"{folder}: the cache cannot be written ({error}): choose another folder") from error

    def _make_room(self, newest: Path) -> None:
        if not self.limit:
            return
        copies = [path for path in newest.parent.iterdir() if path.suffix not in (".lock", ".part")]
        ages = sorted((path.stat().st_mtime, path) for path in copies if path != newest)
        total = sum(path.stat().st_size for path in copies)
        for _, path in ages:
            if total <= self.limit:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


def _fetch(address: str, path: Path) -> None:
    """Write the file at the address to a path, continuing what an earlier process left of it."""
    store, name = fsspec.core.url_to_fs(address)
    size = retried(lambda: store.size(name), address)
    if size is None:
        raise UserError(f"{address}: the store does not tell the file's size; download it and give the local folder")
    with open(path, "ab") as file:
        if file.tell() > size:
            file.truncate(0)
        while (begin := file.tell()) < size:
            end = min(begin + RANGE_BYTES, size)
            file.write(retried(lambda begin=begin, end=end: _range(store, name, begin, end), address))  # type: ignore[misc]


def _range(store: fsspec.AbstractFileSystem, name: str, begin: int, end: int) -> bytes:
    data = store.cat_file(name, start=begin, end=end)
    if len(data) != end - begin:
        raise EOFError(f"{len(data)} of {end - begin} bytes came")
    return data


def retried(action: Callable[[], _T], address: str) -> _T:
    """What the action gives, tried again after growing waits where a network fails.

    Raises UserError naming the address: at once where trying again is no use (missing, not allowed), else at last.
    """
    try:
        return retry(lambda: _told(action), address, RETRIES)
    except PermissionError as error:
        raise UserError(
            f"{address}: access is refused ({error}). If the dataset is gated, accept its terms on its page, then log "
            "in with `hf auth login` or set HF_TOKEN"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{address}: there is no such file, or nobody may see it without logging in") from error
    except OSError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # what came is wrong: no matter of the network
        raise UserError(
            f"{error}. Check the network, then run the same command again; or download the dataset and give its folder"
        ) from error


def _told(action: Callable[[], _T]) -> _T:
    """The hub's errors carry the status of its answer in a place of their own."""
    try:
        return action()
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(str(error)) from error
        if status == 404:
            raise FileNotFoundError(str(error)) from error
        raise
