"""Writer of the index: the rows of every shard, and the merge of all rows, which completes a dataset."""

from __future__ import annotations

import dataclasses
import hashlib
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

from common.errors import UserError
from common.files import replace_file, write_json
from data.features import FeatureSettings
from data.format.index import damage_error, has_nulls, read_batches
from data.format.schema import (
    BATCH_ROWS,
    DATASET_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    LABELS,
    RECORDINGS_FILE,
    STATISTICS_FILE,
    Encoding,
    index_schema,
    recordings_schema,
    statistics_header,
)
from data.recording import Recording
from data.transcripts import Word

_MAX_OPEN_PARTS = 32
_CRC32_BYTES = 4  # after the rows of a shard


class Fingerprint:
    """SHA-256 over the recordings in the order of the index: ids, audio (by checksums) and labels.

    It does not cover positions in shards, so it is the same for a dataset written in one pass, in parts, or with
    interruptions.
    """

    def __init__(self, feature_hash: str) -> None:
        self._digest = hashlib.sha256(f"{FORMAT_VERSION} {feature_hash}".encode())

    def update(self, batch: pa.RecordBatch) -> None:
        names = ["id", "frames", "crc32", "language", "speaker", "split", "text", "words", "excluded"]
        for first in range(0, len(batch), 64):  # the words of an hour-long recording are large as Python objects
            for row in batch.select(names).slice(first, 64).to_pylist():
                self._digest.update(json.dumps(row, sort_keys=True).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def format_fields(features: FeatureSettings, encoding: Encoding) -> dict[str, Any]:
    """Common fields of dataset.json and preparing.json."""
    fields = {"format_version": FORMAT_VERSION, "layout": encoding}
    return {**fields, "features": features.to_dict(), "feature_hash": features.hash()}


def metadata_row(recording: Recording) -> dict[str, Any]:
    """Metadata of a recording as values of the index's columns. Raises UserError for text that is not Unicode."""
    row = {field.name: getattr(recording, field.name) for field in dataclasses.fields(Recording)}
    if recording.words is not None:
        row["words"] = [Word(*word)._asdict() for word in recording.words]
    if recording.excluded is not None:
        row["excluded"] = [{"start": start, "end": end} for start, end in recording.excluded]
    try:
        for name in ("id", "text", *LABELS):
            if name != "text" or row[name] is not None:
                row[name].encode()
        for word in row["words"] or ():
            word["word"].encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise UserError(
            f"recording {recording.id!r}: an id, text, word or label is not Unicode text ({error})"
        ) from None
    return row


def rows_schema(num_mels: int) -> pa.Schema:
    """Columns of rows-NNNNN.arrow: those of all three index files, for the recordings of a shard."""
    labels = [(name, pa.string()) for name in LABELS]
    vectors = [(name, pa.list_(pa.float32(), num_mels)) for name in ("mean", "std")]
    numbers = [field for field in index_schema() if field.name not in LABELS]
    return pa.schema([*numbers, *labels, *recordings_schema(), *vectors])


def write_rows(path: Path, rows: Sequence[dict[str, Any]], num_mels: int) -> None:
    """Write rows-NNNNN.arrow, followed by its CRC-32."""
    arrays = []
    schema = rows_schema(num_mels)
    for field in schema:
        values = [row[field.name] for row in rows]
        if field.name in ("mean", "std"):
            arrays.append(pa.FixedSizeListArray.from_arrays(np.concatenate(values).astype(np.float32), num_mels))
        else:
            arrays.append(pa.array(values, field.type))
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    with replace_file(path) as file:
        file.write(content.getvalue())
        file.write(zlib.crc32(content.getvalue()).to_bytes(_CRC32_BYTES, "little"))


def read_rows(path: Path, num_mels: int) -> pa.RecordBatch:
    """Memory-map rows-NNNNN.arrow as one batch. Raises UserError if it is damaged."""
    try:
        buffer = pa.memory_map(str(path)).read_buffer()
        content = buffer.slice(0, max(0, buffer.size - _CRC32_BYTES))
        if zlib.crc32(content).to_bytes(_CRC32_BYTES, "little") != buffer.slice(content.size):
            raise damage_error(path, "its checksum is wrong")
        (batch,) = read_batches(path, pa.BufferReader(content), rows_schema(num_mels), max_batches=1)
        batch.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise damage_error(path, error) from error
    if not len(batch) or any(has_nulls(name, batch[name]) for name in batch.schema.names):
        raise damage_error(path, "no rows, or rows with nulls")
    return batch


def write_dataset(
    folder: Path,
    parts: Sequence[Path],
    features: FeatureSettings,
    encoding: Encoding,
    name: str,
    shards: int,
    expected: int | None = None,
) -> None:
    """Merge the rows of all parts, sorted by id, and write dataset.json, which makes the folder a dataset.

    Memory is bounded by the ids, the numeric columns and one batch. Raises UserError if two recordings share an id, or
    if their number is not `expected`.
    """
    num_mels = features.num_mels
    ids = pa.chunked_array([pa.array(read_rows(part, num_mels)["id"].to_pylist(), pa.string()) for part in parts])
    if expected not in (None, len(ids)):
        raise UserError(f"{folder}: {len(ids)} of {expected} recordings have rows-*.arrow files: restore the others")
    order = pc.sort_indices(ids).to_numpy().astype(np.int64)
    _check_unique(ids, order, folder)
    part_starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in ids.chunks])])
    del ids
    label_values = {label: _distinct_values(parts, label, num_mels) for label in LABELS}
    fingerprint, sums, squares = Fingerprint(features.hash()), np.zeros(num_mels), np.zeros(num_mels)
    index_batches: list[pa.RecordBatch] = []
    with ExitStack() as stack:
        file = stack.enter_context(replace_file(folder / RECORDINGS_FILE))
        recordings = stack.enter_context(pa.ipc.new_file(file, recordings_schema()))
        statistics = stack.enter_context(replace_file(folder / STATISTICS_FILE))
        statistics.write(statistics_header(len(order), num_mels))
        for batch in _sorted_batches(parts, part_starts, order, num_mels):
            fingerprint.update(batch)
            recordings.write_batch(batch.select(recordings_schema().names))
            mean, std = (batch[v].flatten().to_numpy().reshape(len(batch), num_mels) for v in ("mean", "std"))
            statistics.write(np.stack([mean, std], axis=1).tobytes())
            frames, mean = batch["frames"].to_numpy(), mean.astype(np.float64)
            sums, squares = sums + frames @ mean, squares + frames @ (std.astype(np.float64) ** 2 + mean**2)
            index_batches.append(_index_columns(batch, label_values))
    with replace_file(folder / INDEX_FILE) as file, pa.ipc.new_file(file, index_schema()) as writer:
        writer.write_batch(pa.concat_batches(index_batches))
    frames = sum(int(pc.sum(batch["frames"]).as_py()) for batch in index_batches)
    fields = {
        "name": name,
        **format_fields(features, encoding),
        "recordings": len(order),
        "frames": frames,
        "hours": frames / features.frames_per_second / 3600,
        "shards": shards,
        "mean": (sums / frames).tolist(),
        "std": np.sqrt(np.maximum(squares / frames - (sums / frames) ** 2, 0)).tolist(),
        "fingerprint": fingerprint.hexdigest(),
    }
    write_json(folder / DATASET_FILE, fields)


def _check_unique(ids: pa.ChunkedArray, order: np.ndarray, folder: Path) -> None:
    ordered = ids.take(pa.array(order)).combine_chunks()
    repeated = pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    if repeated.any():
        first = ordered[int(np.flatnonzero(repeated)[0])].as_py()
        count = int(repeated.sum())
        raise UserError(f"{folder}: {count} recordings share their id with another, first {first!r}: rename them")


def _distinct_values(parts: Iterable[Path], column: str, num_mels: int) -> pa.Array:
    values: set[str] = set()
    for part in parts:
        values.update(pc.unique(read_rows(part, num_mels)[column]).to_pylist())
    return pa.array(sorted(values), pa.string())


def _sorted_batches(
    parts: Sequence[Path], part_starts: np.ndarray, order: np.ndarray, num_mels: int
) -> Iterator[pa.RecordBatch]:
    """Batches of BATCH_ROWS rows in the given order; `order` numbers the rows of all parts, concatenated."""
    cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def part(number: int) -> pa.RecordBatch:
        if number not in cache:
            if len(cache) >= _MAX_OPEN_PARTS:
                cache.popitem(last=False)
            cache[number] = read_rows(parts[number], num_mels)
        cache.move_to_end(number)
        return cache[number]

    for first in range(0, len(order), BATCH_ROWS):
        rows = order[first : first + BATCH_ROWS]
        row_parts = np.searchsorted(part_starts, rows, side="right") - 1
        batches = [
            part(number).take(pa.array(rows[row_parts == number] - part_starts[number]))
            for number in np.unique(row_parts).tolist()
        ]
        positions = np.argsort(np.argsort(row_parts, kind="stable"), kind="stable")
        yield pa.concat_batches(batches).take(pa.array(positions))


def _index_columns(batch: pa.RecordBatch, label_values: dict[str, pa.Array]) -> pa.RecordBatch:
    """Columns of index.arrow, from rows of `rows_schema`."""
    schema = index_schema()
    columns = {name: batch[name] for name in schema.names}
    for name, values in label_values.items():
        columns[name] = pa.DictionaryArray.from_arrays(pc.index_in(columns[name], values), values)
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)
