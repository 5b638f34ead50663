"""Compression of log-mel into blocks of BLOCK_FRAMES frames that decode independently.

Two codecs; `python -m benchmarks.compression` compares them with the alternatives:

`shuffle-zstd`
    Lossless. Two zstd frames, one after the other: the low bytes of all values, then the high bytes as differences from
    the previous frame. Low and high bytes have different distributions, so each plane has its own entropy code.
`uint8`
    Every bin is quantised to 256 even steps between its minimum and maximum in the block, with an error of at most half
    a step. Bounds (float16 [2, M]), then a zstd frame of the steps as differences from the previous frame.

A block holds only values; its size in bytes, frames, bins and codec are stored elsewhere. Damage that decodes without
an error is detected by the checksums, which cover the decoded values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch

from common.errors import UserError
from data.format.schema import BLOCK_FRAMES, BYTES_PER_VALUE, block_range

Codec = Literal["shuffle-zstd", "uint8"]
CODECS: tuple[str, ...] = get_args(Codec)
# Higher levels search for repetitions, which log-mel does not have: they gain 1 % at most.
ZSTD_LEVEL = 1
_STEPS = 255
Buffer = bytes | bytearray | memoryview


def encode(values: np.ndarray, codec: Codec, level: int = ZSTD_LEVEL) -> bytes:
    """Encode a block: float16 [n, M], n >= 1.

    Raises UserError for an unknown codec, and for NaN or infinite values under `uint8`.
    """
    check_codec(codec)
    values = np.ascontiguousarray(values, np.float16)
    zstd = pa.Codec("zstd", compression_level=level)
    if codec == "shuffle-zstd":
        low, high = values.view(np.uint8).reshape(*values.shape, 2).transpose(2, 0, 1)
        planes = (np.ascontiguousarray(low), _differences(high))
        return b"".join(zstd.compress(plane, asbytes=True) for plane in planes)
    if not np.isfinite(values).all():
        raise UserError("NaN or infinite values cannot be stored as uint8")
    bounds = np.stack([values.min(axis=0), values.max(axis=0)])
    minimum, step = _minimum_and_step(bounds)
    steps = np.rint((values - minimum) / np.where(step > 0, step, 1)).astype(np.uint8)
    return bounds.tobytes() + zstd.compress(_differences(steps), asbytes=True)


def decode(data: Buffer, codec: Codec, out: np.ndarray) -> None:
    """Decode a block of n frames of M bins into `out` (C-contiguous float16 [n, M]).

    Memory is bounded by a small multiple of `out`, whatever the bytes are. Raises UserError if they are not a block of
    this shape; the content of `out` is then undefined.
    """
    check_codec(codec)
    data = memoryview(data)
    if codec == "shuffle-zstd":
        low, high = _decompress(data, (2, *out.shape))
        bits = out.view(np.uint16)
        np.left_shift(_cumulative_sums(high), 8, out=bits, dtype=np.uint16)
        np.bitwise_or(bits, low, out=bits)
        return
    bins = out.shape[1]
    size = 2 * bins * BYTES_PER_VALUE
    if len(data) < size:
        raise UserError(f"uint8 block of {len(data)} bytes: the bounds of {bins} bins alone take {size}")
    minimum, step = _minimum_and_step(np.frombuffer(data[:size], np.float16).reshape(2, bins))
    if not (step.min() >= 0 and step.max() < math.inf):
        raise UserError("uint8 block with bounds that are not finite or not in order")
    steps = torch.from_numpy(_cumulative_sums(_decompress(data[size:], out.shape)))
    # torch converts to float16 several times faster than numpy.
    torch.from_numpy(out).copy_(steps.to(torch.float32).mul_(torch.from_numpy(step)).add_(torch.from_numpy(minimum)))


def encode_blocks(values: np.ndarray, codec: Codec) -> list[bytes]:
    """Blocks of a recording, float16 [frames, M]; the last may be shorter. Raises as `encode`."""
    return [encode(values[start : start + BLOCK_FRAMES], codec) for start in range(0, len(values), BLOCK_FRAMES)]


def decode_range(
    data: Buffer, sizes: Sequence[int] | np.ndarray, frames: int, start: int, codec: Codec, out: np.ndarray
) -> None:
    """Decode frames [start, start + n) of a recording of `frames` frames into `out` (C-contiguous float16 [n, M]).

    data: the blocks `block_range(start, start + n)`, concatenated; sizes: their sizes in bytes.
    Raises UserError if a block is damaged or the sizes do not add up.
    """
    stop = start + len(out)
    first, last = block_range(start, stop)
    ends = list(accumulate(map(int, sizes), initial=0))
    data = memoryview(data)
    if len(ends) != last - first + 1 or ends[-1] != len(data):
        raise UserError(f"{len(sizes)} blocks of {ends[-1]} bytes, expected {last - first} of {len(data)} bytes")
    for block, left, right in zip(range(first, last), ends[:-1], ends[1:], strict=True):
        top, bottom = block * BLOCK_FRAMES, min((block + 1) * BLOCK_FRAMES, frames)
        if start <= top and bottom <= stop:
            decode(data[left:right], codec, out[top - start : bottom - start])
        else:  # the range starts or stops inside the block
            values = np.empty((bottom - top, out.shape[1]), np.float16)
            decode(data[left:right], codec, values)
            inside = slice(max(top, start), min(bottom, stop))
            out[inside.start - start : inside.stop - start] = values[inside.start - top : inside.stop - top]


def check_codec(codec: str) -> None:
    """Raise UserError unless the codec is known."""
    if codec not in CODECS:
        raise UserError(f"codec is {codec!r}, expected one of {', '.join(CODECS)}")


def _differences(values: np.ndarray) -> np.ndarray:
    """uint8 [n, M]: each frame minus the previous one, modulo 256."""
    return np.diff(values, axis=0, prepend=np.zeros_like(values[:1]))


def _cumulative_sums(differences: np.ndarray) -> np.ndarray:
    """Inverse of `_differences`: uint8 [n, M]."""
    # Pass k gives every frame the sum of 2^k differences. These log2(n) passes take less than half the time of
    # np.add.accumulate, which adds only M values at once.
    sums, target, lag = differences.copy(), np.empty_like(differences), 1
    while lag < len(sums):
        target[:lag] = sums[:lag]
        np.add(sums[lag:], sums[:-lag], out=target[lag:])
        sums, target, lag = target, sums, 2 * lag
    return sums


def _minimum_and_step(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and step size of every bin, float32 [M] each, from the bounds float16 [2, M]."""
    minimum, maximum = bounds.astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinite bounds; `decode` rejects the result
        return minimum, (maximum - minimum) / np.float32(_STEPS)


def _decompress(data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [*shape] from the zstd frames of `data`. Raises UserError if they hold fewer or more bytes."""
    size = math.prod(shape)
    try:
        # pyarrow allocates `size` bytes, and zstd does not write beyond them.
        values = np.frombuffer(pa.Codec("zstd").decompress(data, decompressed_size=size), np.uint8)
        return values.reshape(shape)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"block of {len(data)} bytes does not hold {size} bytes of zstd: {error}") from error
