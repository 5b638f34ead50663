"""Object storage and web servers through fsspec: range reads with a cache of blocks on the node's disk.

Files are taken to be written once: a file that was replaced is noticed when a process opens it, not while it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from common.errors import UserError
from data.storage.block_cache import BlockCache
from data.storage.local import SMALL_FILE, CutShort, StorageError, StorageSettings, check_name, check_small, retry

# Package of each kind of URL; '' needs none. Others (fsspec's caches, archives, local files) are not what we mean.
_PACKAGES = {
    "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
    "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "memory": "",
}  # fmt: skip
# What tells one version of a file from the next, in the words of the back ends.
_VERSION_FIELDS = ("size", "ETag", "etag", "Last-Modified", "LastModified", "last_modified", "generation", "created")
# Adjacent missing blocks are fetched together, up to this.
_MOST_BYTES = 2**24


class WrongRange(OSError):
    """A web server answered a range request with other bytes."""


class RemoteStorage:
    """The files below a URL. Raises UserError for a URL that it cannot mean, or whose package is missing."""

    def __init__(self, location: str, settings: StorageSettings) -> None:
        self.location, self.settings = location.rstrip("/"), settings
        self._protocol = _checked_protocol(self.location)
        self._block = int(settings.block_mb * 2**20)
        self._cache = BlockCache(settings.cache_folder(), int(settings.cache_gb * 1e9))
        self._opened: dict[int, Any] = {}  # by process: see _file_system
        self._known: dict[str, tuple[int, str]] = {}
        self._file_system()  # a missing package is told now

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self.location, self.settings)

    def read_into(self, name: str, position: int, out: memoryview) -> None:
        size, version = self._info(name)
        end = position + len(out)
        if end > size:
            raise CutShort(f"{self._url(name)} has {size} bytes, it ends before byte {end}")
        if not self._cache.limit:
            out[:] = self._fetch(name, position, end)
            return
        missing: list[int] = []
        for number in range(position // self._block, -(-end // self._block)):
            if self._from_cache(version, size, number, position, out):
                continue
            if missing and (number != missing[-1] + 1 or len(missing) * self._block >= _MOST_BYTES):
                self._fetch_blocks(name, missing, position, out)
                missing = []
            missing.append(number)
        if missing:
            self._fetch_blocks(name, missing, position, out)

    def size(self, name: str) -> int | None:
        try:
            return self._info(name)[0]
        except FileNotFoundError:
            return None

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        size = self.size(name)
        check_small(self._url(name), size, limit)
        return self._fetch(name, 0, size) if size else b""

    def local_copy(self, name: str) -> Path:
        size, version = self._info(name)

        def download(file: BinaryIO) -> None:
            # The first byte apart: a server without ranges gives a whole file just as well, and would fail at the
            # first crop, minutes later.
            for start in (0, *range(1, size, _MOST_BYTES)):
                file.write(self._fetch(name, start, min(size, start + _MOST_BYTES if start else 1)))

        return self._cache.copy(_hash(self._url(name)), version, name, size, download)

    def forget(self, name: str, position: int, length: int) -> None:
        _, version = self._info(name)
        for number in range(position // self._block, -(-(position + length) // self._block)):
            self._cache.forget(version, number)

    def _url(self, name: str) -> str:
        return f"{self.location}/{check_name(name)}"

    def _info(self, name: str) -> tuple[int, str]:
        """Bytes of a file and a key of its content; asked for once a process. Raises OSError."""
        if name not in self._known:
            url = self._url(name)
            found = retry(lambda: self._call("info", url), url, self.settings)
            if found.get("type") == "directory":
                raise IsADirectoryError(f"{url} is a folder")
            if not isinstance(found.get("size"), int):
                raise StorageError(f"{url}: the server does not tell the file's size; use one that does")
            version = [str(found.get(field)) for field in _VERSION_FIELDS]
            self._known[name] = found["size"], _hash(url, str(self._block), *version)
        return self._known[name]

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end), from the storage itself."""
        url = self._url(name)

        def once() -> bytes:
            data = self._call("cat_file", url, start=start, end=end)
            if len(data) != end - start:
                raise WrongRange(f"{len(data)} bytes came of the {end - start} asked for at {start}")
            return data

        return retry(once, url, self.settings, start)

    def _fetch_blocks(self, name: str, numbers: list[int], position: int, out: memoryview) -> None:
        """Fetch adjacent blocks, keep them, and fill what they have of `out`, which begins at byte `position`."""
        size, version = self._info(name)
        begin, end = numbers[0] * self._block, min(size, (numbers[-1] + 1) * self._block)
        data = memoryview(self._fetch(name, begin, end))
        first, last = max(begin, position), min(end, position + len(out))
        out[first - position : last - position] = data[first - begin : last - begin]
        for number in numbers:
            at = number * self._block - begin
            try:
                self._cache.add(version, number, data[at : at + self._block])
            except OSError as error:  # a full disk makes reading slower, not wrong
                warnings.warn(f"storage.cache_dir: blocks cannot be kept: {error}", RuntimeWarning, stacklevel=2)

    def _from_cache(self, version: str, size: int, number: int, position: int, out: memoryview) -> bool:
        begin = number * self._block
        end = min(size, begin + self._block)
        first, last = max(begin, position), min(end, position + len(out))
        part = out[first - position : last - position]
        with contextlib.suppress(OSError):  # a broken cache is an empty cache
            return self._cache.read_into(version, number, end - begin, first - begin, part)
        return False

    def _call(self, method: str, url: str, **arguments: Any) -> Any:
        system = self._file_system()
        if getattr(system, "async_impl", False):
            arguments["timeout"] = self.settings.timeout_seconds
        return getattr(system, method)(url, **arguments)

    def _file_system(self) -> Any:
        """This process's own: the event loop and the connections behind it do not survive a fork.

        The parent's is kept, for closing it would wait for a loop that does not run here.
        """
        process = os.getpid()
        if process not in self._opened:
            self._opened[process] = self._connect()
        return self._opened[process]

    def _connect(self) -> Any:
        arguments: dict[str, Any] = {}
        if self._protocol in ("http", "https"):
            headers = {"Accept-Encoding": "identity"}  # a packed answer has another length
            arguments["client_kwargs"] = {"raise_for_status": check_range, "headers": headers}
        try:
            return fsspec.filesystem(self._protocol, skip_instance_cache=True, **arguments)
        except ImportError as error:
            package = _PACKAGES[self._protocol]
            raise UserError(f"{self.location}: {self._protocol}:// needs {package}: pip install {package}") from error


async def check_range(response: Any) -> None:
    """Refuse an answer (aiohttp) to a range request that holds other bytes, before its body is read: WrongRange.

    A server that ignores ranges would send a whole shard.
    """
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request_info.headers.get("Range", ""))
    if asked is None or response.status >= 400:
        return
    start, last = int(asked[1]), int(asked[2])
    length = response.content_length
    if response.status == 200 and start == 0 and length == last + 1:
        return  # the whole file is what was asked for
    if response.status != 206:
        raise WrongRange(f"answer {response.status} to a range request; the server must support ranges (206)")
    given = re.match(r"bytes (\d+)-(\d+)/", response.headers.get("Content-Range", ""))
    if given is None or int(given[1]) != start or int(given[2]) > last or (length or 0) > last + 1 - start:
        said = response.headers.get("Content-Range")
        raise WrongRange(f"the server sent range {said!r} ({length} bytes) where {start}-{last} was asked for")


def _checked_protocol(location: str) -> str:
    protocol, _, rest = location.partition("://")
    if protocol not in _PACKAGES:
        raise UserError(f"URLs of the kind {protocol!r} are not read; there are {', '.join(_PACKAGES)}")
    if re.search(r"[\s?#%]|::", rest) or "@" in rest.partition("/")[0]:
        # They would end up in logs; every back end takes credentials from its own configuration.
        raise UserError(f"a {protocol} URL must have no user, password, query or escapes; see docs/storage.md")
    return protocol


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
