"""Rows of Parquet and Arrow files with an audio column: listed without the audio, which is later read row by row.

An audio column is `struct<bytes: binary, path: string>` (or plain binary), as the `datasets` library writes it.
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
from data.recording import Recording

# Rows that are decoded together: few, because a row may hold an hour of audio.
_ROWS = 8
# Maximum number of rows of a file: a damaged file must not exhaust the memory.
MAX_ROWS = 10_000_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """Location of a row."""

    address: str
    """Local path, or an address of fsspec, such as hf://datasets/OWNER/NAME@REVISION/FILE."""
    group: int
    """Row group of a Parquet file; -1 for an Arrow stream."""
    row: int
    """Row number in the row group or the Arrow stream."""
    column: str
    """Audio column."""

    def __str__(self) -> str:
        group = f", row group {self.group}" if self.group >= 0 else ""
        return f"{self.address}{group}, row {self.row}"


@dataclass(frozen=True)
class RowSource:
    """Recording whose encoded audio file is a cell of a table."""

    recording: Recording
    place: Place
    cache: FileCache

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        """Decode the audio. Raises UserError naming file and row if the cell or its audio cannot be read."""
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
            # The path is not followed: it could name any file of this machine.
            raise UserError(f"{place}: column {place.column!r} holds no audio bytes (path: {str(path)[:200]!r})")
        return Utterance.read(self.recording, audio_blocks(io.BytesIO(data), features, str(place)))


class _GroupReader:
    """Forward reader of the audio of a row group, a few rows at a time: memory does not grow with the group."""

    def __init__(self, address: str, group: int, column: str, cache: FileCache) -> None:
        self.key = (address, group, column, cache)
        file = pq.ParquetFile(cache.open(address), pre_buffer=False, buffer_size=1 << 20)
        self._batches = file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False)
        self._start = self._stop = 0
        self._cells: pa.ChunkedArray | pa.Array = pa.array([])

    def passed(self, row: int) -> bool:
        return row < self._start

    def cell(self, row: int) -> Any:
        while row >= self._stop:
            batch = next(self._batches, None)
            if batch is None:
                raise IndexError(f"the row group ends after {self._stop} rows")
            self._start, self._stop, self._cells = self._stop, self._stop + len(batch), batch.column(0)
        return self._cells[row - self._start].as_py()


_reader: _GroupReader | None = None


def _parquet_cell(place: Place, cache: FileCache) -> Any:
    """Read a cell. The row group stays open, because a process reads rows in the order of its sources."""
    global _reader
    key = (place.address, place.group, place.column, cache)
    if _reader is None or _reader.key != key or _reader.passed(place.row):
        _reader = None  # closes the file even if the next one cannot be opened
        _reader = _GroupReader(*key)
    reader, _reader = _reader, None
    cell = reader.cell(place.row)
    _reader = reader  # kept only after a successful read
    return cell


def _arrow_cell(place: Place) -> Any:
    column = _arrow_table(place.address).column(place.column)
    return column[place.row].as_py()


@lru_cache(maxsize=2)
def _arrow_table(path: str) -> pa.Table:
    """Memory-mapped table: pages are read on access."""
    with pa.memory_map(path) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
    table.validate(full=True)  # offsets are trusted from here on
    return table


def read_schema(address: str) -> pa.Schema:
    """Schema of a local or remote Parquet file or of an Arrow stream. Raises UserError naming the file."""
    return _with_file_errors(address, lambda: _schema(address))


def read_columns(address: str, columns: list[str]) -> pa.Table:
    """Columns of all rows as large_string, and int32 'group' and 'row' with the location; 'a.b' is field b of a.

    Of a remote file, only the byte ranges of these columns are downloaded. Raises UserError naming the file.
    """
    return _with_file_errors(address, lambda: _columns(address, columns))


def _with_file_errors(address: str, action: Callable[[], _T]) -> _T:
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
            raise ValueError(f"the file declares {sum(counts)} rows; at most {MAX_ROWS} are read")
        table = file.read(columns=columns, use_threads=False)
    texts = {name: _column(table, name).cast(pa.large_string()) for name in columns}
    numbers = [-1] if _kind(address) == "Arrow" else range(len(counts))
    texts["group"] = pa.array(np.repeat(np.array(numbers, np.int32), counts))
    texts["row"] = pa.array(np.concatenate([np.arange(count, dtype=np.int32) for count in [0, *counts]]))
    listed = pa.table(texts)  # ValueError if the length of a column differs from the declared one
    listed.validate(full=True)  # Parquet does not guarantee UTF-8
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
    # Small requests, because the footer and the text columns are small pieces between the audio.
    return pq.ParquetFile(store.open(name, block_size=1 << 20), pre_buffer=True)
