"""Consistency checks of index, statistics, dataset.json and shard headers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import as_object, parse_json
from data.format.dataset import Dataset
from data.format.index_writer import Fingerprint
from data.format.schema import (
    DATASET_FILE,
    RECORDINGS_FILE,
    STATISTICS_FILE,
    shard_name,
    statistics_header,
    statistics_range,
    tensor_entry,
)
from data.shards.derive import stored_recording
from data.word_times.base import check_word_times

# Rows whose texts and words are Python objects at the same time, which bounds memory for recordings of hours.
_ROWS = 32
_STATISTICS_ROWS = 4096
_TOLERANCE = 1e-3
_ENTRY_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class Fault:
    """Damage of a recording, or of a file (id None)."""

    file: str
    """Name of the file in the dataset."""
    problem: str
    """Description, with recording and file."""
    id: str | None = None


def check_index(dataset: Dataset) -> list[Fault]:
    """Check ids, texts, word times and labels one by one, then all of them by the fingerprint."""
    fingerprint, last = Fingerprint(dataset.features.hash()), ""
    faults: list[Fault] = []
    try:
        for first, batch in _fingerprint_batches(dataset):
            fingerprint.update(batch)
            for number in range(first, first + len(batch)):
                id = dataset.id(number)
                if id <= last:
                    raise UserError(f"{dataset.index.recordings}: id {id!r} after {last!r}: the ids are not sorted")
                last = id
                faults += _check_metadata(dataset, number)
    except UserError as error:
        return [*faults, Fault(RECORDINGS_FILE, str(error))]
    if fingerprint.hexdigest() != dataset.fingerprint:
        problem = "the fingerprint does not match the ids, texts, words and labels: it or one of them was changed"
        faults.append(Fault(DATASET_FILE, f"{_place(dataset, DATASET_FILE)}: {problem}"))
    return faults


def _fingerprint_batches(dataset: Dataset) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first recording, columns of the fingerprint) of successive batches of _ROWS recordings."""
    index, first = dataset.index, 0
    labels = {name: (pa.array(values, pa.string()), codes) for name, (values, codes) in index.labels.items()}
    for index_batch in index.batches:
        for name in index_batch.schema.names:
            index.value(name, first)  # validates the column
        for row in range(0, len(index_batch), _ROWS):
            batch = index_batch.slice(row, _ROWS)
            rows = slice(first + row, first + row + len(batch))
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            columns["frames"] = pa.array(index.frames[rows])
            columns |= {name: values.take(pa.array(codes[rows])) for name, (values, codes) in labels.items()}
            yield rows.start, pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
        first += len(index_batch)


def _check_metadata(dataset: Dataset, number: int) -> Iterator[Fault]:
    """Check that a recording's metadata are valid, with word times within its duration."""
    try:
        recording = stored_recording(dataset, number)
        seconds = dataset.frames[number] / dataset.features.frames_per_second
        check_word_times(recording.words or [], seconds, recording.id)
    except UserError as error:
        yield Fault(RECORDINGS_FILE, f"{_place(dataset, RECORDINGS_FILE)}: {error}", dataset.id(number))


def check_statistics(dataset: Dataset) -> list[Fault]:
    """Check size and header of statistics.safetensors, and the totals in dataset.json."""
    name, width = STATISTICS_FILE, dataset.features.num_mels
    header = bytearray(statistics_range(0, width)[0])
    try:
        size = dataset.storage.size(name)
        valid = size == sum(statistics_range(len(dataset) - 1, width))
        if valid:
            dataset.storage.read_into(name, 0, memoryview(header))
            valid = header == statistics_header(len(dataset), width)
        if not valid:
            problem = f"its size of {size or 0} bytes or its header does not match {len(dataset)} recordings"
            return [Fault(name, f"{_place(dataset, name)}: damaged ({problem})")]
        return list(_check_totals(dataset))
    except OSError as error:
        return [Fault(name, f"{_place(dataset, name)}: cannot be read ({error})")]


def _check_totals(dataset: Dataset) -> Iterator[Fault]:
    """Compare dataset.json with the sums over all recordings. Raises OSError if the statistics cannot be read."""
    place, width = _place(dataset, DATASET_FILE), dataset.features.num_mels
    fields = as_object(parse_json(dataset.storage.read(DATASET_FILE), place), place)
    sums, squares = np.zeros(width), np.zeros(width)
    for first in range(0, len(dataset), _STATISTICS_ROWS):
        frames = dataset.frames[first : first + _STATISTICS_ROWS]
        values = np.empty((len(frames), 2, width), np.float32)
        position, _ = statistics_range(first, width)
        dataset.storage.read_into(STATISTICS_FILE, position, memoryview(values.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
        mean, std = values.astype(np.float64).transpose(1, 0, 2)
        sums, squares = sums + frames @ mean, squares + frames @ (std**2 + mean**2)
    mean = sums / dataset.total_frames
    expected = {
        "shards": np.array(len(dataset.shards())),
        "hours": np.array(dataset.total_frames / dataset.features.frames_per_second / 3600),
        "mean": mean,
        "std": np.sqrt(np.maximum(squares / dataset.total_frames - mean**2, 0)),
    }
    for name, value in expected.items():
        try:
            stored = np.asarray(fields.get(name), np.float64)
            same = stored.shape == value.shape and np.allclose(stored, value, _TOLERANCE, _TOLERANCE)
        except (TypeError, ValueError):
            same = False
        if not same:
            yield Fault(DATASET_FILE, f"{place}: {name} does not match the recordings")


def check_header(dataset: Dataset, numbers: np.ndarray) -> Iterator[Fault]:
    """Check that the shard's header, by which other programs find tensors, has the entries of these recordings.

    An unreadable header is not reported here, because its recordings are unreadable too and are reported.
    """
    name = shard_name(dataset.index.shard[numbers[0]])
    length, width = bytearray(8), dataset.features.num_mels
    try:
        dataset.storage.read_into(name, 0, memoryview(length))
        size = int.from_bytes(length, "little")
        if size > int(dataset.index.offset[numbers].min()) - 8:
            raise UserError(f"its stated size is {size} bytes")
        content = bytearray(size)
        dataset.storage.read_into(name, 8, memoryview(content))
        tensors = as_object(parse_json(bytes(content), "its JSON"), "its JSON").values()
        entries = {json.dumps([t.get(key) for key in _ENTRY_FIELDS]) for t in tensors if isinstance(t, dict)}
        for i in numbers:
            start, stored = int(dataset.index.offset[i]) - 8 - size, int(dataset.index.bytes[i])
            entry = tensor_entry(dataset.encoding, int(dataset.frames[i]), width, start, stored)
            if json.dumps([entry[key] for key in _ENTRY_FIELDS]) not in entries:
                raise UserError(f"it lacks {dataset.id(i)!r}")
    except UserError as error:
        yield Fault(name, f"{_place(dataset, name)}: damaged header ({error}); other programs cannot read the file")
    except OSError:
        pass


def _place(dataset: Dataset, name: str) -> str:
    return f"{dataset.location.rstrip('/')}/{name}"
