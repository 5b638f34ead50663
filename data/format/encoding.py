"""Encoded log-mel in shards: reading and writing of plain float16 or compressed blocks (`data.format.compression`)."""

from __future__ import annotations

import zlib

import numpy as np

from common.errors import UserError
from data.format.index import Index
from data.format.schema import BLOCK_FRAMES, BYTES_PER_VALUE, CHECKSUM_FRAMES, Encoding, block_range, shard_name
from data.storage.local import Storage


def encode_recording(values: np.ndarray, encoding: Encoding) -> tuple[np.ndarray, np.ndarray, list[int] | None]:
    """Encode float16 [frames, M]: the values as they will be decoded, the bytes (uint8), and the block sizes."""
    if encoding == "plain":
        return values, values.reshape(-1).view(np.uint8), None
    from data.format.compression import decode_range, encode_blocks  # imported only for compressed datasets

    blocks = encode_blocks(values, encoding)
    data, sizes = np.frombuffer(b"".join(blocks), np.uint8), [len(block) for block in blocks]
    decoded = np.empty_like(values)
    decode_range(data.data, sizes, len(values), 0, encoding, decoded)
    return decoded, data, sizes


def read_frames(
    storage: Storage, index: Index, encoding: Encoding, recording: int, start: int, out: np.ndarray
) -> None:
    """Read frames [start, start + n) of a recording into `out` (C-contiguous float16 [n, M]).

    Raises OSError if they cannot be read, UserError if the bytes or their sizes are invalid.
    """
    if not len(out):
        return
    if encoding == "plain":
        _read_bytes(storage, index, recording, start * out.shape[1] * BYTES_PER_VALUE, out)
        return
    frames, sizes = int(index.frames[recording]), index.block_bytes(recording)
    first, last = block_range(start, start + len(out))
    if len(sizes) != block_range(0, frames)[1] or _total(sizes) != index.bytes[recording]:
        raise UserError(f"{len(sizes)} blocks of {_total(sizes)} bytes do not hold {frames} frames")
    data = np.empty(_total(sizes[first:last]), np.uint8)
    # No codec makes a block larger than twice its values.
    if data.nbytes > 2 * (last - first) * BLOCK_FRAMES * out.shape[1] * BYTES_PER_VALUE:
        raise UserError(f"blocks {first} to {last} of {data.nbytes} bytes are larger than their values")
    _read_bytes(storage, index, recording, _total(sizes[:first]), data)
    from data.format.compression import decode_range

    decode_range(data.data, sizes[first:last], frames, start, encoding, out)


def byte_range(
    index: Index, encoding: Encoding, recording: int, start: int, stop: int, num_mels: int
) -> tuple[int, int]:
    """Position and size, in bytes of the shard, of the data that `read_frames` reads for frames [start, stop)."""
    offset = int(index.offset[recording])
    if encoding == "plain":
        size = num_mels * BYTES_PER_VALUE
        return offset + start * size, (stop - start) * size
    first, last = block_range(start, stop)
    sizes = index.block_bytes(recording)
    return offset + _total(sizes[:first]), _total(sizes[first:last])


def checksum_range(start: int, stop: int, frames: int) -> tuple[int, int]:
    """Frames [start, stop) of a recording of `frames` frames, extended to whole checksum blocks."""
    first = start // CHECKSUM_FRAMES * CHECKSUM_FRAMES
    last = -(-stop // CHECKSUM_FRAMES) * CHECKSUM_FRAMES
    return first, min(last, frames)


def checksums(values: np.ndarray) -> list[int]:
    """CRC-32 of every CHECKSUM_FRAMES frames of float16 [frames, M]."""
    size = CHECKSUM_FRAMES
    return [zlib.crc32(values[start : start + size].data) for start in range(0, len(values), size)]


def _read_bytes(storage: Storage, index: Index, recording: int, skip: int, out: np.ndarray) -> None:
    position = int(index.offset[recording]) + skip
    storage.read_into(shard_name(int(index.shard[recording])), position, memoryview(out).cast("B"))  # type: ignore[arg-type]


def _total(sizes: np.ndarray) -> int:
    return int(sizes.sum(dtype=np.int64))
