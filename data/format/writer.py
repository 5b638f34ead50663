"""Writing a dataset: recordings are appended to shards; a finished shard is never lost and never written again.

Whatever stops a preparation (Ctrl-C, a full disk, SIGKILL), a new DatasetWriter on the same folder continues after the
last finished shard. Several machines may each write a part of one dataset into the same folder. Only `finish()` of the
last part makes the folder a dataset, and its content and fingerprint do not depend on the parts, nor on how often the
preparation was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
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
from data.format import index as ix
from data.format.encoding import shard_header, stored
from data.format.index import Recording
from data.format.index_merge import read_rows, write_dataset, write_rows

MAX_SHARD_BYTES = 2_000_000_000


class DatasetWriter:
    """Write recordings to a dataset folder, or continue a preparation that was interrupted.

        with DatasetWriter(folder, settings) as writer:   # leaving the block, even by an error, keeps what was added
            writer.add(Recording("a"), log_mel)           # skip ids in writer.done_ids
            writer.finish()                               # makes the folder a dataset

    Memory stays bounded: values go to the disk at once, index rows when a shard is full.

    Args:
        path: the dataset's folder, made where it is missing.
        feature_settings: what the log-mel were computed with.
        max_shard_bytes: a shard is closed before it would grow beyond this (one longer recording fills one alone).
        part, parts: which of several writers this is, from 0; all give the same `parts`. Their shards have the numbers
            part, part + parts, part + 2 parts, ...
        name: what the dataset is called in reports.
        layout: how values are stored: "plain", or compressed, see `data.compression`.
    Raises:
        UserError: the folder was begun with other features or parts, another process is writing this part, or the disk
            is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        feature_settings: FeatureSettings,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        part: int = 0,
        parts: int = 1,
        name: str = "",
        layout: ix.Layout = "plain",
    ) -> None:
        if not 0 <= part < parts:
            raise UserError(f"part is {part} of {parts}: must be from 0 to {parts - 1}")
        if max_shard_bytes <= 0:
            raise UserError(f"max_shard_bytes is {max_shard_bytes}: must be positive")
        self.path = Path(path)
        self.features = feature_settings
        self.max_shard_bytes = max_shard_bytes
        self.part, self.parts, self.name, self.layout = part, parts, name, layout
        # Room for the header in front of the values, so that a shard is written once, in one pass.
        self.header_bytes = max(1 << 16, max_shard_bytes >> 10) // 8 * 8
        self.rows: list[dict[str, Any]] = []
        self.file: int | None = None
        self.done_ids: set[str] = set()  # of this part
        with self._disk_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._begin()

    @property
    def finished(self) -> bool:
        """The folder is a complete dataset: nothing can be added to it."""
        return (self.path / ix.DATASET_FILE).is_file()

    def add(self, recording: Recording, log_mel: np.ndarray | Tensor) -> None:
        """Append a recording. log_mel: float [frames, M]. Raises UserError for a repeated id or bad values."""
        if self.finished:
            raise UserError(f"{self.path} is a finished dataset: choose another folder, or delete this one")
        if recording.id in self.done_ids:
            raise UserError(f"recording id {recording.id!r} was added twice; ids must be unique in a dataset")
        described = ix.described(recording)  # before anything is written: it may not be storable
        values = np.ascontiguousarray(np.asarray(log_mel), dtype=np.float16)
        if values.ndim != 2 or values.shape[1] != self.features.num_mels or not len(values):
            raise UserError(
                f"recording {recording.id!r}: log-mel of shape {list(values.shape)}, "
                f"expected [frames, {self.features.num_mels}] with at least one frame"
            )
        if not np.isfinite(ix.statistics(values)[1]).all():
            raise UserError(f"recording {recording.id!r}: log-mel with NaN or infinite values")
        values, data, block_bytes = stored(values, self.layout)
        mean, std = ix.statistics(values)
        entry = ix.tensor_entry(self.layout, len(values), values.shape[1], 1 << 40, len(data))
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
        row = described | {
            "shard": self.shard,
            "offset": offset,
            "bytes": len(data),
            "frames": len(values),
            "block_bytes": block_bytes,
            "crc32": ix.checksums(values),
            "mean": mean,
            "std": std,
        }
        self.rows.append(row)

    def close(self) -> None:
        """Finish the shard that is open, so that its recordings survive whatever comes. Safe to call at any time."""
        with self._disk_errors():
            self._finish_shard()

    def finish(self) -> bool:
        """Close the last shard; the last part to come here merges all of them, and the folder is a dataset.

        Returns whether it is one now: with several parts, False for all but the last. Raises UserError where the parts
        hold a recording twice, or none at all.
        """
        if self.finished:
            return True
        self.close()
        with self._disk_errors():
            write_json(self._finished_part(self.part), {"recordings": len(self.done_ids)})
            if self.missing_parts():
                return False
            # A file of its own: a shared file system tells other machines of locks on files, not on folders.
            with ix.locked(self.path / "part-merge.lock", wait=True):
                if not self.finished:  # else another part was here at the same time
                    self._merge()
                self._remove_leftovers()
        self._unlock()
        return True

    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are not finished yet."""
        if self.finished:
            return []
        return [part for part in range(self.parts) if not self._finished_part(part).is_file()]

    def _finished_part(self, part: int) -> Path:
        """The file that tells that a part is finished, and how many recordings it has."""
        return self.path / f"part-{part:05d}.json"

    def _merge(self) -> None:
        try:
            # Counted before the rows are listed, so that rows which vanish from here on are missed.
            counts = [read_json_object(self._finished_part(part)).get("recordings", 0) for part in range(self.parts)]
            indexes = sorted(self.path.glob("rows-*.arrow"))
            if not sum(counts):
                self._finished_part(self.part).unlink()
                raise UserError(f"{self.path}: no recording was added, there is nothing to finish")
            write_dataset(self.path, indexes, self.features, self.layout, self.name, len(indexes), sum(counts))
        except (UserError, OSError):
            if not self.finished:  # else another machine was quicker, where locks do not reach it
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

    def _begin(self) -> None:
        """Take this part of the folder for this process, and see what is there already."""
        held = contextlib.ExitStack()
        held.enter_context(ix.locked(self.path / f"part-{self.part:05d}.lock"))
        self._unlock = weakref.finalize(self, held.close)
        self.shard = self.part
        shards = any(self.path.glob("shard-*"))  # first: another part may be about to begin the dataset
        begun = [self.path / name for name in (ix.DATASET_FILE, ix.PREPARING_FILE) if (self.path / name).is_file()]
        for path in begun:
            self._check_begun(read_json_object(path), path)
        if self.finished:
            self._remove_leftovers()
            return
        if not begun and shards:
            raise UserError(f"{self.path} holds shards but no dataset was begun in it; choose a new folder")
        if not begun:
            write_json(self.path / ix.PREPARING_FILE, {**ix.head(self.features, self.layout), "parts": self.parts})
        for index in self.path.glob("rows-*.arrow"):
            number = int(index.stem.removeprefix("rows-"))
            if number % self.parts == self.part:
                self.done_ids.update(read_rows(index, self.features.num_mels)["id"].to_pylist())
                # A shard that was killed before its part of the index was written is written again, under its old name.
                self.shard = max(self.shard, number + self.parts)

    def _check_begun(self, fields: dict[str, Any], path: Path) -> None:
        """Raise UserError where the folder was begun with other features, or in other parts."""
        ix.check_version(fields, path)
        found = ix.features_of(fields, path)
        if found != self.features:
            raise UserError(
                f"{self.path} was begun with other features: {'; '.join(difference(found, self.features))} "
                "(there != now). Use the same features or another folder"
            )
        if fields.get("layout") != self.layout:
            raise UserError(
                f"{self.path} was begun with the layout {fields.get('layout')!r}, not {self.layout!r}: give that one, "
                "or choose another folder"
            )
        if fields.get("parts", self.parts) != self.parts:
            raise UserError(
                f"{self.path} was begun in {fields['parts']} parts, not {self.parts}: give the same number, or choose "
                "another folder"
            )

    def _temporary(self) -> Path:
        return self.path / f"{ix.shard_name(self.shard)}.tmp"

    def _open_shard(self) -> None:
        self.file = os.open(self._temporary(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.data_bytes = self.header_used = 0
        # Real bytes, not a hole: a disk that fills up later must not take the header's place.
        _write_all(self.file, np.full(self.header_bytes, ord(" "), np.uint8), 0)

    def _finish_shard(self) -> None:
        if self.file is None:
            return
        if self.rows:
            header = shard_header(self.rows, self.header_bytes, self.features, self.layout)
            os.ftruncate(self.file, self.header_bytes + self.data_bytes)
            _write_all(self.file, np.frombuffer(header, np.uint8), 0)
            os.fsync(self.file)
            os.replace(self._temporary(), self.path / ix.shard_name(self.shard))
            # The shard counts from here on: its part of the index is written after it, and atomically.
            write_rows(self.path / f"rows-{self.shard:05d}.arrow", self.rows, self.features.num_mels)
            self.rows = []
            self.shard += self.parts
        self._drop_shard()

    def _drop_shard(self) -> None:
        """Forget the open shard and the recordings in it."""
        if self.file is not None:
            os.close(self.file)
            self.file = None
            self._temporary().unlink(missing_ok=True)
        self.done_ids.difference_update(row["id"] for row in self.rows)
        self.rows = []

    def _remove_leftovers(self) -> None:
        for pattern in ("rows-*.arrow", "part-*", "*.tmp", ".tmp-*", ix.PREPARING_FILE):
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn an error of the disk into a UserError, keeping the recordings that are on the disk already."""
        try:
            yield
        except OSError as error:
            # Dropping the half-written recording gives back the little room that closing the shard takes.
            with contextlib.suppress(OSError):
                self._finish_shard()
            self._drop_shard()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            free = shutil.disk_usage(self.path).free >> 20 if self.path.is_dir() else 0
            raise UserError(
                f"{self.path}: {'the disk is full' if full else 'writing failed'} ({error}); "
                f"{len(self.done_ids)} recordings are written and kept. "
                f"{f'Free some space ({free} MiB are left)' if full else 'Repair this'} and run the same command again"
            ) from error


def _write_all(file: int | None, values: np.ndarray, offset: int) -> None:
    assert file is not None
    view = memoryview(values)  # type: ignore[arg-type]
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
