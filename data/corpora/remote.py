"""Local cache of the files of a remote store: the Hugging Face hub, or any store that fsspec supports.

A file is downloaded once for all processes that share the cache folder, in ranges that are retried separately, and is
renamed when it is complete. With a size limit, the least recently used files are removed.
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
    """Folder of downloaded files, with a limit of their total size."""

    folder: str
    """Created if it is missing."""
    limit: int = 0
    """Total bytes of downloaded files, or 0 for no limit; the newest file is kept regardless of its size."""

    def open(self, address: str) -> pa.NativeFile:
        """Open a local path or a downloaded copy, which stays readable after it is removed from the cache.

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
                    _download(address, temporary)
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


def _download(address: str, path: Path) -> None:
    """Write the file at the address to a path, or complete a partial copy."""
    store, name = fsspec.core.url_to_fs(address)
    size = retried(lambda: store.size(name), address)
    if size is None:
        raise UserError(f"{address}: the store reports no file size; download the file and give the local folder")
    with open(path, "ab") as file:
        if file.tell() > size:
            file.truncate(0)
        while (start := file.tell()) < size:
            stop = min(start + RANGE_BYTES, size)
            file.write(retried(lambda start=start, stop=stop: _range(store, name, start, stop), address))  # type: ignore[misc]


def _range(store: fsspec.AbstractFileSystem, name: str, start: int, stop: int) -> bytes:
    data = store.cat_file(name, start=start, end=stop)
    if len(data) != stop - start:
        raise EOFError(f"received {len(data)} of {stop - start} bytes")
    return data


def retried(action: Callable[[], _T], address: str) -> _T:
    """Result of the action, retried after increasing waits if the network fails.

    Raises UserError naming the address: immediately for a missing or forbidden file, otherwise after the last attempt.
    """
    try:
        return retry(lambda: _with_status(action), address, RETRIES)
    except PermissionError as error:
        raise UserError(
            f"{address}: access denied ({error}). If the dataset is gated, accept its terms on its page, then log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{address}: no such file, or it is visible only after logging in") from error
    except OSError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # invalid data, which another attempt would not change
        raise UserError(
            f"{error}. Check the network, then run the same command again; or download the dataset and give its folder"
        ) from error


def _with_status(action: Callable[[], _T]) -> _T:
    """Run the action, with PermissionError or FileNotFoundError for the HTTP status in errors of the hub."""
    try:
        return action()
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(str(error)) from error
        if status == 404:
            raise FileNotFoundError(str(error)) from error
        raise
