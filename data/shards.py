"""The on-disk format: `DatasetWriter` writes it, `open_dataset` reads it, `python -m data.shards` checks and shows it.

    python -m data.shards verify DIR                          read every byte, list every bad recording
    python -m data.shards inspect DIR [--id ID] [--png FILE]   totals, or one recording and its picture

A range of frames is one positioned read at `offset + start * 2 * M`, whatever the recording's length. Nothing is ever
unpickled, and names in an index cannot reach outside the dataset's folder. See `data.index` for the files and columns.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data import index as ix
from data.errors import DataError
from data.features import FeatureSettings
from data.index import Recording
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
        features: FeatureSettings that it was computed with.
        fingerprint: SHA-256 (hex) of its content.
        frames: int64 [N], frames of every recording.
        ids, languages, speakers, splits, texts: pyarrow arrays; `ids[i].as_py()` is a str.
        total_frames: int, their sum.
    """

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.features = FeatureSettings.from_dict(fields.get("features", {}))
        if fields.get("feature_hash") != self.features.hash():
            raise DataError(f"{path / ix.DATASET_FILE}: feature_hash does not belong to the features beside it")
        self.fingerprint: str = fields["fingerprint"]
        self.total_frames: int = fields["frames"]
        self._mean, self._std = torch.tensor(fields["mean"]), torch.tensor(fields["std"])
        table = _read_index(path, ["id", "shard", "offset", "frames", "language", "speaker", "split", "text"])
        incomplete = [name for name in ("id", "shard", "offset", "frames") if table[name].null_count]
        if incomplete or not pq.read_schema(path / ix.INDEX_FILE).equals(ix.schema(self.features.num_mels)):
            raise DataError(f"{path / ix.INDEX_FILE}: columns of other types or with holes {incomplete}; refused")
        self.frames: np.ndarray = table["frames"].to_numpy()
        self._offset: np.ndarray = table["offset"].to_numpy()
        shards = table["shard"].combine_chunks().dictionary_encode()
        self._shard_of: np.ndarray = shards.indices.to_numpy()
        self.shard_names: list[str] = shards.dictionary.to_pylist()
        self.ids, self.languages, self.speakers, self.splits, self.texts = (
            table[name].combine_chunks() for name in ("id", "language", "speaker", "split", "text")
        )
        self._files: OrderedDict[int, int] = OrderedDict()
        self._words: tuple[int, Any] = (-1, None)
        for name in self.shard_names:
            ix.check_shard_name(name)
        if len(self.frames) != fields["recordings"] or int(self.frames.sum()) != self.total_frames:
            raise DataError(f"{path}: {ix.INDEX_FILE} and {ix.DATASET_FILE} do not belong together; prepare it again")
        if len(self.frames) == 0 or self.frames.min() < 1 or self._offset.min() < 8:
            raise DataError(f"{path / ix.INDEX_FILE}: no recordings, or frames or offsets that cannot be")

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
        return self.ids[recording].as_py()

    def text(self, recording: int) -> str | None:
        """Transcript, None where there is none."""
        return self.texts[recording].as_py()

    def words(self, recording: int) -> list[Word] | None:
        """Words with their times, in order; None where the recording has no word times."""
        group, row = divmod(int(recording), ix.ROW_GROUP)
        if group != self._words[0]:  # words may be most of an index: only the group last asked for is held
            with pq.ParquetFile(self.path / ix.INDEX_FILE) as file:
                self._words = group, file.read_row_group(group, columns=["words"])["words"].combine_chunks()
        words = self._words[1][row].as_py()
        return None if words is None else [Word(**word) for word in words]

    def recording(self, recording: int) -> Recording:
        """All that the index says of a recording."""
        i = recording
        language, speaker, split = (column[i].as_py() for column in (self.languages, self.speakers, self.splits))
        return Recording(self.id(i), self.text(i), self.words(i), language, speaker, split)

    def select(
        self, split: str | None = None, language: str | None = None, ids: Iterable[str] | None = None
    ) -> np.ndarray:
        """Numbers (int64, ascending) of the recordings that match all that is given. DataError where none does."""
        keep = np.ones(len(self), bool)
        for name, column, value in (("split", self.splits, split), ("language", self.languages, language)):
            if value is not None:
                keep &= pc.equal(column, value).to_numpy(zero_copy_only=False)
                if not keep.any():
                    there = sorted(pc.unique(column).to_pylist())
                    raise DataError(f"{self.path}: no recording with {name} {value!r}; there are {there}")
        if ids is not None:
            wanted = pa.array(sorted(set(ids)), pa.string())
            missing = pc.filter(wanted, pc.invert(pc.is_in(wanted, self.ids)))
            if len(missing):
                raise DataError(f"{self.path}: no recording {missing[0].as_py()!r} ({len(missing)} ids are unknown)")
            keep &= pc.is_in(self.ids, wanted).to_numpy(zero_copy_only=False)
        return np.flatnonzero(keep)

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
        position = int(self._offset[recording]) + start * width
        view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        try:
            file = self._file(int(self._shard_of[recording]))
            while view:
                got = os.preadv(file, [view], position)
                if got == 0:
                    raise DataError(f"{self.where(recording)}: the shard is cut short; {_DAMAGED}")
                view, position = view[got:], position + got
        except OSError as error:
            raise DataError(f"{self.where(recording)}: {error}; {_DAMAGED}") from error

    def statistics(self, recording: int, normalisation: Normalisation) -> tuple[Tensor, Tensor]:
        """(mean, 1 / std), float32 [M] each: a frame is normalised as `(x - mean) * inverse_std`."""
        of_dataset = normalisation == "dataset"
        mean, std = (self._mean, self._std) if of_dataset else (table[recording] for table in self._statistics)
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
        expected = self._checksums[recording].as_py()
        found = {(first + b) // size: zlib.crc32(values[b : b + size].data) for b in range(0, len(values), size)}
        return [block for block, crc32 in found.items() if crc32 != expected[block]]

    def check_files(self) -> None:
        """Raise DataError that names every missing shard, or the shards cut short and the recordings beyond the cut."""
        end = self._offset + self.frames * self.features.num_mels * ix.BYTES_PER_VALUE
        sizes = np.full(len(self.shard_names), -1, np.int64)
        for shard, name in enumerate(self.shard_names):
            path = self.path / name
            if path.is_symlink():
                raise DataError(f"{path} is a symbolic link; a shard must be a file in its folder. Refused")
            if path.is_file():
                sizes[shard] = path.stat().st_size
        missing = [name for name, size in zip(self.shard_names, sizes, strict=True) if size < 0]
        if missing:
            raise DataError(f"{self.path}: {len(missing)} shards are missing: {', '.join(missing[:8])}; {_DAMAGED}")
        beyond = np.flatnonzero(end > sizes[self._shard_of])
        if len(beyond):
            shards = sorted({self.shard_names[s] for s in self._shard_of[beyond]})
            named = ", ".join(repr(self.id(i)) for i in beyond[:8])
            raise DataError(
                f"{self.path}: {', '.join(shards[:8])} cut short: {len(beyond)} recordings are not there whole "
                f"({named}{', ...' if len(beyond) > 8 else ''}); {_DAMAGED}"
            )

    def where(self, recording: int) -> str:
        """The recording's name and shard, for error messages."""
        return f"recording {self.id(recording)!r} in {self.path / self.shard_names[self._shard_of[recording]]}"

    def _file(self, shard: int) -> int:
        """An open file of a shard. Positioned reads share no state, so a forked worker may use its parent's."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._files[shard] = os.open(self.path / self.shard_names[shard], flags)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    @functools.cached_property
    def _checksums(self) -> pa.Array:
        return _read_index(self.path, ["crc32"])["crc32"].combine_chunks()

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of all recordings, float32 [N, M] each; read once, shared with forks."""
        table = _read_index(self.path, ["mean", "std"])
        shape = (len(self), self.features.num_mels)
        mean, std = (torch.tensor(pc.list_flatten(table[name]).to_numpy()).view(shape) for name in ("mean", "std"))
        return mean, std


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


def _read_index(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path / ix.INDEX_FILE, columns=columns, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path / ix.INDEX_FILE}: cannot be read ({error}); {_DAMAGED}") from error


if __name__ == "__main__":
    from data.shards_cli import main

    sys.exit(main())
