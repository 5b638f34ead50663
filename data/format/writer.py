"""Writer of datasets: appends recordings to shards; a finished shard is never lost or rewritten.

After any interruption (Ctrl-C, full disk, SIGKILL), a new DatasetWriter on the same folder continues after the last
finished shard. Several machines may write one part each of a dataset into the same folder. `finish()` of the last part
makes the folder a dataset; its content and fingerprint depend neither on the number of parts nor on interruptions.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.files import read_json_object, write_json
from data.features import FeatureSettings, difference
from data.format.dataset import mean_and_std
from data.format.encoding import checksums, encode_recording
from data.format.index_writer import format_fields, metadata_row, read_rows, write_dataset, write_rows
from data.format.schema import (
    DATASET_FILE,
    PREPARING_FILE,
    Encoding,
    check_version,
    parse_features,
    shard_name,
    tensor_entry,
)
from data.recording import Recording

MAX_SHARD_BYTES = 2_000_000_000


class DatasetWriter:
    """Writer of a dataset folder; continues an interrupted preparation.

        with DatasetWriter(folder, settings) as writer:   # on exit, also by an error, added recordings are kept
            writer.add(Recording("a"), log_mel)           # skip ids in writer.done_ids
            writer.finish()                               # makes the folder a dataset

    Memory is bounded: values are written immediately, index rows when a shard is full.

    Args:
        path: folder of the dataset; created if missing.
        feature_settings: settings of the log-mel.
        max_shard_bytes: maximum size of a shard; a larger recording gets a separate shard.
        part, parts: number of this writer (from 0) and of all writers, which must agree. Its shards have the numbers
            part, part + parts, part + 2 parts, ...
        name: name of the dataset in reports.
        encoding: "plain", or a compressed encoding of `data.format.encoding`.
    Raises:
        UserError: the folder was started with other features or parts, another process writes this part, or the disk is
            full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        feature_settings: FeatureSettings,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        part: int = 0,
        parts: int = 1,
        name: str = "",
        encoding: Encoding = "plain",
    ) -> None:
        if not 0 <= part < parts:
            raise UserError(f"part is {part} of {parts}: must be from 0 to {parts - 1}")
        if max_shard_bytes <= 0:
            raise UserError(f"max_shard_bytes is {max_shard_bytes}: must be positive")
        self.path = Path(path)
        self.features = feature_settings
        self.max_shard_bytes = max_shard_bytes
        self.part, self.parts, self.name, self.encoding = part, parts, name, encoding
        # Space for the header before the values, so that a shard is written in one pass.
        self.header_bytes = max(1 << 16, max_shard_bytes >> 10) // 8 * 8
        self.rows: list[dict[str, Any]] = []
        self.file: int | None = None
        self.done_ids: set[str] = set()  # of this part
        with self._disk_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._start()

    @property
    def finished(self) -> bool:
        """True if the folder is a complete dataset, which accepts no more recordings."""
        return (self.path / DATASET_FILE).is_file()

    def add(self, recording: Recording, log_mel: np.ndarray | Tensor) -> None:
        """Append a recording. log_mel: float [frames, M]. Raises UserError for a repeated id or invalid values."""
        if self.finished:
            raise UserError(f"{self.path} is a finished dataset: choose another folder, or delete this one")
        if recording.id in self.done_ids:
            raise UserError(f"recording id {recording.id!r} was added twice; ids must be unique in a dataset")
        metadata = metadata_row(recording)  # raises before anything is written
        values = np.ascontiguousarray(np.asarray(log_mel), dtype=np.float16)
        if values.ndim != 2 or values.shape[1] != self.features.num_mels or not len(values):
            raise UserError(
                f"recording {recording.id!r}: log-mel of shape {list(values.shape)}, "
                f"expected [frames, {self.features.num_mels}] with at least one frame"
            )
        if not np.isfinite(mean_and_std(values)[1]).all():
            raise UserError(f"recording {recording.id!r}: log-mel with NaN or infinite values")
        values, data, block_bytes = encode_recording(values, self.encoding)
        mean, std = mean_and_std(values)
        entry = tensor_entry(self.encoding, len(values), values.shape[1], 1 << 40, len(data))
        header_bytes = len(json.dumps({recording.id: entry}))
        with self._disk_errors():
            if self.rows and (
                self.data_bytes + len(data) > self.max_shard_bytes
                or self.header_used + header_bytes > self.header_bytes - 256
            ):
                self.close()
            if self.file is None:
                self._open_shard()
            offset = self.header_bytes + self.data_bytes
            _write_all(self.file, data, offset)
        self.data_bytes += len(data)
        self.header_used += header_bytes
        self.done_ids.add(recording.id)
        row = metadata | {
            "shard": self.shard,
            "offset": offset,
            "bytes": len(data),
            "frames": len(values),
            "block_bytes": block_bytes,
            "crc32": checksums(values),
            "mean": mean,
            "std": std,
        }
        self.rows.append(row)

    def close(self) -> None:
        """Finish the open shard, which makes its recordings durable. Safe to call at any time."""
        with self._disk_errors():
            self._finish_shard()

    def finish(self) -> bool:
        """Close the last shard. The last part to finish merges all parts, which makes the folder a dataset.

        Returns True if the folder is now a dataset; with several parts, only the last one returns True. Raises
        UserError if the parts contain a recording twice, or no recordings.
        """
        if self.finished:
            return True
        self.close()
        with self._disk_errors():
            write_json(self._finished_part(self.part), {"recordings": len(self.done_ids)})
            if self.missing_parts():
                return False
            # A file is locked because shared file systems do not propagate locks of folders to other machines.
            with locked(self.path / "part-merge.lock", wait=True):
                if not self.finished:  # else another part merged meanwhile
                    self._merge()
                self._remove_leftovers()
        self._unlock()
        return True

    def missing_parts(self) -> list[int]:
        """Numbers of the unfinished parts."""
        if self.finished:
            return []
        return [part for part in range(self.parts) if not self._finished_part(part).is_file()]

    def _finished_part(self, part: int) -> Path:
        """File that marks a part as finished and holds its number of recordings."""
        return self.path / f"part-{part:05d}.json"

    def _merge(self) -> None:
        try:
            # Counted before the rows are listed, so that rows that disappear in between are detected.
            counts = [read_json_object(self._finished_part(part)).get("recordings", 0) for part in range(self.parts)]
            indexes = sorted(self.path.glob("rows-*.arrow"))
            if not sum(counts):
                self._finished_part(self.part).unlink()
                raise UserError(f"{self.path}: no recordings were added; a dataset needs at least one")
            write_dataset(self.path, indexes, self.features, self.encoding, self.name, len(indexes), sum(counts))
        except (UserError, OSError):
            if not self.finished:  # else another machine merged first, on a file system without locks
                raise

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        finally:
            self._unlock()

    def _start(self) -> None:
        """Lock this part of the folder, and find the recordings that are already written."""
        locks = contextlib.ExitStack()
        locks.enter_context(locked(self.path / f"part-{self.part:05d}.lock"))
        self._unlock = weakref.finalize(self, locks.close)
        self.shard = self.part
        shards = any(self.path.glob("shard-*"))  # listed first: another part may be starting the dataset
        existing = [path for name in (DATASET_FILE, PREPARING_FILE) if (path := self.path / name).is_file()]
        for path in existing:
            self._check_fields(read_json_object(path), path)
        if self.finished:
            self._remove_leftovers()
            return
        if not existing and shards:
            raise UserError(
                f"{self.path} contains shards but neither {PREPARING_FILE} nor {DATASET_FILE}; choose a new folder"
            )
        if not existing:
            write_json(self.path / PREPARING_FILE, {**format_fields(self.features, self.encoding), "parts": self.parts})
        for index in self.path.glob("rows-*.arrow"):
            number = int(index.stem.removeprefix("rows-"))
            if number % self.parts == self.part:
                self.done_ids.update(read_rows(index, self.features.num_mels)["id"].to_pylist())
                # A shard whose rows were not written before an interruption is rewritten under the same name.
                self.shard = max(self.shard, number + self.parts)

    def _check_fields(self, fields: dict[str, Any], path: Path) -> None:
        """Raise UserError if the folder was started with other features, another encoding or other parts."""
        check_version(fields, path)
        existing = parse_features(fields, path)
        if existing != self.features:
            raise UserError(
                f"{self.path} was started with other features: {'; '.join(difference(existing, self.features))} "
                "(existing != requested). Use the same features or another folder"
            )
        if fields.get("layout") != self.encoding:
            raise UserError(
                f"{self.path} was started with the layout {fields.get('layout')!r}, not {self.encoding!r}: use the "
                "same layout, or choose another folder"
            )
        if fields.get("parts", self.parts) != self.parts:
            raise UserError(
                f"{self.path} was started in {fields['parts']} parts, not {self.parts}: use the same number, or choose "
                "another folder"
            )

    def _temporary(self) -> Path:
        return self.path / f"{shard_name(self.shard)}.tmp"

    def _open_shard(self) -> None:
        self.file = os.open(self._temporary(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.data_bytes = self.header_used = 0
        # Written, not left as a hole in the file: the header must still fit if the disk fills up later.
        _write_all(self.file, np.full(self.header_bytes, ord(" "), np.uint8), 0)

    def _finish_shard(self) -> None:
        if self.file is None:
            return
        if self.rows:
            header = self._shard_header()
            os.ftruncate(self.file, self.header_bytes + self.data_bytes)
            _write_all(self.file, np.frombuffer(header, np.uint8), 0)
            os.fsync(self.file)
            os.replace(self._temporary(), self.path / shard_name(self.shard))
            # The shard is durable once its rows are written, which happens after it and atomically.
            write_rows(self.path / f"rows-{self.shard:05d}.arrow", self.rows, self.features.num_mels)
            self.rows = []
            self.shard += self.parts
        self._drop_shard()

    def _shard_header(self) -> bytes:
        """Header of a safetensors file, padded with spaces (as the format allows) to `header_bytes`."""
        size, width = self.header_bytes, self.features.num_mels
        tensors = {
            row["id"]: tensor_entry(self.encoding, row["frames"], width, row["offset"] - size, row["bytes"])
            for row in self.rows
        }
        header = {"__metadata__": {"feature_hash": self.features.hash()}, **tensors}
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= size - 8, "the header exceeds its reserved space"
        return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)

    def _drop_shard(self) -> None:
        """Discard the open shard and its recordings."""
        if self.file is not None:
            os.close(self.file)
            self.file = None
            self._temporary().unlink(missing_ok=True)
        self.done_ids.difference_update(row["id"] for row in self.rows)
        self.rows = []

    def _remove_leftovers(self) -> None:
        for pattern in ("rows-*.arrow", "part-*", "*.tmp", ".tmp-*", PREPARING_FILE):
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Convert an OSError to a UserError, and keep the recordings that are already on disk."""
        try:
            yield
        except OSError as error:
            # Truncating the incomplete recording frees the space that finishing the shard needs.
            with contextlib.suppress(OSError):
                self._finish_shard()
            self._drop_shard()
            disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            free = shutil.disk_usage(self.path).free >> 20 if self.path.is_dir() else 0
            fix = f"Free some space ({free} MiB are left)" if disk_full else "Correct this"
            raise UserError(
                f"{self.path}: {'the disk is full' if disk_full else 'writing failed'} ({error}); "
                f"{len(self.done_ids)} recordings are written and kept. {fix} and run the same command again"
            ) from error


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file (created if missing) or of a folder. Raises UserError if another process holds it."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    lock = os.open(path, flags, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is writing this dataset; wait for it or stop it") from error
        except OSError:
            pass  # file system without locks: the folder is not protected from concurrent writers
        yield
    finally:
        os.close(lock)


def _write_all(file: int | None, values: np.ndarray, offset: int) -> None:
    assert file is not None
    view = memoryview(values)  # type: ignore[arg-type]
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
