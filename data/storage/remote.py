"""Object storage and web servers through fsspec: range reads with a cache of blocks on the node's disk.

Files are assumed to be written once: a replaced file is detected when a process opens it, not while it reads.
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
from data.storage.local import SMALL_FILE, StorageError, StorageSettings, TruncatedFile, check_name, check_small, retry

# Package for each kind of URL, or ''. Other kinds that fsspec supports (caches, archives, local files) are rejected.
_PACKAGES = {
    "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
    "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "memory": "",
}  # fmt: skip
# Fields that identify the version of a file, as the back ends name them.
_VERSION_FIELDS = ("size", "ETag", "etag", "Last-Modified", "LastModified", "last_modified", "generation", "created")
# Maximum size of a request; adjacent missing blocks are fetched together.
_MAX_REQUEST = 2**24


class WrongRange(OSError):
    """Response of a web server that is not the requested range."""


class RemoteStorage:
    """Files below a URL. Raises UserError for an unsupported URL, or if its package is missing."""

    def __init__(self, location: str, settings: StorageSettings) -> None:
        self.location, self.settings = location.rstrip("/"), settings
        self._protocol = _checked_protocol(self.location)
        self._block = int(settings.block_mb * 2**20)
        self._cache = BlockCache(settings.cache_folder(), int(settings.cache_gb * 1e9))
        self._file_systems: dict[int, Any] = {}  # by process id
        self._files: dict[str, tuple[int, str]] = {}
        self._file_system()  # raises if a package is missing

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self.location, self.settings)

    def read_into(self, name: str, position: int, out: memoryview) -> None:
        size, version = self._info(name)
        end = position + len(out)
        if end > size:
            raise TruncatedFile(f"{self._url(name)} ends before byte {end}: it has {size} bytes")
        if not self._cache.limit:
            out[:] = self._fetch(name, position, end)
            return
        missing: list[int] = []
        for number in range(position // self._block, -(-end // self._block)):
            if self._from_cache(version, size, number, position, out):
                continue
            if missing and (number != missing[-1] + 1 or len(missing) * self._block >= _MAX_REQUEST):
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
            # The first byte is requested separately, so that a server without range support fails now, not minutes
            # later at the first crop.
            for start in (0, *range(1, size, _MAX_REQUEST)):
                file.write(self._fetch(name, start, min(size, start + _MAX_REQUEST if start else 1)))

        return self._cache.copy(_hash(self._url(name)), version, name, size, download)

    def forget(self, name: str, position: int, length: int) -> None:
        _, version = self._info(name)
        for number in range(position // self._block, -(-(position + length) // self._block)):
            self._cache.forget(version, number)

    def _url(self, name: str) -> str:
        return f"{self.location}/{check_name(name)}"

    def _info(self, name: str) -> tuple[int, str]:
        """Size of a file in bytes, and a key of its content; requested once per process. Raises OSError."""
        if name not in self._files:
            url = self._url(name)
            info = retry(lambda: self._call("info", url), url, self.settings)
            if info.get("type") == "directory":
                raise IsADirectoryError(f"{url} is a folder")
            if not isinstance(info.get("size"), int):
                raise StorageError(f"{url}: the server does not send the size of the file; use one that does")
            version = [str(info.get(field)) for field in _VERSION_FIELDS]
            self._files[name] = info["size"], _hash(url, str(self._block), *version)
        return self._files[name]

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end), bypassing the cache."""
        url = self._url(name)

        def request() -> bytes:
            data = self._call("cat_file", url, start=start, end=end)
            if len(data) != end - start:
                raise WrongRange(f"received {len(data)} of the {end - start} bytes requested at {start}")
            return data

        return retry(request, url, self.settings, start)

    def _fetch_blocks(self, name: str, numbers: list[int], position: int, out: memoryview) -> None:
        """Fetch adjacent blocks, cache them, and fill their part of `out`, which starts at byte `position`."""
        size, version = self._info(name)
        start, end = numbers[0] * self._block, min(size, (numbers[-1] + 1) * self._block)
        data = memoryview(self._fetch(name, start, end))
        first, last = max(start, position), min(end, position + len(out))
        out[first - position : last - position] = data[first - start : last - start]
        for number in numbers:
            offset = number * self._block - start
            try:
                self._cache.add(version, number, data[offset : offset + self._block])
            except OSError as error:  # a full disk makes reading slower, not wrong
                warnings.warn(f"storage.cache_dir: cannot cache blocks: {error}", RuntimeWarning, stacklevel=2)

    def _from_cache(self, version: str, size: int, number: int, position: int, out: memoryview) -> bool:
        start = number * self._block
        end = min(size, start + self._block)
        first, last = max(start, position), min(end, position + len(out))
        part = out[first - position : last - position]
        with contextlib.suppress(OSError):  # a broken cache counts as empty
            return self._cache.read_into(version, number, end - start, first - start, part)
        return False

    def _call(self, method: str, url: str, **arguments: Any) -> Any:
        system = self._file_system()
        if getattr(system, "async_impl", False):
            arguments["timeout"] = self.settings.timeout_seconds
        return getattr(system, method)(url, **arguments)

    def _file_system(self) -> Any:
        """File system of this process: its event loop and connections do not survive a fork.

        The parent's is kept open, because closing it would wait for a loop that does not run in this process.
        """
        process = os.getpid()
        if process not in self._file_systems:
            self._file_systems[process] = self._connect()
        return self._file_systems[process]

    def _connect(self) -> Any:
        arguments: dict[str, Any] = {}
        if self._protocol in ("http", "https"):
            headers = {"Accept-Encoding": "identity"}  # a compressed response has another length
            arguments["client_kwargs"] = {"raise_for_status": check_range, "headers": headers}
        try:
            return fsspec.filesystem(self._protocol, skip_instance_cache=True, **arguments)
        except ImportError as error:
            package = _PACKAGES[self._protocol]
            raise UserError(f"{self.location}: {self._protocol}:// needs {package}: pip install {package}") from error


async def check_range(response: Any) -> None:
    """Raise WrongRange for a response (aiohttp) that is not the requested range, before its body is read.

    A server without range support would send a whole shard.
    """
    requested = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request_info.headers.get("Range", ""))
    if requested is None or response.status >= 400:
        return
    start, last = int(requested[1]), int(requested[2])
    length = response.content_length
    if response.status == 200 and start == 0 and length == last + 1:
        return  # the requested range is the whole file
    if response.status != 206:
        raise WrongRange(f"status {response.status} for a range request; the server must support ranges (206)")
    sent = re.match(r"bytes (\d+)-(\d+)/", response.headers.get("Content-Range", ""))
    if sent is None or int(sent[1]) != start or int(sent[2]) > last or (length or 0) > last + 1 - start:
        header = response.headers.get("Content-Range")
        raise WrongRange(f"the server sent range {header!r} ({length} bytes), expected {start}-{last}")


def _checked_protocol(location: str) -> str:
    protocol, _, rest = location.partition("://")
    if protocol not in _PACKAGES:
        raise UserError(f"URLs of the kind {protocol!r} are not supported; expected one of {', '.join(_PACKAGES)}")
    if re.search(r"[\s?#%]|::", rest) or "@" in rest.partition("/")[0]:
        # Credentials would appear in logs; every back end reads them from its own configuration.
        raise UserError(f"a {protocol} URL must have no user, password, query or escapes; see docs/storage.md")
    return protocol


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
