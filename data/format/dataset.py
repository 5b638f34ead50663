"""Reader of datasets: `open_dataset`, random access to frames, normalisation.

A range of frames is one positioned read at `offset + start * 2 * M`, whatever the recording's length. Nothing is
unpickled, and an index holds shard numbers, no paths, so it cannot refer to files outside the dataset's folder. Files
and columns: `data.format.schema`; commands that verify, inspect and derive datasets: docs/datasets.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import as_object, parse_json
from data.format.encoding import byte_range, checksum_range, checksums, read_frames
from data.format.index import Index
from data.format.schema import (
    CHECKSUM_FRAMES,
    DATASET_FILE,
    ENCODINGS,
    INDEX_FILE,
    PREPARING_FILE,
    RECORDINGS_FILE,
    STATISTICS_FILE,
    Encoding,
    check_version,
    parse_features,
    parse_vector,
    shard_name,
    statistics_range,
)
from data.storage.local import Storage, StorageSettings, TruncatedFile
from data.storage.opening import open_storage
from data.transcripts import Word

Normalisation = Literal["recording", "dataset"]
DAMAGED = "`python -m data.shards verify` lists all damage; restore the file or prepare the dataset again"
# A bin that hardly varies (silence, a band that 8 or 11 kHz audio lacks) is centred, not amplified to unit variance. A
# standard deviation counts as at least this share of its mean over the bins, and SMALLEST_STD. See docs/datasets.md.
STD_FLOOR, SMALLEST_STD = 0.25, 0.01
_REQUIRED = {"layout", "features", "feature_hash", "fingerprint", "recordings", "frames", "mean", "std"}


class Dataset:
    """Dataset opened for reading. Recordings are numbered 0 .. len - 1 in the order of the index (sorted by id).

    Attributes:
        location: folder or URL.
        name: name in reports.
        features: FeatureSettings of the log-mel.
        fingerprint: SHA-256 (hex) of its content.
        frames: int64 [N], length of every recording.
        total_frames: int, their sum.
        encoding: representation of the values in the shards.
        index: the memory-mapped Index.
    """

    def __init__(self, storage: Storage, fields: dict[str, Any]) -> None:
        self.storage, self.location = storage, storage.location
        place = self._file(DATASET_FILE)
        self.features = parse_features(fields, place)
        if fields.get("feature_hash") != self.features.hash():
            raise UserError(f"{place}: feature_hash does not match the features; restore the file")
        self.name: str = fields.get("name") or Path(self.location).name
        self.fingerprint: str = fields["fingerprint"]
        self.total_frames: int = fields["frames"]
        self.encoding: Encoding = fields["layout"]
        if self.encoding not in ENCODINGS:
            raise UserError(f"{place}: layout is {self.encoding!r}, expected one of {', '.join(ENCODINGS)}")
        self._mean, self._std = (parse_vector(fields, name, self.features.num_mels, place) for name in ("mean", "std"))
        try:
            self.index = Index(storage.local_copy(INDEX_FILE), storage.local_copy(RECORDINGS_FILE))
        except OSError as error:
            raise UserError(f"{self.location}: cannot be read ({error}); {DAMAGED}") from error
        self.frames = self.index.frames
        if len(self) != fields["recordings"] or int(self.frames.sum()) != self.total_frames:
            raise UserError(f"{self.location}: {INDEX_FILE} does not belong to {DATASET_FILE}; prepare it again")

    @property
    def path(self) -> Path:
        """Folder of the dataset. Raises UserError if it is in object storage."""
        if "://" in self.location:
            raise UserError(f"{self.location} is not a folder on this machine: copy it to one first")
        return Path(self.location)

    def __len__(self) -> int:
        return len(self.frames)

    def identity(self) -> dict[str, str]:
        """Feature settings by name, and the fingerprint; a resumed run compares them with those of its checkpoint."""
        features = {f"features.{name}": str(value) for name, value in self.features.to_dict().items()}
        return {**features, "dataset": self.fingerprint}

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked opens the dataset again: open files and mapped tables are not pickled.
        return open_dataset, (self.location, False, self.storage.settings)

    def id(self, recording: int) -> str:
        return self.index.value("id", recording)

    def text(self, recording: int) -> str | None:
        """Transcript, or None."""
        return self.index.value("text", recording)

    def words(self, recording: int) -> list[Word] | None:
        """Words with their times, in order, or None."""
        words = self.index.value("words", recording)
        return None if words is None else [Word(**word) for word in words]

    def excluded(self, recording: int) -> list[tuple[float, float]] | None:
        """Passages (start, end) in seconds that are excluded from labelled training and scoring, or None."""
        excluded = self.index.value("excluded", recording)
        return None if excluded is None else [(e["start"], e["end"]) for e in excluded]

    def language(self, recording: int) -> str:
        return self.index.label("language", recording)

    def speaker(self, recording: int) -> str:
        return self.index.label("speaker", recording)

    def split(self, recording: int) -> str:
        return self.index.label("split", recording)

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """Distinct values of 'language', 'speaker' or 'split', and the code of every recording, int32 [N]."""
        return self.index.labels[name]

    def totals(self, label: str) -> dict[str, tuple[int, int]]:
        """Recordings and frames per value of 'language', 'speaker' or 'split'."""
        names, codes = self.labels(label)
        counts = np.bincount(codes, minlength=len(names))
        frames = np.bincount(codes, weights=self.frames, minlength=len(names))
        return {name: (int(n), int(f)) for name, n, f in zip(names, counts, frames, strict=True) if n}

    def select(
        self, split: str | None = None, language: str | None = None, ids: Iterable[str] | None = None
    ) -> np.ndarray:
        """Numbers (int32, ascending) of the recordings that meet all conditions. Raises UserError if there are none."""
        conditions = {name: value for name, value in (("split", split), ("language", language)) if value is not None}
        keep = np.ones(len(self), bool)
        for name, value in conditions.items():
            names, codes = self.labels(name)
            if value not in names:
                raise UserError(f"{self.location}: no recording with {name} {value!r}; the dataset has {sorted(names)}")
            keep &= codes == names.index(value)
        numbers = np.flatnonzero(keep).astype(np.int32)
        if ids is not None:
            numbers_by_id = {id: self.index.find(id) for id in sorted(set(ids))}
            missing = [id for id, number in numbers_by_id.items() if number is None]
            if missing:
                raise UserError(f"{self.location}: no recording {missing[0]!r} ({len(missing)} ids are unknown)")
            numbers = np.intersect1d(numbers, np.array(list(numbers_by_id.values()), np.int32))
        if not len(numbers):
            given = [f"{name} {value!r}" for name, value in conditions.items()] + ["one of the ids"] * (ids is not None)
            raise UserError(f"{self.location}: no recording with {' and '.join(given)}")
        return numbers

    def read(self, recording: int, start: int = 0, stop: int | None = None, verify: bool = False) -> np.ndarray:
        """Frames [start, stop) as float16 [stop - start, M].

        verify: check the checksums of the blocks that the range touches, which are then read completely.
        Raises UserError that names recording and shard: missing, truncated, or (verify) a changed block.
        """
        frames = int(self.frames[recording])
        stop = frames if stop is None else stop
        if not 0 <= start <= stop <= frames:
            raise UserError(f"{self.place(recording)}: frames {start} to {stop} are not within its {frames} frames")
        first, last = checksum_range(start, stop, frames) if verify else (start, stop)
        values = np.empty((last - first, self.features.num_mels), np.float16)
        self.read_into(recording, first, values)
        if verify:
            bad = self.bad_blocks(recording, first, values)
            if bad:
                raise UserError(f"{self.place(recording)}: the checksum of block {bad[0]} is wrong: {DAMAGED}")
        return values[start - first : stop - first]

    def read_into(self, recording: int, start: int, out: np.ndarray) -> None:
        """Read frames [start, start + n) into `out` (C-contiguous float16 [n, M]). Raises as `read`."""
        try:
            read_frames(self.storage, self.index, self.encoding, recording, start, out)
        except TruncatedFile as error:
            raise UserError(f"{self.place(recording)}: the shard is truncated; {DAMAGED}") from error
        except (OSError, UserError) as error:
            raise UserError(f"{self.place(recording)}: {error}; {DAMAGED}") from error

    def forget(self, recording: int, start: int, stop: int) -> None:
        """Drop cached bytes of frames [start, stop), of their checksum blocks, and of the statistics."""
        first, last = checksum_range(start, stop, int(self.frames[recording]))
        with suppress(OSError, UserError):  # the next read reports the error
            place = byte_range(self.index, self.encoding, recording, first, last, self.features.num_mels)
            self.storage.forget(shard_name(int(self.index.shard[recording])), *place)
            self.storage.forget(STATISTICS_FILE, *statistics_range(int(recording), self.features.num_mels))

    def mean_std(self, recording: int) -> np.ndarray:
        """Mean and standard deviation of a recording's log-mel: float32 [2, M]. Raises UserError if invalid."""
        position, size = statistics_range(int(recording), self.features.num_mels)
        values = np.empty((2, self.features.num_mels), np.float32)
        try:
            self.storage.read_into(STATISTICS_FILE, position, memoryview(values).cast("B"))  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"{self.location}: statistics of {self.id(recording)!r}: {error}; {DAMAGED}") from error
        with np.errstate(over="ignore", invalid="ignore"):
            finite = math.isfinite(np.vdot(values, values))  # a third of the time of np.isfinite
        if not finite or values[1].min() < 0:
            raise UserError(f"{self.location}: statistics of {self.id(recording)!r} are invalid; {DAMAGED}")
        return values

    def statistics(
        self, recording: int, normalisation: Normalisation, std_floor: float = STD_FLOOR
    ) -> tuple[Tensor, Tensor]:
        """(mean, 1 / std), float32 [M] each: a frame is normalised as `(x - mean) * inverse_std`."""
        if normalisation == "dataset":
            return normalisation_scale(self._mean, self._std, std_floor)
        mean, std = torch.from_numpy(self.mean_std(recording)).unbind()  # iterating takes four times the calls
        return normalisation_scale(mean, std, std_floor)

    def read_normalised(
        self,
        recording: int,
        start: int = 0,
        stop: int | None = None,
        normalisation: Normalisation = "recording",
        verify: bool = False,
        std_floor: float = STD_FLOOR,
    ) -> np.ndarray:
        """Frames [start, stop) as float32 [stop - start, M], zero mean and unit variance over the recording or dataset.

        A crop has the same values as that part of the whole recording. Raises as `read`, and for non-finite values.
        """
        values = self.read(recording, start, stop, verify)
        out = torch.empty(values.shape)
        self.normalise_into(out, values, recording, normalisation, std_floor)
        return out.numpy()

    def normalise_into(
        self, out: Tensor, values: np.ndarray, recording: int, normalisation: Normalisation = "recording",
        std_floor: float = STD_FLOOR,
    ) -> None:  # fmt: skip
        """Normalise float16 [n, M] of a recording into contiguous float32 [n, M]; UserError for non-finite values."""
        mean, inverse_std = self.statistics(recording, normalisation, std_floor)
        try:
            normalise_into(out, values, mean, inverse_std)
        except UserError as error:
            raise UserError(f"{self.place(recording)}: damaged ({error}); {DAMAGED}") from error

    def bad_blocks(self, recording: int, first: int, values: np.ndarray) -> list[int]:
        """Numbers of the blocks with a wrong checksum; values: whole checksum blocks from frame `first` on."""
        expected = self.index.value("crc32", recording)
        actual = enumerate(checksums(values), first // CHECKSUM_FRAMES)
        return [block for block, crc32 in actual if [crc32] != expected[block : block + 1]]

    def shards(self) -> list[int]:
        """Numbers of the dataset's shards, ascending."""
        return np.flatnonzero(np.bincount(self.index.shard)).tolist()

    def place(self, recording: int) -> str:
        """Recording and shard, for error messages."""
        return f"recording {self.id(recording)!r} in {self._file(shard_name(self.index.shard[recording]))}"

    def check_shards(self) -> None:
        """Raise UserError that names missing shards, or truncated shards and the recordings beyond the cut."""
        shards = self.shards()
        sizes, missing = np.zeros(shards[-1] + 1, np.int64), []
        for shard in shards:
            name = shard_name(shard)
            if (self.path / name).is_symlink():
                raise UserError(f"{self.path / name} is a symbolic link: replace it with the shard itself")
            size = self.storage.size(name)
            if size is None:
                missing.append(name)
            sizes[shard] = size or 0
        if missing:
            raise UserError(f"{self.path}: {len(missing)} shards are missing: {', '.join(missing[:8])}; {DAMAGED}")
        beyond = np.flatnonzero(self.index.offset + self.index.bytes > sizes[self.index.shard])
        if len(beyond):
            names = sorted({shard_name(shard) for shard in self.index.shard[beyond].tolist()})
            ids = ", ".join(repr(self.id(recording)) for recording in beyond[:8])
            raise UserError(
                f"{self.location}: {', '.join(names[:8])} are truncated: {len(beyond)} recordings are incomplete "
                f"({ids}{', ...' if len(beyond) > 8 else ''}); {DAMAGED}"
            )

    def _file(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}"


def open_dataset(
    location: str | os.PathLike[str], check: bool = True, storage: StorageSettings | None = None
) -> Dataset:
    """Open a dataset: a folder, or a URL of object storage, whose index is then copied to this machine once.

    check: raise an error if shards are missing or truncated. Without it, and always with a URL (one request per shard
    would take too long), the error is raised when a shard is read, and complete recordings stay readable.

    Raises UserError: not a dataset, incomplete, another format version, missing or truncated shards.
    """
    store = open_storage(location, storage)
    place = f"{store.location.rstrip('/')}/{DATASET_FILE}"
    try:
        if store.size(DATASET_FILE) is None:
            if store.size(PREPARING_FILE) is not None:
                raise UserError(
                    f"{location} is incomplete: its preparation was interrupted; run the same command again"
                )
            raise UserError(
                f"{location} is not a dataset: it has no {DATASET_FILE}. `python -m data.prepare` writes datasets"
            )
        fields = as_object(parse_json(store.read(DATASET_FILE), place), place)
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error})") from error
    check_version(fields, place)
    missing = _REQUIRED - set(fields)
    if missing:
        raise UserError(f"{place}: lacks {sorted(missing)}; prepare the dataset again")
    for name in ("name", "fingerprint"):
        if not (isinstance(text := fields.get(name, ""), str) and text.isprintable()):
            raise UserError(f"{place}: {name} is {text!r}, but must be printable text")
    dataset = Dataset(store, fields)
    if check and "://" not in dataset.location:
        dataset.check_shards()
    dataset.index.release()
    return dataset


def mean_and_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the frames of float16 [frames, M]: two float32 [M], summed in float64."""
    # Block by block: hours in float64 would take four times the memory of the features.
    blocks = [values[start : start + CHECKSUM_FRAMES] for start in range(0, len(values), CHECKSUM_FRAMES)]
    mean = np.sum([block.astype(np.float64).sum(axis=0) for block in blocks], axis=0) / len(values)
    squares = np.zeros_like(mean)
    for block in blocks:
        exact = block - mean
        squares += np.einsum("fm,fm->m", exact, exact)
    return mean.astype(np.float32), np.sqrt(squares / len(values)).astype(np.float32)


def normalisation_scale(mean: Tensor, std: Tensor, std_floor: float = STD_FLOOR) -> tuple[Tensor, Tensor]:
    """(mean, 1 / std) for `normalise_into`, from statistics, float32 [M] each; a floor of 0 leaves SMALLEST_STD."""
    floor = std_floor * float(std.mean())
    return mean, std.clamp(min=floor if floor > SMALLEST_STD else SMALLEST_STD).reciprocal_()


def normalise_into(out: Tensor, values: np.ndarray, mean: Tensor, inverse_std: Tensor) -> None:
    """Normalise float16 [n, M] into contiguous float32 [n, M]. Raises UserError for NaN and infinite values."""
    # torch converts float16 nine times faster than numpy.
    out.copy_(torch.from_numpy(values)).sub_(mean).mul_(inverse_std)
    # A sum is the fastest check: any NaN or infinity propagates, and normalised float16 cannot overflow it otherwise.
    if not math.isfinite(out.sum()):
        raise UserError("NaN or infinite values")
