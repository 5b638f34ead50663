"""index.arrow: written batch by batch from its parts, memory-mapped for reading.

Nothing of it is loaded when it is opened, so ten million recordings cost no memory of their own, and the pages that
are touched are shared by all processes of a machine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data import index as ix
from data.errors import DataError
from data.features import FeatureSettings

_OPEN_PARTS = 32


class Column:
    """A column of integers in the index, as a read-only array [N] whose pages are read when they are looked at.

    `column[i]` is an int, `column[numbers]` a new int64 array. `chunks` are views of the file, in order.
    """

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self.chunks = list(chunks)
        self._rows = len(chunks[0]) if chunks else 1
        self._size = sum(map(len, self.chunks))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: Any) -> Any:
        if np.ndim(key) == 0:
            number, row = divmod(int(key), self._rows)
            return int(self.chunks[number][row])
        numbers: np.ndarray = np.asarray(key)
        if len(self.chunks) == 1:
            return self.chunks[0][numbers].astype(np.int64)
        out = np.empty(len(numbers), np.int64)
        batch = numbers // self._rows
        by_batch = np.argsort(batch, kind="stable")
        edges = np.flatnonzero(np.diff(batch[by_batch], prepend=-1, append=-1))
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            these = by_batch[first:last]
            out[these] = self.chunks[int(batch[these[0]])][numbers[these] % self._rows]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.chunks).astype(dtype or np.int64)

    def tolist(self) -> list[int]:
        return np.asarray(self).tolist()


class IndexFile:
    """An index opened for reading, memory-mapped.

    What the file says is checked before it is followed: sizes and types when it is opened, texts and lists a batch at a
    time when one of the batch is first looked at.

    Raises:
        DataError: not an index of this format, or damaged.
    """

    def __init__(self, path: Path, num_mels: int) -> None:
        self.path = path
        self.num_mels = num_mels
        self._checked: set[tuple[int, str]] = set()
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if not reader.schema.equals(ix.schema(num_mels)):
                raise DataError(f"{path}: has other columns than this version's; refused. Prepare the dataset again")
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            for batch in self.batches:
                batch.validate()
            self.shard, self.offset, self.frames = (self._integers(name) for name in ("shard", "offset", "frames"))
            self.labels = {name: self._labels(name) for name in ix.LABEL_COLUMNS}
        except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise self._damaged(error) from error
        if any(batch.column("id").null_count for batch in self.batches):
            raise self._damaged("the column id has holes")
        sizes = [batch.num_rows for batch in self.batches]
        self._rows = sizes[0] if sizes else 1
        if not sizes or set(sizes[:-1]) - {self._rows} or not 0 < sizes[-1] <= self._rows:
            raise self._damaged("batches of unequal length")

    def __len__(self) -> int:
        return len(self.frames)

    def value(self, name: str, recording: int) -> Any:
        """What a column with texts or lists holds for a recording, as a Python object."""
        batch, row = divmod(int(recording), self._rows)
        column = self.batches[batch].column(name)
        if (batch, name) not in self._checked:
            try:
                column.validate(full=True)
            except pa.ArrowException as error:
                raise self._damaged(error) from error
            self._checked.add((batch, name))
        return column[row].as_py()

    def vector(self, name: str, recording: int) -> np.ndarray:
        """`mean` or `std` of a recording: float32 [M], a view of the file."""
        batch, row = divmod(int(recording), self._rows)
        column = self.batches[batch].column(name)
        first = (column.offset + row) * self.num_mels
        return column.values.slice(first, self.num_mels).to_numpy(zero_copy_only=True)

    def label(self, name: str, recording: int) -> str:
        """`language`, `speaker` or `split` of a recording."""
        names, codes = self.labels[name]
        code = codes[recording]
        if not 0 <= code < len(names):
            raise self._damaged(f"{name} of row {recording} is not among its {len(names)} values")
        return names[code]

    def find(self, id: str) -> int | None:
        """The number of the recording with this id, by bisection; None where there is none."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.value("id", middle) < id else (low, middle)
        return low if low < len(self) and self.value("id", low) == id else None

    def _integers(self, name: str) -> Column:
        columns = [batch.column(name) for batch in self.batches]
        if any(column.null_count for column in columns):
            raise self._damaged(f"the column {name} has holes")
        return Column([column.to_numpy(zero_copy_only=True) for column in columns])

    def _labels(self, name: str) -> tuple[list[str], Column]:
        columns = [batch.column(name) for batch in self.batches]
        if any(column.indices.null_count for column in columns):
            raise self._damaged(f"the column {name} has holes")
        dictionary = columns[0].dictionary if columns else pa.array([], pa.string())
        dictionary.validate(full=True)
        return dictionary.to_pylist(), Column([column.indices.to_numpy(zero_copy_only=True) for column in columns])

    def _damaged(self, why: object) -> DataError:
        return DataError(f"{self.path}: cannot be read ({why}); restore the file or prepare the dataset again")


def write_part(path: Path, columns: dict[str, list[Any]], num_mels: int) -> None:
    """Write some rows of an index, sorted by id, to be merged later. columns: a list of values for every column."""
    arrays = []
    schema = ix.schema(num_mels, pa.string())
    for field in schema:
        values = columns[field.name]
        if field.name in ("mean", "std"):
            arrays.append(pa.FixedSizeListArray.from_arrays(np.concatenate(values).astype(np.float32), num_mels))
        else:
            arrays.append(pa.array(values, field.type))
    table = pa.Table.from_arrays(arrays, schema=schema).sort_by("id").combine_chunks()
    with ix.replace_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))


def read_part(path: Path, num_mels: int) -> pa.RecordBatch:
    """A part as one batch, memory-mapped. Raises DataError where it is not one."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(ix.schema(num_mels, pa.string())) or reader.num_record_batches != 1:
            raise DataError(f"{path}: is not a part of an index of this version; prepare the dataset in another folder")
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it and its shard, and prepare again") from error
    return batch


def write_dataset(folder: Path, parts: Sequence[Path], features: FeatureSettings, name: str, shards: int) -> None:
    """Merge the parts of an index, and write dataset.json: from then on the folder is a dataset."""
    fields = merge_parts(parts, folder / ix.INDEX_FILE, features.num_mels, features.hash())
    hours = fields["frames"] / features.frames_per_second / 3600
    totals = {"shards": shards, "hours": hours}
    ix.write_json(folder / ix.DATASET_FILE, {"name": name, **ix.head(features), **totals, **fields})


def merge_parts(parts: Sequence[Path], path: Path, num_mels: int, feature_hash: str) -> dict[str, Any]:
    """Write the index of all rows of the parts, sorted by id; memory is bounded by the ids and one batch.

    Returns fields of dataset.json: recordings, frames, mean, std, fingerprint.
    Raises DataError where two recordings share an id.
    """
    ids = pa.chunked_array([pa.array(read_part(part, num_mels)["id"].to_pylist(), pa.string()) for part in parts])
    order = pc.sort_indices(ids).to_numpy().astype(np.int64)
    _check_unique(ids, order)
    begins = np.concatenate([[0], np.cumsum([len(chunk) for chunk in ids.chunks])])
    del ids
    values = {name: _distinct(parts, name, num_mels) for name in ix.LABEL_COLUMNS}
    schema = ix.schema(num_mels)
    fingerprint, total = ix.Fingerprint(feature_hash), 0
    sums = squares = np.zeros(num_mels)
    with ix.replace_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in _gathered(parts, begins, order, num_mels):
            fingerprint.update(batch)
            frames = batch["frames"].to_numpy()
            shape = (len(frames), num_mels)
            mean, std = (batch[name].flatten().to_numpy().reshape(shape).astype(np.float64) for name in ("mean", "std"))
            total += int(frames.sum())
            sums, squares = sums + frames @ mean, squares + frames @ (std**2 + mean**2)
            writer.write_batch(_with_labels(batch, values, schema))
    mean = sums / total
    std = np.sqrt(np.maximum(squares / total - mean**2, 0))
    fields = {"recordings": int(begins[-1]), "frames": total, "mean": mean.tolist(), "std": std.tolist()}
    return {**fields, "fingerprint": fingerprint.hexdigest()}


def _check_unique(ids: pa.ChunkedArray, order: np.ndarray) -> None:
    ordered = ids.take(pa.array(order)).combine_chunks()
    twice = pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    if twice.any():
        first = ordered[int(np.flatnonzero(twice)[0])].as_py()
        raise DataError(f"{int(twice.sum())} recordings share their id with another, first {first!r}: rename them")


def _distinct(parts: Iterable[Path], name: str, num_mels: int) -> pa.Array:
    found: set[str] = set()
    for part in parts:
        found.update(pc.unique(read_part(part, num_mels)[name]).to_pylist())
    return pa.array(sorted(found), pa.string())


def _gathered(parts: Sequence[Path], begins: np.ndarray, order: np.ndarray, num_mels: int) -> Iterator[pa.RecordBatch]:
    """Batches of BATCH_ROWS rows of the parts, taken in the given order."""
    opened: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def part(number: int) -> pa.RecordBatch:
        if number not in opened:
            if len(opened) >= _OPEN_PARTS:
                opened.popitem(last=False)
            opened[number] = read_part(parts[number], num_mels)
        opened.move_to_end(number)
        return opened[number]

    for first in range(0, len(order), ix.BATCH_ROWS):
        rows = order[first : first + ix.BATCH_ROWS]
        of = np.searchsorted(begins, rows, side="right") - 1
        pieces = [part(n).take(pa.array(rows[of == n] - begins[n])) for n in np.unique(of).tolist()]
        places = np.argsort(np.argsort(of, kind="stable"), kind="stable")
        yield pa.concat_batches(pieces).take(pa.array(places))


def _with_labels(batch: pa.RecordBatch, values: dict[str, pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    columns = {name: batch[name] for name in schema.names}
    for name, known in values.items():
        columns[name] = pa.DictionaryArray.from_arrays(pc.index_in(columns[name], known), known)
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)
