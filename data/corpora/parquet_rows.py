"""Rows of Parquet and Arrow files with sound in a column: listed without the sound, read one at a time.

The sound of a column is `struct<bytes: binary, path: string>` (or plain binary), as the `datasets` library writes it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.errors import UserError
from data.audio.reading import audio_blocks
from data.corpora.base import Utterance
from data.corpora.remote import FileCache, retried
from data.features import FeatureSettings
from data.format.schema import Recording

# Rows that are decoded together: few, for a row may hold a whole hour.
_ROWS = 8
# Rows that a file may announce: a damaged one must not claim all memory.
MAX_ROWS = 10_000_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """Where a row is."""

    address: str
    """Local path, or an address that fsspec knows, such as hf://datasets/OWNER/NAME@REVISION/FILE."""
    group: int
    """Row group of a Parquet file; -1: the file is an Arrow stream."""
    row: int
    """In the row group, or in the Arrow stream."""
    column: str
    """Of the sound."""

    def __str__(self) -> str:
        group = f", row group {self.group}" if self.group >= 0 else ""
        return f"{self.address}{group}, row {self.row}"


@dataclass(frozen=True)
class RowSource:
    """A recording whose encoded audio file is a cell of a table."""

    recording: Recording
    place: Place
    cache: FileCache

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        """Raises UserError naming file and row where the cell, or the audio in it, cannot be read."""
        place = self.place
        try:
            cell = _arrow_cell(place) if place.group < 0 else _parquet_cell(place, self.cache)
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError, MemoryError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{place}: cannot be read ({error}); the file is damaged: fetch it again") from error
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes) or not data:
            path = cell.get("path") if isinstance(cell, dict) else cell
            # A path in a table could name any file of this machine: only sound within the table is read.
            raise UserError(f"{place}: column {place.column!r} holds no audio bytes (path: {str(path)[:200]!r})")
        return Utterance.read(self.recording, audio_blocks(io.BytesIO(data), features, str(place)))


class _GroupReader:
    """Reads the sound of a row group forward, a few rows at a time, so that memory does not grow with the group."""

    def __init__(self, address: str, group: int, column: str, cache: FileCache) -> None:
        self.key = (address, group, column, cache)
        file = pq.ParquetFile(cache.open(address), pre_buffer=False, buffer_size=1 << 20)
        self._batches = file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False)
        self._begin = self._end = 0
        self._cells: pa.ChunkedArray | pa.Array = pa.array([])

    def passed(self, row: int) -> bool:
        return row < self._begin

    def cell(self, row: int) -> Any:
        while row >= self._end:
            batch = next(self._batches, None)
            if batch is None:
                raise IndexError(f"the row group ends after {self._end} rows")
            self._begin, self._end, self._cells = self._end, self._end + len(batch), batch.column(0)
        return self._cells[row - self._begin].as_py()


_reader: _GroupReader | None = None


def _parquet_cell(place: Place, cache: FileCache) -> Any:
    """A process reads rows in the order of its sources: the group that it stands in stays open."""
    global _reader
    key = (place.address, place.group, place.column, cache)
    if _reader is None or _reader.key != key or _reader.passed(place.row):
        _reader = None  # closes the file, also when opening the next one fails
        _reader = _GroupReader(*key)
    reader, _reader = _reader, None
    cell = reader.cell(place.row)
    _reader = reader  # kept only where reading went well
    return cell


def _arrow_cell(place: Place) -> Any:
    column = _arrow_table(place.address).column(place.column)
    return column[place.row].as_py()


@lru_cache(maxsize=2)
def _arrow_table(path: str) -> pa.Table:
    """Memory-mapped: nothing is read but what is looked at."""
    with pa.memory_map(path) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
    table.validate(full=True)  # offsets are believed from here on
    return table


def read_schema(address: str) -> pa.Schema:
    """The columns of a Parquet file (also a remote one) or of an Arrow stream. Raises UserError naming the file."""
    return _described(address, lambda: _schema(address))


def read_columns(address: str, columns: list[str]) -> pa.Table:
    """Those columns of all rows as large_string, and int32 'group' and 'row', where the row is; 'a.b' is a's field b.

    Of a remote file only the ranges of these columns are fetched. Raises UserError naming the file.
    """
    return _described(address, lambda: _columns(address, columns))


def _described(address: str, action: Callable[[], _T]) -> _T:
    try:
        return retried(action, address) if "://" in address else action()
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{address}: cannot be read as {_kind(address)} ({error}); fetch it again") from error


def _kind(address: str) -> str:
    return "Arrow" if address.endswith(".arrow") else "Parquet"


def _schema(address: str) -> pa.Schema:
    return _arrow_table(address).schema if _kind(address) == "Arrow" else _open_ranges(address).schema_arrow


def _columns(address: str, columns: list[str]) -> pa.Table:
    if _kind(address) == "Arrow":
        table = _arrow_table(address)
        counts = [len(table)]
    else:
        file = _open_ranges(address)
        counts = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        if min(counts, default=0) < 0 or sum(counts) > MAX_ROWS:
            raise ValueError(f"{sum(counts)} rows are announced; at most {MAX_ROWS} are read from a file")
        table = file.read(columns=columns, use_threads=False)
    found = {name: _column(table, name).cast(pa.large_string()) for name in columns}
    numbers = [-1] if _kind(address) == "Arrow" else range(len(counts))
    found["group"] = pa.array(np.repeat(np.array(numbers, np.int32), counts))
    found["row"] = pa.array(np.concatenate([np.arange(count, dtype=np.int32) for count in [0, *counts]]))
    listed = pa.table(found)  # ValueError where a column is shorter or longer than announced
    listed.validate(full=True)  # Parquet does not see to it that text is UTF-8
    return listed


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name in table.column_names:
        return table.column(name)
    outer, _, inner = name.partition(".")
    if outer not in table.column_names:
        raise ValueError(f"it has no column {outer!r}, which other files of the split have")
    return pc.struct_field(table.column(outer), inner)


def _open_ranges(address: str) -> pq.ParquetFile:
    if "://" not in address:
        return pq.ParquetFile(pa.OSFile(address))
    store, name = fsspec.core.url_to_fs(address)
    # Footer and text columns lie in small pieces between the sound: small ranges are asked for.
    return pq.ParquetFile(store.open(name, block_size=1 << 20), pre_buffer=True)
