"""The on-disk format: `DatasetWriter` writes it, `open_dataset` reads it, `python -m data.shards` checks and shows it.

    python -m data.shards verify DIR                          read every byte, list every bad recording
    python -m data.shards inspect DIR [--id ID] [--png FILE]   totals, or one recording and its picture

A range of frames is one positioned read at `offset + start * 2 * M`, whatever the recording's length. Nothing is ever
unpickled, and names in an index cannot reach outside the dataset's folder. See `data.index` for the files and columns.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data import index as ix
from data.errors import DataError
from data.features import FeatureSettings
from data.index import Recording
from data.index_file import IndexFile
from data.transcripts import Word
from data.writer import DatasetWriter

__all__ = ["Dataset", "DatasetWriter", "Normalisation", "Recording", "open_dataset"]

Normalisation = Literal["recording", "dataset"]
# A bin whose values hardly differ (silence, a band that telephone speech lacks) is centred, not blown up.
SMALLEST_STD = 0.01
OPEN_FILES = 64


class Dataset:
    """A dataset opened for reading. Recordings are numbered 0 .. len - 1 in the order of the index (sorted by id).

    Attributes:
        path: its folder.
        name: what reports call it.
        features: FeatureSettings that it was computed with.
        fingerprint: SHA-256 (hex) of its content.
        frames: Column [N], frames of every recording.
        total_frames: int, their sum.
        index: the IndexFile.
    """

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.features = FeatureSettings.from_dict(fields.get("features", {}))
        if fields.get("feature_hash") != self.features.hash():
            raise DataError(f"{path / ix.DATASET_FILE}: feature_hash does not belong to the features beside it")
        self.name: str = fields.get("name") or path.name
        self.fingerprint: str = fields["fingerprint"]
        self.total_frames: int = fields["frames"]
        self._mean, self._std = torch.tensor(fields["mean"]), torch.tensor(fields["std"])
        self.index = IndexFile(path / ix.INDEX_FILE, self.features.num_mels)
        self.frames = self.index.frames
        self._files: OrderedDict[int, int] = OrderedDict()
        if len(self) != fields["recordings"] or sum(int(c.sum()) for c in self.frames.chunks) != self.total_frames:
            raise DataError(f"{path}: {ix.INDEX_FILE} and {ix.DATASET_FILE} do not belong together; prepare it again")
        for column, least, most in (
            (self.frames, 1, 2**40),
            (self.index.offset, 8, 2**50),
            (self.index.shard, 0, 10**7),
        ):
            if not all(least <= chunk.min() and chunk.max() < most for chunk in column.chunks):
                raise DataError(f"{path / ix.INDEX_FILE}: frames, offsets or shards that cannot be; refused")

    def __len__(self) -> int:
        return len(self.frames)

    def identity(self) -> dict[str, str]:
        """What the data are: every feature setting by name, then the fingerprint. For a run that continues."""
        features = {f"features.{name}": str(value) for name, value in self.features.to_dict().items()}
        return {**features, "dataset": self.fingerprint}

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked opens the dataset itself: files and tables do not travel.
        return open_dataset, (str(self.path), False)

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
        return Recording(self.id(i), self.text(i), self.words(i), *labels, self.excluded(i))

    def totals(self, label: str) -> dict[str, tuple[int, int]]:
        """Recordings and frames for every value of 'language', 'speaker' or 'split', by value."""
        names, codes = self.index.labels[label]
        counts, frames = np.zeros(len(names), np.int64), np.zeros(len(names))
        for code, length in zip(codes.chunks, self.frames.chunks, strict=True):
            counts += np.bincount(code, minlength=len(names))
            frames += np.bincount(code, weights=length, minlength=len(names))
        return {name: (int(n), int(f)) for name, n, f in zip(names, counts, frames, strict=True) if n}

    def select(
        self, split: str | None = None, language: str | None = None, ids: Iterable[str] | None = None
    ) -> np.ndarray:
        """Numbers (int32, ascending) of the recordings that match all that is given. DataError where none does."""
        wanted = {name: value for name, value in (("split", split), ("language", language)) if value is not None}
        for name, value in wanted.items():
            if value not in self.index.labels[name][0]:
                raise DataError(f"{self.path}: no recording with {name} {value!r}; there are {sorted(self.totals(name))}")
        chosen, begin = [], 0
        for number, chunk in enumerate(self.frames.chunks):
            keep = np.ones(len(chunk), bool)
            for name, value in wanted.items():
                names, codes = self.index.labels[name]
                keep &= codes.chunks[number] == names.index(value)
            chosen.append((np.flatnonzero(keep) + begin).astype(np.int32))
            begin += len(chunk)
        numbers = np.concatenate(chosen)
        if ids is not None:
            found = {id: self.index.find(id) for id in sorted(set(ids))}
            missing = [id for id, number in found.items() if number is None]
            if missing:
                raise DataError(f"{self.path}: no recording {missing[0]!r} ({len(missing)} ids are unknown)")
            numbers = np.intersect1d(numbers, np.array([n for n in found.values() if n is not None], np.int32))
        if not len(numbers):
            asked = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
            raise DataError(f"{self.path}: no recording with {asked} together")
        return numbers

    def read(self, recording: int, start: int = 0, stop: int | None = None, verify: bool = False) -> np.ndarray:
        """Frames [start, stop) as float16 [stop - start, M].

        verify: check the checksums of the blocks that the range touches (they are then read as a whole).
        Raises DataError naming the recording and the shard: missing, cut short, or (verify) a changed block.
        """
        frames = int(self.frames[recording])
        stop = frames if stop is None else stop
        if not 0 <= start <= stop <= frames:
            raise DataError(f"{self.where(recording)}: frames {start} to {stop} of {frames} were asked for")
        first, last = ix.block_range(start, stop, frames) if verify else (start, stop)
        values = np.empty((last - first, self.features.num_mels), np.float16)
        self.read_into(recording, first, values)
        if verify:
            bad = self.bad_blocks(recording, first, values)
            if bad:
                raise DataError(f"{self.where(recording)}: the checksum of block {bad[0]} is wrong: {_DAMAGED}")
        return values[start - first : stop - first]

    def read_into(self, recording: int, start: int, out: np.ndarray) -> None:
        """Fill `out` (C-contiguous float16 [n, M]) with frames [start, start + n). Errors as `read`."""
        width = self.features.num_mels * ix.BYTES_PER_VALUE
        position = self.index.offset[recording] + start * width
        view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        try:
            file = self._file(self.index.shard[recording])
            while view:
                got = os.preadv(file, [view], position)
                if got == 0:
                    raise DataError(f"{self.where(recording)}: the shard is cut short; {_DAMAGED}")
                view, position = view[got:], position + got
        except OSError as error:
            raise DataError(f"{self.where(recording)}: {error}; {_DAMAGED}") from error

    def statistics(self, recording: int, normalisation: Normalisation) -> tuple[Tensor, Tensor]:
        """(mean, 1 / std), float32 [M] each: a frame is normalised as `(x - mean) * inverse_std`."""
        if normalisation == "dataset":
            mean, std = self._mean, self._std
        else:
            mean, std = (torch.from_numpy(self.index.vector(name, recording).copy()) for name in ("mean", "std"))
        return mean, 1 / std.clamp(min=SMALLEST_STD)

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
        """Normalise float16 [n, M] of a recording into contiguous float32 [n, M]; DataError for non-finite values."""
        mean, inverse_std = self.statistics(recording, normalisation)
        # torch converts float16 nine times as fast as numpy.
        out.copy_(torch.from_numpy(values)).sub_(mean).mul_(inverse_std)
        flat = out.view(-1)
        # The quickest pass that any NaN or infinity survives; normalised float16 cannot overflow it otherwise.
        if not math.isfinite(torch.dot(flat, flat)):
            raise DataError(f"{self.where(recording)}: NaN or infinite values; {_DAMAGED}")

    def bad_blocks(self, recording: int, first: int, values: np.ndarray) -> list[int]:
        """Numbers of the blocks with a wrong checksum; values: whole blocks from frame `first` on."""
        size = ix.CHECKSUM_FRAMES
        expected = self.index.value("crc32", recording)
        found = {(first + b) // size: zlib.crc32(values[b : b + size].data) for b in range(0, len(values), size)}
        return [block for block, crc32 in found.items() if crc32 != expected[block]]

    def check_files(self) -> None:
        """Raise DataError that names every missing shard, or the shards cut short and the recordings beyond the cut."""
        width = self.features.num_mels * ix.BYTES_PER_VALUE
        sizes, short, begin = self._sizes(), [], 0
        columns = (self.index.shard.chunks, self.index.offset.chunks, self.frames.chunks)
        for shard, offset, frames in zip(*columns, strict=True):
            short += (np.flatnonzero(offset + frames * width > sizes[shard]) + begin).tolist()
            begin += len(shard)
        if short:
            shards = sorted({ix.shard_name(self.index.shard[recording]) for recording in short})
            named = ", ".join(repr(self.id(recording)) for recording in short[:8])
            raise DataError(
                f"{self.path}: {', '.join(shards[:8])} cut short: {len(short)} recordings are not there whole "
                f"({named}{', ...' if len(short) > 8 else ''}); {_DAMAGED}"
            )

    def shards(self) -> list[int]:
        """Numbers of the shards that the recordings lie in, ascending."""
        return sorted({int(shard) for chunk in self.index.shard.chunks for shard in np.unique(chunk)})

    def _sizes(self) -> np.ndarray:
        """Bytes of every shard's file, by its number. Raises DataError where one is missing or no plain file."""
        shards = self.shards()
        sizes, missing = np.zeros(shards[-1] + 1, np.int64), []
        for shard in shards:
            path = self.path / ix.shard_name(shard)
            if path.is_symlink():
                raise DataError(f"{path} is a symbolic link; a shard must be a file in its folder. Refused")
            if path.is_file():
                sizes[shard] = path.stat().st_size
            else:
                missing.append(path.name)
        if missing:
            raise DataError(f"{self.path}: {len(missing)} shards are missing: {', '.join(missing[:8])}; {_DAMAGED}")
        return sizes

    def where(self, recording: int) -> str:
        """The recording's name and shard, for error messages."""
        return f"recording {self.id(recording)!r} in {self.path / ix.shard_name(self.index.shard[recording])}"

    def _file(self, shard: int) -> int:
        """An open file of a shard. Positioned reads share no state, so a forked worker may use its parent's."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._files[shard] = os.open(self.path / ix.shard_name(shard), flags)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


_DAMAGED = "`python -m data.shards verify` lists all damage; restore the file or prepare the dataset again"


def open_dataset(path: str | os.PathLike[str], check_files: bool = True) -> Dataset:
    """Open a dataset folder. Raises DataError: not a dataset, half-written, another format, missing or short shards.

    check_files=False leaves the shards to be looked at when they are read: what is whole stays readable.
    """
    path = Path(path)
    if not (path / ix.DATASET_FILE).is_file():
        if (path / ix.PREPARING_FILE).exists():
            raise DataError(f"{path} is half-written: its preparation was interrupted; run the same command again")
        raise DataError(f"{path} is not a dataset: it has no {ix.DATASET_FILE}. `python -m data.prepare` makes one")
    fields = ix.read_json(path / ix.DATASET_FILE)
    ix.check_version(fields, path / ix.DATASET_FILE)
    missing = {"features", "feature_hash", "fingerprint", "recordings", "frames", "mean", "std"} - set(fields)
    if missing:
        raise DataError(f"{path / ix.DATASET_FILE}: lacks {sorted(missing)}; prepare the dataset again")
    dataset = Dataset(path, fields)
    if check_files:
        dataset.check_files()
    return dataset


if __name__ == "__main__":
    from data.shards_cli import main

    sys.exit(main())
