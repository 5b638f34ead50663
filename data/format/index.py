"""What a dataset on disk is made of: the recording, the columns of the index, names, atomic writes, fingerprint.

DIR/dataset.json            format version, features and their hash, statistics, totals, fingerprint; written last
DIR/index.arrow             one row a recording, sorted by id: where its sound is, its length and its labels
DIR/recordings.arrow        the same rows: id, text, word times, checksums
DIR/statistics.safetensors  the same rows: mean and standard deviation of every mel bin, float32 [N, 2, M]
DIR/shard-NNNNN.safetensors one float16 tensor [frames, M] a recording, named by its id
DIR/preparing.json, DIR/rows-NNNNN.arrow, DIR/part-NNNNN.*    only while a dataset is being written
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.errors import UserError
from data.features import FeatureSettings
from data.names import name_fault
from data.transcripts import Word

FORMAT_VERSION = 2
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.arrow"
RECORDINGS_FILE = "recordings.arrow"
STATISTICS_FILE = "statistics.safetensors"
PREPARING_FILE = "preparing.json"
Layout = Literal["plain", "uint8", "shuffle-zstd"]
"""How values lie in a shard: float16, or in blocks as `data.compression` encodes them."""
LAYOUTS: tuple[str, ...] = get_args(Layout)
# Frames that one checksum stands for; 4096 frames of 80 bins are 655,360 bytes.
CHECKSUM_FRAMES = 4096
BYTES_PER_VALUE = 2  # float16
# Rows in a batch of recordings.arrow, the last one aside: row i is row i % BATCH_ROWS of batch i // BATCH_ROWS.
BATCH_ROWS = 16384

WORDS = pa.list_(
    pa.struct([("word", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("confidence", pa.float32())])
)
EXCLUDED = pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64())]))
# Columns with few values: their codes are looked up in a table that the file holds once.
LABELS = ("language", "speaker", "split")


@dataclass(frozen=True)
class Recording:
    """What is known of a recording besides its sound. Empty strings and None stand for 'not known'."""

    id: str
    """Unique in the dataset; becomes the tensor's name."""
    text: str | None = None
    """Transcript; None where there is none."""
    words: list[Word] | None = None
    """Words with their times, sorted by start; None where there are none."""
    language: str = ""
    """Language code, as the corpus gives it ('en', 'cs', ...)."""
    speaker: str = ""
    """Speaker id."""
    split: str = "train"
    """'train', 'dev' or 'test'."""
    excluded: list[tuple[float, float]] | None = None
    """(start, end) in seconds of stretches that are in the audio, but not in `text`: no labelled training, no scoring
    (pretraining, which needs no labels, takes them as any sound). None: none."""

    def __post_init__(self) -> None:
        fault = "is reserved by the shard format" if self.id == "__metadata__" else name_fault(self.id)
        if fault is not None:
            raise UserError(f"recording id {self.id!r} {fault}: give it another name")


def index_schema() -> pa.Schema:
    """Columns of index.arrow, all of one width: a single batch, so that each is an array in the mapped file."""
    return pa.schema(
        [
            ("shard", pa.int32()),  # number of the shard's file
            ("offset", pa.int64()),  # of the first value, in bytes from the start of the shard's file
            ("bytes", pa.int64()),  # of all its values in that file
            ("frames", pa.int64()),
            *((name, pa.dictionary(pa.int32(), pa.string())) for name in LABELS),
        ]
    )


def recordings_schema() -> pa.Schema:
    """Columns of recordings.arrow."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("crc32", pa.list_(pa.uint32())),  # zlib.crc32 of every CHECKSUM_FRAMES frames, as they are read
            ("block_bytes", pa.list_(pa.uint32())),  # of every block of BLOCK_FRAMES frames; null in the plain layout
            ("text", pa.string()),
            ("words", WORDS),
            ("excluded", EXCLUDED),
        ]
    )


def rows_schema(num_mels: int) -> pa.Schema:
    """Columns of rows-NNNNN.arrow: all that the three files will hold of a shard's recordings."""
    labels = [(name, pa.string()) for name in LABELS]
    vectors = [(name, pa.list_(pa.float32(), num_mels)) for name in ("mean", "std")]
    numbers = [field for field in index_schema() if field.name not in LABELS]
    return pa.schema([*numbers, *labels, *recordings_schema(), *vectors])


def tensor_entry(layout: Layout, frames: int, num_mels: int, begin: int, size: int) -> dict[str, Any]:
    """What the head of a shard says of a recording of `size` bytes, `begin` bytes after that head."""
    plain = layout == "plain"
    shape = [frames, num_mels] if plain else [size]
    return {"dtype": "F16" if plain else "U8", "shape": shape, "data_offsets": [begin, begin + size]}


def described(recording: Recording) -> dict[str, Any]:
    """A recording as the index's columns hold it: what is known of it besides its sound."""
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
            f"recording {recording.id!r}: an id, text, word or label that is no Unicode text ({error})"
        ) from None
    return row


@functools.cache
def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def block_range(start: int, stop: int, frames: int) -> tuple[int, int]:
    """The frames [start, stop) widened to whole checksum blocks of a recording of `frames` frames."""
    first = start // CHECKSUM_FRAMES * CHECKSUM_FRAMES
    last = -(-stop // CHECKSUM_FRAMES) * CHECKSUM_FRAMES
    return first, min(last, frames)


class Fingerprint:
    """SHA-256 over what the recordings are: ids, sound (by checksums), labels; not over where they are stored.

    So it is the same for a dataset written in one go, in parts, or after interruptions. Rows come in the index's order.
    """

    def __init__(self, feature_hash: str) -> None:
        self._digest = hashlib.sha256(f"{FORMAT_VERSION} {feature_hash}".encode())

    def update(self, batch: pa.RecordBatch) -> None:
        names = ["id", "frames", "crc32", "language", "speaker", "split", "text", "words", "excluded"]
        for first in range(0, len(batch), 64):  # hours of words each are much as Python objects
            for row in batch.select(names).slice(first, 64).to_pylist():
                self._digest.update(json.dumps(row, sort_keys=True).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the frames of float16 [frames, M]: two float32 [M], summed in float64.

    A block at a time: hours in float64 would take four times the memory that the features take.
    """
    blocks = [values[begin : begin + CHECKSUM_FRAMES] for begin in range(0, len(values), CHECKSUM_FRAMES)]
    mean = np.sum([block.astype(np.float64).sum(axis=0) for block in blocks], axis=0) / len(values)
    squares = np.zeros_like(mean)
    for block in blocks:
        exact = block - mean
        squares += np.einsum("fm,fm->m", exact, exact)
    return mean.astype(np.float32), np.sqrt(squares / len(values)).astype(np.float32)


def checksums(values: np.ndarray) -> list[int]:
    """zlib.crc32 of every CHECKSUM_FRAMES frames of float16 [frames, M]."""
    size = CHECKSUM_FRAMES
    return [zlib.crc32(values[begin : begin + size].data) for begin in range(0, len(values), size)]


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file, made where it is missing, or of a folder. UserError where another process holds it."""
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    lock = os.open(path, kind, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is writing this dataset; wait for it or stop it") from error
        except OSError:
            pass  # a file system without locks: the folder is then unguarded, but nothing else is lost
        yield
    finally:
        os.close(lock)


def head(features: FeatureSettings, layout: Layout) -> dict[str, Any]:
    """How dataset.json and preparing.json begin."""
    told = {"features": features.to_dict(), "feature_hash": features.hash()}
    return {"format_version": FORMAT_VERSION, "layout": layout, **told}


def features_of(fields: dict[str, Any], path: Path | str) -> FeatureSettings:
    """The features in dataset.json or preparing.json. Raises UserError naming the file where they cannot be."""
    try:
        return FeatureSettings.from_dict(fields.get("features", {}))
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}; restore the file or prepare the dataset again") from error


def vector_of(fields: dict[str, Any], name: str, features: FeatureSettings, folder: str) -> Tensor:
    """`mean` or `std` of dataset.json, float32 [M]. Raises UserError where it is not that."""
    values = fields[name]
    numbers = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    if not numbers or len(values) != features.num_mels or not all(abs(value) < 2**16 for value in values):
        raise UserError(f"{folder.rstrip('/')}/{DATASET_FILE}: {name} must be {features.num_mels} numbers; restore it")
    return torch.tensor(values, dtype=torch.float32)


def check_version(fields: dict[str, Any], path: Path | str) -> None:
    if fields.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {fields.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
            "prepare the dataset again"
        )
