"""Log-mel in few bytes: a recording cut into blocks of BLOCK_FRAMES frames, each encoded alone.

Two codecs, without state. `python -m benchmarks.compression` measures them beside the others that could have been:

`shuffle-zstd`
    exact, bit for bit. Two zstd frames one after the other: the low bytes of all values as they are, then the high
    bytes as differences from the frame before. Apart, each kind gets an entropy code of its own.
`uint8`
    every bin rounded to 256 even steps between its smallest and its greatest value in the block, so an error is at
    most half a step. Those bounds (float16 [2, M]), then a zstd frame of the steps as differences from the frame
    before.

A block holds nothing but its values: whoever stores it keeps its size in bytes, its frames, its bins and its codec.
Neither codec notices every damage; checksums of the decoded values do.
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

Codec = Literal["shuffle-zstd", "uint8"]
CODECS: tuple[str, ...] = get_args(Codec)
# Of 20 s crops read at random: smaller blocks cost calls and bytes, larger ones are decoded for their edges.
BLOCK_FRAMES = 512
# Higher levels look for repetitions, and log-mel has none: they gain 1 % at most.
ZSTD_LEVEL = 1
_STEPS = 255
Buffer = bytes | bytearray | memoryview


def encode(values: np.ndarray, codec: Codec, level: int = ZSTD_LEVEL) -> bytes:
    """One block: float16 [n, M], n >= 1, to bytes.

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
    lowest, step = _scale(bounds)
    steps = np.rint((values - lowest) / np.where(step > 0, step, 1)).astype(np.uint8)
    return bounds.tobytes() + zstd.compress(_differences(steps), asbytes=True)


def decode(data: Buffer, codec: Codec, out: np.ndarray) -> None:
    """Fill `out` (C-contiguous float16 [n, M]) with the block of n frames of M bins that `encode` made.

    Takes no more memory than a few times that of `out`, whatever the bytes are. Raises UserError, with `out` in any
    state, where they are no block of that shape.
    """
    check_codec(codec)
    data = memoryview(data)
    if codec == "shuffle-zstd":
        low, high = _decompress(data, (2, *out.shape))
        bits = out.view(np.uint16)
        np.left_shift(_sums(high), 8, out=bits, dtype=np.uint16)
        np.bitwise_or(bits, low, out=bits)
        return
    bins = out.shape[1]
    size = 2 * bins * np.dtype(np.float16).itemsize
    if len(data) < size:
        raise UserError(f"a uint8 block of {len(data)} bytes: the bounds of {bins} bins alone are {size}")
    lowest, step = _scale(np.frombuffer(data[:size], np.float16).reshape(2, bins))
    if not (step.min() >= 0 and step.max() < math.inf):
        raise UserError("a uint8 block whose bounds are not finite, or the wrong way round")
    steps = torch.from_numpy(_sums(_decompress(data[size:], out.shape)))
    # torch converts to float16 many times as fast as numpy.
    torch.from_numpy(out).copy_(steps.to(torch.float32).mul_(torch.from_numpy(step)).add_(torch.from_numpy(lowest)))


def encode_recording(values: np.ndarray, codec: Codec) -> list[bytes]:
    """Blocks of a whole recording, float16 [frames, M]; the last may be shorter. Raises as `encode`."""
    return [encode(values[begin : begin + BLOCK_FRAMES], codec) for begin in range(0, len(values), BLOCK_FRAMES)]


def blocks_of(start: int, stop: int) -> tuple[int, int]:
    """Numbers [first, last) of the blocks that hold the frames [start, stop)."""
    return start // BLOCK_FRAMES, -(-stop // BLOCK_FRAMES)


def decode_range(
    data: Buffer, sizes: Sequence[int] | np.ndarray, frames: int, start: int, codec: Codec, out: np.ndarray
) -> None:
    """Fill `out` (C-contiguous float16 [n, M]) with frames [start, start + n) of a recording of `frames` frames.

    data: the blocks `blocks_of(start, start + n)`, one after the other; sizes: of each of them, in bytes.
    Raises UserError where a block is damaged or the sizes do not add up.
    """
    stop = start + len(out)
    first, last = blocks_of(start, stop)
    ends = list(accumulate(map(int, sizes), initial=0))
    data = memoryview(data)
    if len(ends) != last - first + 1 or ends[-1] != len(data):
        raise UserError(f"{len(sizes)} blocks of {ends[-1]} bytes; there are {last - first} blocks, {len(data)} bytes")
    for block, begin, end in zip(range(first, last), ends[:-1], ends[1:], strict=True):
        top, bottom = block * BLOCK_FRAMES, min((block + 1) * BLOCK_FRAMES, frames)
        if start <= top and bottom <= stop:
            decode(data[begin:end], codec, out[top - start : bottom - start])
        else:  # the crop begins or ends inside
            whole = np.empty((bottom - top, out.shape[1]), np.float16)
            decode(data[begin:end], codec, whole)
            inside = slice(max(top, start), min(bottom, stop))
            out[inside.start - start : inside.stop - start] = whole[inside.start - top : inside.stop - top]


def check_codec(codec: str) -> None:
    """Raise UserError unless `codec` is a known one."""
    if codec not in CODECS:
        raise UserError(f"codec is {codec!r}: known are {', '.join(CODECS)}")


def _differences(values: np.ndarray) -> np.ndarray:
    """uint8 [n, M]: each frame minus the one before, modulo 256."""
    return np.diff(values, axis=0, prepend=np.zeros_like(values[:1]))


def _sums(differences: np.ndarray) -> np.ndarray:
    """The uint8 [n, M] that `_differences` was made from."""
    # In pass k every frame gets the sum of 2^k differences. That is log2(n) passes, and less than half the time of
    # np.add.accumulate, which goes frame by frame and finds only M values to add at once.
    sums, target, lag = differences.copy(), np.empty_like(differences), 1
    while lag < len(sums):
        target[:lag] = sums[:lag]
        np.add(sums[lag:], sums[:-lag], out=target[lag:])
        sums, target, lag = target, sums, 2 * lag
    return sums


def _scale(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest values and steps, float32 [M] each, of the bounds float16 [2, M]."""
    lowest, highest = bounds.astype(np.float32)
    with np.errstate(invalid="ignore"):  # of two infinities; `decode` refuses what comes of them
        return lowest, (highest - lowest) / np.float32(_STEPS)


def _decompress(data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 [*shape] in all zstd frames of `data`; UserError where they hold less or more."""
    size = math.prod(shape)
    try:
        # pyarrow makes room for `size` bytes, and zstd refuses to write beyond them.
        values = np.frombuffer(pa.Codec("zstd").decompress(data, decompressed_size=size), np.uint8)
        return values.reshape(shape)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"a block of {len(data)} bytes does not hold {size} bytes of zstd: {error}") from error
