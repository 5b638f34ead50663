"""Files, columns and metadata of a dataset on disk.

DIR/dataset.json            format version, features and their hash, statistics, totals, fingerprint; written last
DIR/index.arrow             one row per recording, sorted by id: position and length of its values, labels
DIR/recordings.arrow        the same rows: id, text, word times, checksums
DIR/statistics.safetensors  the same rows: mean and standard deviation of every mel bin, float32 [N, 2, M]
DIR/shard-NNNNN.safetensors one tensor per recording, named by its id: float16 [frames, M], or encoded (uint8 [bytes])
DIR/preparing.json, DIR/rows-NNNNN.arrow, DIR/part-NNNNN.*    only while a dataset is being written
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
from torch import Tensor

from common.errors import UserError
from data.features import FeatureSettings

FORMAT_VERSION = 2
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.arrow"
RECORDINGS_FILE = "recordings.arrow"
STATISTICS_FILE = "statistics.safetensors"
PREPARING_FILE = "preparing.json"
Encoding = Literal["plain", "uint8", "shuffle-zstd"]
"""Representation of values in a shard: float16, or compressed blocks (`data.format.encoding`)."""
ENCODINGS: tuple[str, ...] = get_args(Encoding)
BYTES_PER_VALUE = 2  # float16
# Rows per batch of recordings.arrow (the last may have fewer): row i is row i % BATCH_ROWS of batch i // BATCH_ROWS.
BATCH_ROWS = 16384
# For 20 s crops at random positions: smaller blocks cost calls and bytes, larger ones decode more outside the crop.
BLOCK_FRAMES = 512
# Frames per checksum; 4096 frames of 80 bins are 655,360 bytes.
CHECKSUM_FRAMES = 4096
_STATISTICS_HEADER_BYTES = 256

WORDS = pa.list_(
    pa.struct([("word", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("confidence", pa.float32())])
)
EXCLUDED = pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64())]))
# Columns with few distinct values, stored as codes into a table.
LABELS = ("language", "speaker", "split")


def block_range(start: int, stop: int) -> tuple[int, int]:
    """Numbers [first, last) of the blocks that hold the frames [start, stop)."""
    return start // BLOCK_FRAMES, -(-stop // BLOCK_FRAMES)


def index_schema() -> pa.Schema:
    """Columns of index.arrow. All have fixed width and form a single batch, so each is an array in the mapped file."""
    return pa.schema(
        [
            ("shard", pa.int32()),  # number of the shard file
            ("offset", pa.int64()),  # first value: bytes from the start of the shard file
            ("bytes", pa.int64()),  # size of all values in that file
            ("frames", pa.int64()),
            *((name, pa.dictionary(pa.int32(), pa.string())) for name in LABELS),
        ]
    )


def recordings_schema() -> pa.Schema:
    """Columns of recordings.arrow."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("crc32", pa.list_(pa.uint32())),  # per CHECKSUM_FRAMES frames, over decoded values
            ("block_bytes", pa.list_(pa.uint32())),  # sizes of the blocks of BLOCK_FRAMES frames; null if plain
            ("text", pa.string()),
            ("words", WORDS),
            ("excluded", EXCLUDED),
        ]
    )


@functools.cache
def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def tensor_entry(encoding: Encoding, frames: int, num_mels: int, start: int, size: int) -> dict[str, Any]:
    """Entry of a shard header for a recording of `size` bytes that starts `start` bytes after the header."""
    plain = encoding == "plain"
    shape = [frames, num_mels] if plain else [size]
    return {"dtype": "F16" if plain else "U8", "shape": shape, "data_offsets": [start, start + size]}


def statistics_header(recordings: int, num_mels: int) -> bytes:
    """Header of statistics.safetensors: one tensor mean_std, float32 [N, 2, M]."""
    shape = [recordings, 2, num_mels]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 8 * recordings * num_mels]}
    size = _STATISTICS_HEADER_BYTES - 8
    return size.to_bytes(8, "little") + json.dumps({"mean_std": entry}).encode().ljust(size)


def statistics_range(recording: int, num_mels: int) -> tuple[int, int]:
    """Position and size, in bytes, of a recording's float32 [2, M] in statistics.safetensors."""
    size = 8 * num_mels
    return _STATISTICS_HEADER_BYTES + recording * size, size


def check_version(fields: dict[str, Any], path: Path | str) -> None:
    """Raise UserError unless dataset.json or preparing.json has this version of the format."""
    if fields.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {fields.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
            "prepare the dataset again"
        )


def parse_features(fields: dict[str, Any], path: Path | str) -> FeatureSettings:
    """Feature settings in dataset.json or preparing.json. Raises UserError that names the file if they are invalid."""
    try:
        return FeatureSettings.from_dict(fields.get("features", {}))
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}; restore the file or prepare the dataset again") from error


def parse_vector(fields: dict[str, Any], name: str, num_mels: int, path: Path | str) -> Tensor:
    """`mean` or `std` in dataset.json: float32 [M]. Raises UserError that names the file if it is invalid."""
    values = fields[name]
    numbers = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    if not numbers or len(values) != num_mels or not all(abs(value) < 2**16 for value in values):
        raise UserError(f"{path}: {name} must be {num_mels} numbers; restore the file")
    return torch.tensor(values, dtype=torch.float32)
