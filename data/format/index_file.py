"""The index of a dataset, memory-mapped for reading; `data.index_merge` writes it.

Nothing of it is loaded when it is opened, so ten million recordings cost no memory of their own, and the pages that
are touched are shared by all processes of a machine.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import UserError
from data.format import index as ix

_HEADER_BYTES = 256  # of statistics.safetensors
_OPTIONAL = ("text", "words", "excluded", "confidence", "block_bytes")


class Index:
    """index.arrow and recordings.arrow, memory-mapped.

    What the files say is checked before it is followed: sizes and types when they are opened, texts and lists a batch
    at a time when one of the batch is first looked at.

    Attributes:
        shard: int32 [N]. offset, bytes, frames: int64 [N]. All are views of the file.
        labels: for 'language', 'speaker' and 'split' the values, and int32 [N] which of them a recording has.

    Raises:
        UserError: not an index of this format, or damaged.
    """

    def __init__(self, index: Path, recordings: Path) -> None:
        self.path, self.recordings = index, recordings
        self._pages = _mapped(index)
        (batch,) = batches_of(index, pa.py_buffer(self._pages), ix.index_schema(), most=1)
        arrays = {name: batch.column(name) for name in ix.index_schema().names}
        codes = {name: arrays[name].indices for name in ix.LABELS}
        if any(array.null_count for array in [*arrays.values(), *codes.values()]):
            raise damaged(index, "a column with holes")
        self.shard, self.offset = _view(arrays["shard"]), _view(arrays["offset"])
        self.bytes, self.frames = _view(arrays["bytes"]), _view(arrays["frames"])
        self.labels = {name: (arrays[name].dictionary.to_pylist(), _view(codes[name])) for name in ix.LABELS}
        if not len(self) or min(self.frames.min(), self.bytes.min(), self.offset.min() - 7) < 1 or self.shard.min() < 0:
            raise damaged(index, "no recordings, or frames, offsets or shards that cannot be")
        if self.shard.max() >= 10**7 or max(self.frames.max(), self.bytes.max(), self.offset.max()) >= 2**50:
            raise damaged(index, "frames, offsets or shards that cannot be")
        for name, (values, code) in self.labels.items():
            if code.min() < 0 or code.max() >= len(values):
                raise damaged(index, f"{name} that is not among its {len(values)} values")
        self.batches = batches_of(recordings, pa.py_buffer(_mapped(recordings)), ix.recordings_schema())
        self._rows = self.batches[0].num_rows
        sizes = [batch.num_rows for batch in self.batches]
        if set(sizes[:-1]) - {self._rows} or sizes[-1] > self._rows or sum(sizes) != len(self):
            raise damaged(recordings, f"it has {sum(sizes)} rows, {index.name} {len(self)}")
        self._checked: set[tuple[int, str]] = set()

    def __len__(self) -> int:
        return len(self.frames)

    def release(self) -> None:
        """Give up the pages of index.arrow that were looked at; they come back from the system's cache when needed."""
        self._pages.madvise(mmap.MADV_DONTNEED)

    def value(self, name: str, recording: int) -> Any:
        """What a column of recordings.arrow holds for a recording, as a Python object."""
        return self._scalar(name, recording).as_py()

    def block_bytes(self, recording: int) -> np.ndarray:
        """Bytes of every block of a recording of a compressed layout: uint32 [blocks]."""
        blocks = self._scalar("block_bytes", recording).values
        if blocks is None or blocks.null_count:
            raise damaged(self.recordings, f"row {recording} has no block_bytes")
        return blocks.to_numpy()

    def _scalar(self, name: str, recording: int) -> pa.Scalar:
        number, row = divmod(int(recording), self._rows)
        column = self.batches[number].column(name)
        if (number, name) not in self._checked:
            try:
                column.validate(full=True)
            except pa.ArrowException as error:
                raise damaged(self.recordings, error) from error
            if has_holes(name, column):
                raise damaged(self.recordings, f"{name} with holes")
            self._checked.add((number, name))
        return column[row]

    def label(self, name: str, recording: int) -> str:
        """`language`, `speaker` or `split` of a recording."""
        values, codes = self.labels[name]
        return values[codes[recording]]

    def find(self, id: str) -> int | None:
        """The number of the recording with this id, by bisection; None where there is none."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.value("id", middle) < id else (low, middle)
        return low if low < len(self) and self.value("id", low) == id else None


def _view(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=True)


def damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path}: cannot be read ({why}); restore the file or prepare the dataset again")


def has_holes(name: str, column: pa.Array) -> bool:
    """Whether something is not told that every recording has, or every word, stretch and block of a list."""
    if column.null_count and name not in _OPTIONAL:
        return True
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return has_holes("items", column.flatten())
    if pa.types.is_struct(column.type):
        return any(has_holes(field.name, part) for field, part in zip(column.type, column.flatten(), strict=True))
    return False


def _mapped(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise damaged(path, error) from error


def batches_of(path: Path, source: pa.Buffer, schema: pa.Schema, most: int | None = None) -> list[pa.RecordBatch]:
    """The batches (at least one) of an Arrow file. Texts and lists in them are not checked yet, their sizes are."""
    try:
        reader = pa.ipc.open_file(source)
        if not reader.schema.equals(schema):
            raise UserError(f"{path}: has other columns than this version's; refused. Prepare the dataset again")
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()
            for column in batch.columns:
                if pa.types.is_dictionary(column.type):
                    column.dictionary.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    if not 1 <= len(batches) <= (most or len(batches)):
        raise damaged(path, f"{len(batches)} batches")
    return batches


def statistics_header(recordings: int, num_mels: int) -> bytes:
    """Of a safetensors file with the one tensor mean_std, float32 [N, 2, M]."""
    shape = [recordings, 2, num_mels]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 8 * recordings * num_mels]}
    text = json.dumps({"mean_std": entry}).encode()
    return (_HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(_HEADER_BYTES - 8)


def statistics_range(recording: int, num_mels: int) -> tuple[int, int]:
    """Position and length in bytes of a recording's float32 [2, M] in statistics.safetensors."""
    size = 8 * num_mels
    return _HEADER_BYTES + recording * size, size
