"""Do the tables of a dataset tell of what is there: index, statistics, dataset.json, the heads of the shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import as_object, parse_json
from data.format import index as ix
from data.format.index_file import statistics_header, statistics_range
from data.transcripts import check_word_times

if TYPE_CHECKING:
    from data.format.dataset import Dataset

# Rows whose texts and words are Python objects at a time: with hours of words each they are what takes memory.
_ROWS = 32
_STATISTICS_ROWS = 4096
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fault:
    """Something that is not as it should be: of one recording, or (id None) of a file as a whole."""

    file: str
    """Name of the file within the dataset."""
    problem: str
    """What is wrong, naming recording and file."""
    id: str | None = None


def check_index(dataset: Dataset) -> list[Fault]:
    """Ids, texts, word times and labels, one by one and by the fingerprint."""
    fingerprint, last = ix.Fingerprint(dataset.features.hash()), ""
    found: list[Fault] = []
    try:
        for first, piece in _pieces(dataset):
            fingerprint.update(piece)
            for number in range(first, first + len(piece)):
                id = dataset.id(number)
                if id <= last:
                    raise UserError(f"{dataset.index.recordings}: id {id!r} comes after {last!r}, they must be sorted")
                last = id
                found += _check_labels(dataset, number)
    except UserError as error:
        return [*found, Fault(ix.RECORDINGS_FILE, str(error))]
    if fingerprint.hexdigest() != dataset.fingerprint:
        problem = (
            "the fingerprint is not that of the recordings: it, or their ids, texts, words or labels, were changed"
        )
        found.append(Fault(ix.DATASET_FILE, f"{_place(dataset, ix.DATASET_FILE)}: {problem}"))
    return found


def _pieces(dataset: Dataset) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first, columns of the fingerprint) of some recordings after the other."""
    index, first = dataset.index, 0
    labels = {name: (pa.array(values, pa.string()), codes) for name, (values, codes) in index.labels.items()}
    for whole in index.batches:
        for name in whole.schema.names:
            index.value(name, first)  # checks the column
        for row in range(0, len(whole), _ROWS):
            batch = whole.slice(row, _ROWS)
            here = slice(first + row, first + row + len(batch))
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            columns["frames"] = pa.array(index.frames[here])
            columns |= {name: values.take(pa.array(codes[here])) for name, (values, codes) in labels.items()}
            yield here.start, pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
        first += len(whole)


def _check_labels(dataset: Dataset, number: int) -> Iterator[Fault]:
    """Is what the index tells of a recording possible?"""
    try:
        recording = dataset.recording(number)
        check_word_times(
            recording.words or [], dataset.frames[number] / dataset.features.frames_per_second, recording.id
        )
    except UserError as error:
        yield Fault(ix.RECORDINGS_FILE, f"{_place(dataset, ix.RECORDINGS_FILE)}: {error}", dataset.id(number))


def check_statistics(dataset: Dataset) -> list[Fault]:
    """Does statistics.safetensors have the size and the head that it must have, and dataset.json the totals?"""
    name, width = ix.STATISTICS_FILE, dataset.features.num_mels
    header = bytearray(statistics_range(0, width)[0])
    try:
        size = dataset.storage.size(name)
        right = size == sum(statistics_range(len(dataset) - 1, width))
        if right:
            dataset.storage.read_into(name, 0, memoryview(header))
            right = header == statistics_header(len(dataset), width)
        if not right:
            problem = f"{size or 0} bytes, or not the head, of the statistics of {len(dataset)} recordings"
            return [Fault(name, f"{_place(dataset, name)}: damaged ({problem})")]
        return list(_check_totals(dataset))
    except OSError as error:
        return [Fault(name, f"{_place(dataset, name)}: cannot be read ({error})")]


def _check_totals(dataset: Dataset) -> Iterator[Fault]:
    """dataset.json against what it sums up. OSError where the statistics cannot be read."""
    place, width = _place(dataset, ix.DATASET_FILE), dataset.features.num_mels
    fields = as_object(parse_json(dataset.storage.read(ix.DATASET_FILE), place), place)
    sums, squares = np.zeros(width), np.zeros(width)
    for first in range(0, len(dataset), _STATISTICS_ROWS):
        frames = dataset.frames[first : first + _STATISTICS_ROWS]
        values = np.empty((len(frames), 2, width), np.float32)
        position, _ = statistics_range(first, width)
        dataset.storage.read_into(ix.STATISTICS_FILE, position, memoryview(values.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
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
            told = np.asarray(fields.get(name), np.float64)
            same = told.shape == value.shape and np.allclose(told, value, _TOLERANCE, _TOLERANCE)
        except (TypeError, ValueError):
            same = False
        if not same:
            yield Fault(ix.DATASET_FILE, f"{place}: {name} is not what the recordings add up to")


def check_header(dataset: Dataset, numbers: np.ndarray) -> Iterator[Fault]:
    """The head of a shard's file, by which other programs find these recordings. One that cannot be read is no fault
    of its own: then the recordings cannot be read either."""
    name = ix.shard_name(dataset.index.shard[numbers[0]])
    length, width = bytearray(8), dataset.features.num_mels
    try:
        dataset.storage.read_into(name, 0, memoryview(length))
        size = int.from_bytes(length, "little")
        if size > int(dataset.index.offset[numbers].min()) - 8:
            raise UserError(f"it has {size} bytes, as it says")
        content = bytearray(size)
        dataset.storage.read_into(name, 8, memoryview(content))
        tensors = as_object(parse_json(bytes(content), "its JSON"), "its JSON").values()
        there = {json.dumps([t.get(key) for key in _ENTRY]) for t in tensors if isinstance(t, dict)}
        for i in numbers:
            begin, stored = int(dataset.index.offset[i]) - 8 - size, int(dataset.index.bytes[i])
            entry = ix.tensor_entry(dataset.layout, int(dataset.frames[i]), width, begin, stored)
            if json.dumps([entry[key] for key in _ENTRY]) not in there:
                raise UserError(f"it does not tell of {dataset.id(i)!r}")
    except UserError as error:
        yield Fault(name, f"{_place(dataset, name)}: damaged header ({error}); other programs cannot read the file")
    except OSError:
        pass


_ENTRY = ("dtype", "shape", "data_offsets")


def _place(dataset: Dataset, name: str) -> str:
    return f"{dataset.location.rstrip('/')}/{name}"
