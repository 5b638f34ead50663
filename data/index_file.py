"""The index of a dataset: merged from the rows of its shards, and memory-mapped for reading.

Nothing of it is loaded when it is opened, so ten million recordings cost no memory of their own, and the pages that
are touched are shared by all processes of a machine.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data import index as ix
from data.errors import DataError
from data.features import FeatureSettings

_OPEN_PARTS = 32
_HEADER_BYTES = 256  # of statistics.safetensors
_CRC32_BYTES = 4  # behind the rows of a shard
_OPTIONAL = ("text", "words", "excluded", "confidence", "block_bytes")


class Index:
    """index.arrow and recordings.arrow, memory-mapped.

    What the files say is checked before it is followed: sizes and types when they are opened, texts and lists a batch
    at a time when one of the batch is first looked at.

    Attributes:
        shard: int32 [N]. offset, bytes, frames: int64 [N]. All are views of the file.
        labels: for 'language', 'speaker' and 'split' the values, and int32 [N] which of them a recording has.

    Raises:
        DataError: not an index of this format, or damaged.
    """

    def __init__(self, index: Path, recordings: Path) -> None:
        self.path, self.recordings = index, recordings
        (batch,) = _mapped(index, ix.index_schema(), most=1)
        arrays = {name: batch.column(name) for name in ix.index_schema().names}
        codes = {name: arrays[name].indices for name in ix.LABELS}
        if any(array.null_count for array in [*arrays.values(), *codes.values()]):
            raise _damaged(index, "a column with holes")
        self.shard, self.offset = _view(arrays["shard"]), _view(arrays["offset"])
        self.bytes, self.frames = _view(arrays["bytes"]), _view(arrays["frames"])
        self.labels = {name: (arrays[name].dictionary.to_pylist(), _view(codes[name])) for name in ix.LABELS}
        if not len(self) or min(self.frames.min(), self.bytes.min(), self.offset.min() - 7) < 1 or self.shard.min() < 0:
            raise _damaged(index, "no recordings, or frames, offsets or shards that cannot be")
        if self.shard.max() >= 10**7 or max(self.frames.max(), self.bytes.max(), self.offset.max()) >= 2**50:
            raise _damaged(index, "frames, offsets or shards that cannot be")
        for name, (values, code) in self.labels.items():
            if code.min() < 0 or code.max() >= len(values):
                raise _damaged(index, f"{name} that is not among its {len(values)} values")
        self.batches = _mapped(recordings, ix.recordings_schema())
        self._rows = self.batches[0].num_rows
        sizes = [batch.num_rows for batch in self.batches]
        if set(sizes[:-1]) - {self._rows} or sizes[-1] > self._rows or sum(sizes) != len(self):
            raise _damaged(recordings, f"it has {sum(sizes)} rows, {index.name} {len(self)}")
        self._checked: set[tuple[int, str]] = set()

    def __len__(self) -> int:
        return len(self.frames)

    def value(self, name: str, recording: int) -> Any:
        """What a column of recordings.arrow holds for a recording, as a Python object."""
        return self._scalar(name, recording).as_py()

    def block_bytes(self, recording: int) -> np.ndarray:
        """Bytes of every block of a recording of a compressed layout: uint32 [blocks]."""
        blocks = self._scalar("block_bytes", recording).values
        if blocks is None or blocks.null_count:
            raise _damaged(self.recordings, f"row {recording} has no block_bytes")
        return blocks.to_numpy()

    def _scalar(self, name: str, recording: int) -> pa.Scalar:
        number, row = divmod(int(recording), self._rows)
        column = self.batches[number].column(name)
        if (number, name) not in self._checked:
            try:
                column.validate(full=True)
            except pa.ArrowException as error:
                raise _damaged(self.recordings, error) from error
            if _holes(name, column):
                raise _damaged(self.recordings, f"{name} with holes")
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


def _damaged(path: Path, why: object) -> DataError:
    return DataError(f"{path}: cannot be read ({why}); restore the file or prepare the dataset again")


def _holes(name: str, column: pa.Array) -> bool:
    """Whether something is not told that every recording has, or every word, stretch and block of a list."""
    if column.null_count and name not in _OPTIONAL:
        return True
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return _holes("items", column.flatten())
    if pa.types.is_struct(column.type):
        return any(_holes(field.name, part) for field, part in zip(column.type, column.flatten(), strict=True))
    return False


def _mapped(path: Path, schema: pa.Schema, most: int | None = None) -> list[pa.RecordBatch]:
    """The batches (at least one) of an Arrow file. Texts and lists in them are not checked yet, their sizes are."""
    try:
        return _batches(path, pa.memory_map(str(path)), schema, most)
    except OSError as error:
        raise _damaged(path, error) from error


def _batches(path: Path, source: pa.NativeFile, schema: pa.Schema, most: int | None = None) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(source)
        if not reader.schema.equals(schema):
            raise DataError(f"{path}: has other columns than this version's; refused. Prepare the dataset again")
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()
            for column in batch.columns:
                if pa.types.is_dictionary(column.type):
                    column.dictionary.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    if not 1 <= len(batches) <= (most or len(batches)):
        raise _damaged(path, f"{len(batches)} batches")
    return batches


def write_rows(path: Path, rows: Sequence[dict[str, Any]], num_mels: int) -> None:
    """Write rows-NNNNN.arrow: what the index will hold of a shard's recordings."""
    arrays = []
    schema = ix.rows_schema(num_mels)
    for field in schema:
        values = [row[field.name] for row in rows]
        if field.name in ("mean", "std"):
            arrays.append(pa.FixedSizeListArray.from_arrays(np.concatenate(values).astype(np.float32), num_mels))
        else:
            arrays.append(pa.array(values, field.type))
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    with ix.replace_file(path) as file:
        file.write(content.getvalue())
        file.write(zlib.crc32(content.getvalue()).to_bytes(_CRC32_BYTES, "little"))


def read_rows(path: Path, num_mels: int) -> pa.RecordBatch:
    """rows-NNNNN.arrow as one batch, memory-mapped. Raises DataError where it is not one."""
    try:
        whole = pa.memory_map(str(path)).read_buffer()
        content = whole.slice(0, max(0, whole.size - _CRC32_BYTES))
        if zlib.crc32(content).to_bytes(_CRC32_BYTES, "little") != whole.slice(content.size):
            raise _damaged(path, "its checksum is wrong")
        (batch,) = _batches(path, pa.BufferReader(content), ix.rows_schema(num_mels), most=1)
        batch.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    if not len(batch) or any(_holes(name, batch[name]) for name in batch.schema.names):
        raise _damaged(path, "no rows, or rows with holes")
    return batch


def write_dataset(
    folder: Path,
    parts: Sequence[Path],
    features: FeatureSettings,
    layout: ix.Layout,
    name: str,
    shards: int,
    expected: int | None = None,
) -> None:
    """Merge the rows of all parts, sorted by id, and write dataset.json: from then on the folder is a dataset.

    Memory is bounded by the ids, the numbers and one batch. Raises DataError where two recordings share an id, or where
    there are not as many as `expected`.
    """
    num_mels = features.num_mels
    ids = pa.chunked_array([pa.array(read_rows(part, num_mels)["id"].to_pylist(), pa.string()) for part in parts])
    if expected not in (None, len(ids)):
        raise DataError(f"{folder}: {len(ids)} of {expected} recordings have rows-*.arrow files: restore the others")
    order = pc.sort_indices(ids).to_numpy().astype(np.int64)
    _check_unique(ids, order, folder)
    begins = np.concatenate([[0], np.cumsum([len(chunk) for chunk in ids.chunks])])
    del ids
    known = {label: _distinct(parts, label, num_mels) for label in ix.LABELS}
    fingerprint, sums, squares = ix.Fingerprint(features.hash()), np.zeros(num_mels), np.zeros(num_mels)
    numbers: list[pa.RecordBatch] = []
    with ExitStack() as stack:
        file = stack.enter_context(ix.replace_file(folder / ix.RECORDINGS_FILE))
        recordings = stack.enter_context(pa.ipc.new_file(file, ix.recordings_schema()))
        statistics = stack.enter_context(ix.replace_file(folder / ix.STATISTICS_FILE))
        statistics.write(statistics_header(len(order), num_mels))
        for batch in _gathered(parts, begins, order, num_mels):
            fingerprint.update(batch)
            recordings.write_batch(batch.select(ix.recordings_schema().names))
            mean, std = (batch[v].flatten().to_numpy().reshape(len(batch), num_mels) for v in ("mean", "std"))
            statistics.write(np.stack([mean, std], axis=1).tobytes())
            frames, mean = batch["frames"].to_numpy(), mean.astype(np.float64)
            sums, squares = sums + frames @ mean, squares + frames @ (std.astype(np.float64) ** 2 + mean**2)
            numbers.append(_numbers(batch, known))
    with ix.replace_file(folder / ix.INDEX_FILE) as file, pa.ipc.new_file(file, ix.index_schema()) as writer:
        writer.write_batch(pa.concat_batches(numbers))
    frames = sum(int(pc.sum(batch["frames"]).as_py()) for batch in numbers)
    fields = {
        "name": name,
        **ix.head(features, layout),
        "recordings": len(order),
        "frames": frames,
        "hours": frames / features.frames_per_second / 3600,
        "shards": shards,
        "mean": (sums / frames).tolist(),
        "std": np.sqrt(np.maximum(squares / frames - (sums / frames) ** 2, 0)).tolist(),
        "fingerprint": fingerprint.hexdigest(),
    }
    ix.write_json(folder / ix.DATASET_FILE, fields)


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


def _check_unique(ids: pa.ChunkedArray, order: np.ndarray, folder: Path) -> None:
    ordered = ids.take(pa.array(order)).combine_chunks()
    twice = pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    if twice.any():
        first = ordered[int(np.flatnonzero(twice)[0])].as_py()
        count = int(twice.sum())
        raise DataError(f"{folder}: {count} recordings share their id with another, first {first!r}: rename them")


def _distinct(parts: Iterable[Path], name: str, num_mels: int) -> pa.Array:
    found: set[str] = set()
    for part in parts:
        found.update(pc.unique(read_rows(part, num_mels)[name]).to_pylist())
    return pa.array(sorted(found), pa.string())


def _gathered(parts: Sequence[Path], begins: np.ndarray, order: np.ndarray, num_mels: int) -> Iterator[pa.RecordBatch]:
    """Batches of BATCH_ROWS rows of the parts, taken in the given order."""
    opened: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def part(number: int) -> pa.RecordBatch:
        if number not in opened:
            if len(opened) >= _OPEN_PARTS:
                opened.popitem(last=False)
            opened[number] = read_rows(parts[number], num_mels)
        opened.move_to_end(number)
        return opened[number]

    for first in range(0, len(order), ix.BATCH_ROWS):
        rows = order[first : first + ix.BATCH_ROWS]
        of = np.searchsorted(begins, rows, side="right") - 1
        pieces = [part(n).take(pa.array(rows[of == n] - begins[n])) for n in np.unique(of).tolist()]
        places = np.argsort(np.argsort(of, kind="stable"), kind="stable")
        yield pa.concat_batches(pieces).take(pa.array(places))


def _numbers(batch: pa.RecordBatch, known: dict[str, pa.Array]) -> pa.RecordBatch:
    """The columns of index.arrow."""
    schema = ix.index_schema()
    columns = {name: batch[name] for name in schema.names}
    for name, values in known.items():
        columns[name] = pa.DictionaryArray.from_arrays(pc.index_in(columns[name], values), values)
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)
