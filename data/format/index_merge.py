"""Writing an index: the rows of every shard, and the merge of all rows that makes a folder a dataset."""

from __future__ import annotations

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
from data.format import index as ix
from data.format.index_file import batches_of, damaged, has_holes, statistics_header

_OPEN_PARTS = 32
_CRC32_BYTES = 4  # behind the rows of a shard


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
    with replace_file(path) as file:
        file.write(content.getvalue())
        file.write(zlib.crc32(content.getvalue()).to_bytes(_CRC32_BYTES, "little"))


def read_rows(path: Path, num_mels: int) -> pa.RecordBatch:
    """rows-NNNNN.arrow as one batch, memory-mapped. Raises UserError where it is not one."""
    try:
        whole = pa.memory_map(str(path)).read_buffer()
        content = whole.slice(0, max(0, whole.size - _CRC32_BYTES))
        if zlib.crc32(content).to_bytes(_CRC32_BYTES, "little") != whole.slice(content.size):
            raise damaged(path, "its checksum is wrong")
        (batch,) = batches_of(path, pa.BufferReader(content), ix.rows_schema(num_mels), most=1)
        batch.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    if not len(batch) or any(has_holes(name, batch[name]) for name in batch.schema.names):
        raise damaged(path, "no rows, or rows with holes")
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

    Memory is bounded by the ids, the numbers and one batch. Raises UserError where two recordings share an id, or where
    there are not as many as `expected`.
    """
    num_mels = features.num_mels
    ids = pa.chunked_array([pa.array(read_rows(part, num_mels)["id"].to_pylist(), pa.string()) for part in parts])
    if expected not in (None, len(ids)):
        raise UserError(f"{folder}: {len(ids)} of {expected} recordings have rows-*.arrow files: restore the others")
    order = pc.sort_indices(ids).to_numpy().astype(np.int64)
    _check_unique(ids, order, folder)
    begins = np.concatenate([[0], np.cumsum([len(chunk) for chunk in ids.chunks])])
    del ids
    known = {label: _distinct(parts, label, num_mels) for label in ix.LABELS}
    fingerprint, sums, squares = ix.Fingerprint(features.hash()), np.zeros(num_mels), np.zeros(num_mels)
    numbers: list[pa.RecordBatch] = []
    with ExitStack() as stack:
        file = stack.enter_context(replace_file(folder / ix.RECORDINGS_FILE))
        recordings = stack.enter_context(pa.ipc.new_file(file, ix.recordings_schema()))
        statistics = stack.enter_context(replace_file(folder / ix.STATISTICS_FILE))
        statistics.write(statistics_header(len(order), num_mels))
        for batch in _gathered(parts, begins, order, num_mels):
            fingerprint.update(batch)
            recordings.write_batch(batch.select(ix.recordings_schema().names))
            mean, std = (batch[v].flatten().to_numpy().reshape(len(batch), num_mels) for v in ("mean", "std"))
            statistics.write(np.stack([mean, std], axis=1).tobytes())
            frames, mean = batch["frames"].to_numpy(), mean.astype(np.float64)
            sums, squares = sums + frames @ mean, squares + frames @ (std.astype(np.float64) ** 2 + mean**2)
            numbers.append(_numbers(batch, known))
    with replace_file(folder / ix.INDEX_FILE) as file, pa.ipc.new_file(file, ix.index_schema()) as writer:
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
    write_json(folder / ix.DATASET_FILE, fields)


def _check_unique(ids: pa.ChunkedArray, order: np.ndarray, folder: Path) -> None:
    ordered = ids.take(pa.array(order)).combine_chunks()
    twice = pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    if twice.any():
        first = ordered[int(np.flatnonzero(twice)[0])].as_py()
        count = int(twice.sum())
        raise UserError(f"{folder}: {count} recordings share their id with another, first {first!r}: rename them")


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
