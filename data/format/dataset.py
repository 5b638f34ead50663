"""The on-disk format: `DatasetWriter` writes it, `open_dataset` reads it, `python -m data.shards COMMAND` looks after
it (verify, inspect, stats, split, filter, merge: docs/datasets.md).

A range of frames is one positioned read at `offset + start * 2 * M`, whatever the recording's length. Nothing is ever
unpickled, and names in an index cannot reach outside the dataset's folder. See `data.index` for the files and columns.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import as_object, parse_json
from data.format import index as ix
from data.format.encoding import bytes_of, read_frames
from data.format.index import Recording
from data.format.index_file import Index, statistics_range
from data.format.normalisation import normalise_into, scale_of
from data.format.writer import DatasetWriter
from data.shards.verify import DAMAGED, check_files
from data.storage.local import CutShort, Storage, StorageSettings, open_storage
from data.transcripts import Word

__all__ = ["Dataset", "DatasetWriter", "Normalisation", "Recording", "open_dataset"]

Normalisation = Literal["recording", "dataset"]


class Dataset:
    """A dataset opened for reading. Recordings are numbered 0 .. len - 1 in the order of the index (sorted by id).

    Attributes:
        location: its folder, or its URL.
        name: what reports call it.
        features: FeatureSettings that it was computed with.
        fingerprint: SHA-256 (hex) of its content.
        frames: int64 [N], frames of every recording.
        total_frames: int, their sum.
        layout: how the values are stored.
        index: the Index, whose arrays take no memory of their own.
    """

    def __init__(self, storage: Storage, fields: dict[str, Any]) -> None:
        self.storage, self.location = storage, storage.location
        self.features = ix.features_of(fields, f"{self.location.rstrip('/')}/{ix.DATASET_FILE}")
        if fields.get("feature_hash") != self.features.hash():
            raise UserError(f"{self.location}: feature_hash in {ix.DATASET_FILE} does not belong to the features there")
        self.name: str = fields.get("name") or Path(self.location).name
        self.fingerprint: str = fields["fingerprint"]
        self.total_frames: int = fields["frames"]
        self.layout: ix.Layout = fields["layout"]
        if self.layout not in ix.LAYOUTS:
            raise UserError(f"{self.location}: layout is {self.layout!r}, known are {', '.join(ix.LAYOUTS)}")
        self._mean, self._std = (ix.vector_of(fields, name, self.features, self.location) for name in ("mean", "std"))
        try:
            self.index = Index(storage.local_copy(ix.INDEX_FILE), storage.local_copy(ix.RECORDINGS_FILE))
        except OSError as error:
            raise UserError(f"{self.location}: cannot be read ({error}); {DAMAGED}") from error
        self.frames = self.index.frames
        if len(self) != fields["recordings"] or int(self.frames.sum()) != self.total_frames:
            raise UserError(f"{self.location}: {ix.INDEX_FILE} does not belong to {ix.DATASET_FILE}; prepare it again")

    @property
    def path(self) -> Path:
        """Its folder. UserError where it lies in object storage."""
        if "://" in self.location:
            raise UserError(f"{self.location} is not a folder on this machine: copy it to one first")
        return Path(self.location)

    def __len__(self) -> int:
        return len(self.frames)

    def identity(self) -> dict[str, str]:
        """What the data are: every feature setting by name, then the fingerprint. For a run that continues."""
        features = {f"features.{name}": str(value) for name, value in self.features.to_dict().items()}
        return {**features, "dataset": self.fingerprint}

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked opens the dataset itself: files and tables do not travel.
        return open_dataset, (self.location, False, self.storage.settings)

    def id(self, recording: int) -> str:
        return self.index.value("id", recording)

    def text(self, recording: int) -> str | None:
        """Transcript, None where there is none."""
        return self.index.value("text", recording)

    def words(self, recording: int) -> list[Word] | None:
        """Words with their times, in order; None where the recording has no word times."""
        words = self.index.value("words", recording)
        return None if words is None else [Word(**word) for word in words]

    def excluded(self, recording: int) -> list[tuple[float, float]] | None:
        """Stretches (start, end) in seconds that are neither trained on nor scored; None where there are none."""
        excluded = self.index.value("excluded", recording)
        return None if excluded is None else [(e["start"], e["end"]) for e in excluded]

    def language(self, recording: int) -> str:
        return self.index.label("language", recording)

    def speaker(self, recording: int) -> str:
        return self.index.label("speaker", recording)

    def split(self, recording: int) -> str:
        return self.index.label("split", recording)

    def recording(self, recording: int) -> Recording:
        """All that the index says of a recording."""
        i = recording
        labels = self.language(i), self.speaker(i), self.split(i)
        try:
            return Recording(self.id(i), self.text(i), self.words(i), *labels, self.excluded(i))
        except UserError as error:
            raise UserError(f"{self.location}: {error}; {DAMAGED}") from error

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """The values of 'language', 'speaker' or 'split', and int32 [N] which of them a recording has."""
        return self.index.labels[name]

    def totals(self, label: str) -> dict[str, tuple[int, int]]:
        """Recordings and frames for every value of 'language', 'speaker' or 'split', by value."""
        names, codes = self.labels(label)
        counts = np.bincount(codes, minlength=len(names))
        frames = np.bincount(codes, weights=self.frames, minlength=len(names))
        return {name: (int(n), int(f)) for name, n, f in zip(names, counts, frames, strict=True) if n}

    def select(
        self, split: str | None = None, language: str | None = None, ids: Iterable[str] | None = None
    ) -> np.ndarray:
        """Numbers (int32, ascending) of the recordings that match all that is given. UserError where none does."""
        wanted = {name: value for name, value in (("split", split), ("language", language)) if value is not None}
        keep = np.ones(len(self), bool)
        for name, value in wanted.items():
            names, codes = self.labels(name)
            if value not in names:
                raise UserError(f"{self.location}: no recording with {name} {value!r}; there are {sorted(names)}")
            keep &= codes == names.index(value)
        numbers = np.flatnonzero(keep).astype(np.int32)
        if ids is not None:
            found = {id: self.index.find(id) for id in sorted(set(ids))}
            missing = [id for id, number in found.items() if number is None]
            if missing:
                raise UserError(f"{self.location}: no recording {missing[0]!r} ({len(missing)} ids are unknown)")
            numbers = np.intersect1d(numbers, np.array([n for n in found.values() if n is not None], np.int32))
        if not len(numbers):
            asked = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
            raise UserError(f"{self.location}: no recording with {asked} together")
        return numbers

    def read(self, recording: int, start: int = 0, stop: int | None = None, verify: bool = False) -> np.ndarray:
        """Frames [start, stop) as float16 [stop - start, M].

        verify: check the checksums of the blocks that the range touches (they are then read as a whole).
        Raises UserError naming the recording and the shard: missing, cut short, or (verify) a changed block.
        """
        frames = int(self.frames[recording])
        stop = frames if stop is None else stop
        if not 0 <= start <= stop <= frames:
            raise UserError(f"{self.where(recording)}: frames {start} to {stop} of {frames} were asked for")
        first, last = ix.block_range(start, stop, frames) if verify else (start, stop)
        values = np.empty((last - first, self.features.num_mels), np.float16)
        self.read_into(recording, first, values)
        if verify:
            bad = self.bad_blocks(recording, first, values)
            if bad:
                raise UserError(f"{self.where(recording)}: the checksum of block {bad[0]} is wrong: {DAMAGED}")
        return values[start - first : stop - first]

    def read_into(self, recording: int, start: int, out: np.ndarray) -> None:
        """Fill `out` (C-contiguous float16 [n, M]) with frames [start, start + n). Errors as `read`."""
        try:
            read_frames(self.storage, self.index, self.layout, recording, start, out)
        except CutShort as error:
            raise UserError(f"{self.where(recording)}: the shard is cut short; {DAMAGED}") from error
        except (OSError, UserError) as error:
            raise UserError(f"{self.where(recording)}: {error}; {DAMAGED}") from error

    def forget(self, recording: int, start: int, stop: int) -> None:
        """Drop what a cache holds of frames [start, stop), of all that is read with them and of the statistics."""
        first, last = ix.block_range(start, stop, int(self.frames[recording]))
        with suppress(OSError, UserError):  # whoever reads them again is told
            place = bytes_of(self.index, self.layout, recording, first, last, self.features.num_mels)
            self.storage.forget(ix.shard_name(int(self.index.shard[recording])), *place)
            self.storage.forget(ix.STATISTICS_FILE, *statistics_range(int(recording), self.features.num_mels))

    def mean_std(self, recording: int) -> np.ndarray:
        """Mean and standard deviation of a recording's log-mel: float32 [2, M]. UserError where they cannot be."""
        position, size = statistics_range(int(recording), self.features.num_mels)
        values = np.empty((2, self.features.num_mels), np.float32)
        try:
            self.storage.read_into(ix.STATISTICS_FILE, position, memoryview(values).cast("B"))  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"{self.location}: statistics of {self.id(recording)!r}: {error}; {DAMAGED}") from error
        flat = values.ravel()
        if not math.isfinite(np.dot(flat, flat)) or values[1].min() < 0:  # a third of the time of np.isfinite
            raise UserError(f"{self.location}: statistics of {self.id(recording)!r} cannot be; {DAMAGED}")
        return values

    def statistics(self, recording: int, normalisation: Normalisation) -> tuple[Tensor, Tensor]:
        """(mean, 1 / std), float32 [M] each: a frame is normalised as `(x - mean) * inverse_std`."""
        if normalisation == "dataset":
            mean, std = self._mean, self._std
        else:
            mean, std = map(torch.from_numpy, self.mean_std(recording))
        return scale_of(mean, std)

    def read_normalised(
        self,
        recording: int,
        start: int = 0,
        stop: int | None = None,
        normalisation: Normalisation = "recording",
        verify: bool = False,
    ) -> np.ndarray:
        """Frames [start, stop) as float32 [stop - start, M], zero mean and unit variance over the recording or dataset.

        A crop gets the numbers that the whole recording has there. Raises as `read`, and for non-finite values.
        """
        values = self.read(recording, start, stop, verify)
        out = torch.empty(values.shape)
        self.normalise_into(out, values, recording, normalisation)
        return out.numpy()

    def normalise_into(
        self, out: Tensor, values: np.ndarray, recording: int, normalisation: Normalisation = "recording"
    ) -> None:
        """Normalise float16 [n, M] of a recording into contiguous float32 [n, M]; UserError for non-finite values."""
        mean, inverse_std = self.statistics(recording, normalisation)
        try:
            normalise_into(out, values, mean, inverse_std)
        except UserError as error:
            raise UserError(f"{self.where(recording)}: damaged ({error}); {DAMAGED}") from error

    def bad_blocks(self, recording: int, first: int, values: np.ndarray) -> list[int]:
        """Numbers of the blocks with a wrong checksum; values: whole blocks from frame `first` on."""
        size = ix.CHECKSUM_FRAMES
        expected = self.index.value("crc32", recording)
        found = {(first + b) // size: zlib.crc32(values[b : b + size].data) for b in range(0, len(values), size)}
        return [block for block, crc32 in found.items() if [crc32] != expected[block : block + 1]]

    def shards(self) -> list[int]:
        """Numbers of the shards that the recordings lie in, ascending."""
        return np.flatnonzero(np.bincount(self.index.shard)).tolist()

    def where(self, recording: int) -> str:
        """The recording's name and shard, for error messages."""
        shard = ix.shard_name(self.index.shard[recording])
        return f"recording {self.id(recording)!r} in {self.location.rstrip('/')}/{shard}"


def open_dataset(
    location: str | os.PathLike[str], check: bool = True, storage: StorageSettings | None = None
) -> Dataset:
    """Open a dataset: a folder, or a URL of object storage, whose index is then copied to this machine once.

    check=False leaves the shards to be looked at when they are read: what is whole stays readable. It is always
    so with a URL, where asking for every shard would take long.

    Raises UserError: not a dataset, half-written, another format, missing or short shards.
    """
    store = open_storage(location, storage)
    place = f"{store.location.rstrip('/')}/{ix.DATASET_FILE}"
    try:
        if store.size(ix.DATASET_FILE) is None:
            if store.size(ix.PREPARING_FILE) is not None:
                raise UserError(f"{location} is half-written: preparing it was interrupted; run the same command again")
            raise UserError(
                f"{location} is not a dataset: it has no {ix.DATASET_FILE}. `python -m data.prepare` makes one"
            )
        fields = as_object(parse_json(store.read(ix.DATASET_FILE), place), place)
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error})") from error
    ix.check_version(fields, place)
    missing = {"layout", "features", "feature_hash", "fingerprint", "recordings", "frames", "mean", "std"} - set(fields)
    if missing:
        raise UserError(f"{place}: lacks {sorted(missing)}; prepare the dataset again")
    dataset = Dataset(store, fields)
    if check and "://" not in dataset.location:
        check_files(dataset)
    dataset.index.release()
    return dataset
