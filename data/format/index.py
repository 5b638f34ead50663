"""Memory-mapped index of a dataset (reader; `data.format.index_writer` writes it).

Opening an index of ten million recordings takes almost no private memory, and all processes of a machine share the
pages that they read.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import UserError
from data.format.schema import LABELS, index_schema, recordings_schema

_OPTIONAL = ("text", "words", "excluded", "confidence", "block_bytes")


class Index:
    """index.arrow and recordings.arrow, memory-mapped.

    The content is validated before it is used: sizes and types when the files are opened, texts and lists one batch at
    a time, at the first access to a batch.

    Attributes:
        shard: int32 [N]. offset, bytes, frames: int64 [N]. All are views of the file.
        labels: for 'language', 'speaker' and 'split': the distinct values, and the code of every recording, int32 [N].
        batches: the record batches of recordings.arrow.

    Raises:
        UserError: not an index of this format, or damaged.
    """

    def __init__(self, index: Path, recordings: Path) -> None:
        self.path, self.recordings = index, recordings
        self._pages = _map_file(index)
        (batch,) = read_batches(index, pa.py_buffer(self._pages), index_schema(), max_batches=1)
        arrays = {name: batch.column(name) for name in index_schema().names}
        codes = {name: arrays[name].indices for name in LABELS}
        if any(array.null_count for array in [*arrays.values(), *codes.values()]):
            raise damage_error(index, "a column with nulls")
        self.shard, self.offset = _view(arrays["shard"]), _view(arrays["offset"])
        self.bytes, self.frames = _view(arrays["bytes"]), _view(arrays["frames"])
        self.labels = {name: (arrays[name].dictionary.to_pylist(), _view(codes[name])) for name in LABELS}
        if not len(self) or min(self.frames.min(), self.bytes.min(), self.offset.min() - 7) < 1 or self.shard.min() < 0:
            raise damage_error(index, "no recordings, or invalid frames, offsets or shards")
        if self.shard.max() >= 10**7 or max(self.frames.max(), self.bytes.max(), self.offset.max()) >= 2**50:
            raise damage_error(index, "invalid frames, offsets or shards")
        for name, (values, code) in self.labels.items():
            if code.min() < 0 or code.max() >= len(values):
                raise damage_error(index, f"a code of {name} beyond its {len(values)} values")
        self.batches = read_batches(recordings, pa.py_buffer(_map_file(recordings)), recordings_schema())
        self._batch_rows = self.batches[0].num_rows
        sizes = [batch.num_rows for batch in self.batches]
        if set(sizes[:-1]) - {self._batch_rows} or sizes[-1] > self._batch_rows or sum(sizes) != len(self):
            raise damage_error(recordings, f"{sum(sizes)} rows, but {index.name} has {len(self)}")
        self._validated: set[tuple[int, str]] = set()

    def __len__(self) -> int:
        return len(self.frames)

    def release(self) -> None:
        """Release the pages of index.arrow that were read; later accesses map them again from the page cache."""
        self._pages.madvise(mmap.MADV_DONTNEED)

    def value(self, name: str, recording: int) -> Any:
        """Value of a column of recordings.arrow for a recording, as a Python object."""
        return self._scalar(name, recording).as_py()

    def block_bytes(self, recording: int) -> np.ndarray:
        """Sizes in bytes of the blocks of a compressed recording: uint32 [blocks]."""
        blocks = self._scalar("block_bytes", recording).values
        if blocks is None or blocks.null_count:
            raise damage_error(self.recordings, f"row {recording} has no block_bytes")
        return blocks.to_numpy()

    def _scalar(self, name: str, recording: int) -> pa.Scalar:
        number, row = divmod(int(recording), self._batch_rows)
        column = self.batches[number].column(name)
        if (number, name) not in self._validated:
            try:
                column.validate(full=True)
            except pa.ArrowException as error:
                raise damage_error(self.recordings, error) from error
            if has_nulls(name, column):
                raise damage_error(self.recordings, f"{name} with nulls")
            self._validated.add((number, name))
        return column[row]

    def label(self, name: str, recording: int) -> str:
        """`language`, `speaker` or `split` of a recording."""
        values, codes = self.labels[name]
        return values[codes[recording]]

    def find(self, id: str) -> int | None:
        """Number of the recording with this id, by bisection; None if the dataset does not have it."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.value("id", middle) < id else (low, middle)
        return low if low < len(self) and self.value("id", low) == id else None


def damage_error(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: cannot be read ({reason}); restore the file or prepare the dataset again")


def read_batches(
    path: Path, source: pa.Buffer, schema: pa.Schema, max_batches: int | None = None
) -> list[pa.RecordBatch]:
    """Batches (at least one) of an Arrow file. Sizes are validated; texts and lists are not, except in dictionaries."""
    try:
        reader = pa.ipc.open_file(source)
        if not reader.schema.equals(schema):
            raise UserError(f"{path}: the columns are not those of this version; prepare the dataset again")
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()
            for column in batch.columns:
                if pa.types.is_dictionary(column.type):
                    column.dictionary.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise damage_error(path, error) from error
    if not 1 <= len(batches) <= (max_batches or len(batches)):
        raise damage_error(path, f"{len(batches)} batches")
    return batches


def has_nulls(name: str, column: pa.Array) -> bool:
    """True if a required value of the column, or of the lists and structs in it, is null."""
    if column.null_count and name not in _OPTIONAL:
        return True
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return has_nulls("items", column.flatten())
    if pa.types.is_struct(column.type):
        return any(has_nulls(field.name, part) for field, part in zip(column.type, column.flatten(), strict=True))
    return False


def _view(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=True)


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise damage_error(path, error) from error
