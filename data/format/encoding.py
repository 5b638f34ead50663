"""How a recording's values lie in a shard, for writing and for reading: plain float16, or compressed blocks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from common.errors import UserError
from data.features import FeatureSettings
from data.format import index as ix
from data.format.compression import BLOCK_FRAMES, blocks_of, decode_range, encode_recording
from data.format.index_file import Index
from data.storage.local import Storage


def stored(values: np.ndarray, layout: ix.Layout) -> tuple[np.ndarray, np.ndarray, list[int] | None]:
    """float16 [frames, M] -> the values as they will be read, the bytes that are stored, and of how many each block."""
    if layout == "plain":
        return values, values.reshape(-1).view(np.uint8), None
    blocks = encode_recording(values, layout)
    data, sizes = np.frombuffer(b"".join(blocks), np.uint8), [len(block) for block in blocks]
    read = np.empty_like(values)
    decode_range(data.data, sizes, len(values), 0, layout, read)
    return read, data, sizes


def shard_header(rows: list[dict[str, Any]], size: int, features: FeatureSettings, layout: ix.Layout) -> bytes:
    """The head of a safetensors file, padded with spaces (which the format allows) to `size` bytes."""
    tensors = {
        r["id"]: ix.tensor_entry(layout, r["frames"], features.num_mels, r["offset"] - size, r["bytes"]) for r in rows
    }
    text = json.dumps({"__metadata__": {"feature_hash": features.hash()}, **tensors}, separators=(",", ":")).encode()
    assert len(text) <= size - 8, "the header's room was reckoned wrongly"
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def read_frames(storage: Storage, index: Index, layout: ix.Layout, recording: int, start: int, out: np.ndarray) -> None:
    """Fill `out` (C-contiguous float16 [n, M]) with frames [start, start + n) of a recording.

    Raises OSError where they cannot be read, UserError where what is read cannot be.
    """
    if not len(out):
        return
    if layout == "plain":
        skipped = start * out.shape[1] * ix.BYTES_PER_VALUE
        _read_bytes(storage, index, recording, skipped, out)
        return
    frames, sizes = int(index.frames[recording]), index.block_bytes(recording)
    first, last = blocks_of(start, start + len(out))
    if len(sizes) != blocks_of(0, frames)[1] or int(sizes.sum(dtype=np.int64)) != index.bytes[recording]:
        raise UserError(f"{len(sizes)} blocks of {sizes.sum(dtype=np.int64)} bytes do not hold {frames} frames")
    data = np.empty(int(sizes[first:last].sum(dtype=np.int64)), np.uint8)
    # No codec makes a block larger than twice its values.
    if data.nbytes > 2 * (last - first) * BLOCK_FRAMES * out.shape[1] * ix.BYTES_PER_VALUE:
        raise UserError(f"blocks {first} to {last} of {data.nbytes} bytes are larger than what they would hold")
    _read_bytes(storage, index, recording, int(sizes[:first].sum(dtype=np.int64)), data)
    decode_range(data.data, sizes[first:last], frames, start, layout, out)


def bytes_of(index: Index, layout: ix.Layout, recording: int, start: int, stop: int, num_mels: int) -> tuple[int, int]:
    """Where in its shard the frames [start, stop) of a recording are read: first byte, number of bytes."""
    offset = int(index.offset[recording])
    if layout == "plain":
        size = num_mels * ix.BYTES_PER_VALUE
        return offset + start * size, (stop - start) * size
    first, last = blocks_of(start, stop)
    sizes = index.block_bytes(recording)
    return offset + int(sizes[:first].sum(dtype=np.int64)), int(sizes[first:last].sum(dtype=np.int64))


def _read_bytes(storage: Storage, index: Index, recording: int, skipped: int, out: np.ndarray) -> None:
    position = int(index.offset[recording]) + skipped
    storage.read_into(ix.shard_name(int(index.shard[recording])), position, memoryview(out).cast("B"))  # type: ignore[arg-type]
