"""Order of crops: crop k of epoch e as a pure function of (seed, e, k), without a stored permutation.

All random numbers of a crop (position in the order, shift, seed) are hashes of integers, so any process computes any
crop of any epoch in O(1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.hashing import mix

ROUNDS = 6
_CHUNK = 1 << 20  # recordings processed together, to bound memory
_ORDER, _SHIFT, _CROP, _SUBSTITUTE = 1, 2, 3, 5  # domains of the hash: no two uses share random numbers


def permute(k: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Images of k under a keyed pseudo-random permutation of range(size), int64; O(1) time and memory per element.

    An alternating Feistel network on the smallest power of two >= `size`, whose halves may differ by one bit. Values
    outside the range are permuted again (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002), fewer than two passes on average.
    """
    bits = max(1, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    round_keys = [int(mix(_ORDER, *key, number)) for number in range(ROUNDS)]
    out = np.asarray(k).astype(np.uint64)
    pending = np.arange(out.size)
    while pending.size:
        low, high = out[pending] & low_mask, out[pending] >> low_bits
        for number in range(0, ROUNDS, 2):
            high = high ^ (mix(round_keys[number], low) & high_mask)
            low = low ^ (mix(round_keys[number + 1], high) & low_mask)
        out[pending] = (high << low_bits) | low
        pending = pending[out[pending] >= size]
    return out.astype(np.int64)


@dataclass(frozen=True)
class Crops:
    """Crops as columns, int64 [n] each."""

    recording: np.ndarray
    """Index of the recording in the dataset."""
    start: np.ndarray
    """First frame."""
    stop: np.ndarray
    """Frame after the last; crops with stop - start < min_frames are skipped."""
    seed: np.ndarray
    """Non-negative, a pure function of (seed, epoch, crop); the seed of the crop's mask and noise."""
    item: np.ndarray
    """Row of the crop table, for the transcript."""


class NoCrops(UserError):
    """No crop can be made of any recording."""


class CropTable(ABC):
    """Interface of crop orders: `len()` crops per epoch, with random access by `crops(epoch, k)`.

    Attributes:
        seed: key of the order.
        max_frames: maximum length of a crop.
        min_frames: minimum length; shorter crops are skipped.
        labelled: crops have transcripts, so they must not be shortened.
        texts: all transcripts; empty for unlabelled crops.
        augments: crops are changed by `augment` when they are read (`data.loading.augment`).
    """

    seed: int
    max_frames: int
    min_frames: int
    labelled: bool = False
    texts: Sequence[str] = ()
    augments: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Crops per epoch, including skipped ones."""

    @abstractmethod
    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(recording, start, stop) of the items in an epoch, int64 [n] each."""

    @property
    @abstractmethod
    def mean_frames(self) -> float:
        """Mean frames per crop over an epoch."""

    @property
    def items(self) -> int:
        """Rows of the table. An epoch of a mixture may repeat some and skip others."""
        return len(self)

    def settings(self) -> dict[str, int]:
        """Further values that determine the order; a checkpoint is only resumed if they are equal."""
        return {}

    def lengths(self, crops: Crops) -> np.ndarray:
        """Frames of crops in their rows, int64 [n]: after augmentation."""
        return crops.stop - crops.start

    def augment(self, frames: np.ndarray, seed: int, out: np.ndarray) -> None:
        """Write the augmented frames of a crop, float32 [n, M], to `out`, of the length given by `lengths`."""
        out[:] = frames

    def text(self, item: int) -> str:
        """Transcript of an item; "" for unlabelled crops."""
        return self.texts[item] if self.texts else ""

    def crops(self, epoch: int, k: np.ndarray) -> Crops:
        """Crops k of an epoch, int64 [n] in range(len(self))."""
        item = permute(k, len(self), self.seed, epoch)
        seed = (mix(_CROP, self.seed, epoch, item) >> np.uint64(1)).astype(np.int64)
        return Crops(*self._cut(epoch, item), seed, item)

    def crop(self, epoch: int, k: int) -> tuple[int, int, int, int]:
        """(recording, start, stop, seed) of crop k of an epoch."""
        crops = self.crops(epoch, np.array([k]))
        return int(crops.recording[0]), int(crops.start[0]), int(crops.stop[0]), int(crops.seed[0])

    def substitute(self, seed: int, frames: int, attempt: int) -> tuple[int, int, int, int] | None:
        """Replacement of an unreadable crop: (recording, start, stop, item) of at most `frames` frames.

        A pure function of the unreadable crop's seed and the attempt, so all processes choose the same. None if the
        crop of this attempt is too long or too short.
        """
        item = mix(_SUBSTITUTE, seed, attempt) % np.uint64(self.items)
        columns = self._cut(0, np.array([item], np.int64))
        recording, start, stop = (int(column[0]) for column in columns)
        if not self.labelled:
            stop = min(stop, start + frames)
        fits = min(self.min_frames, frames) <= stop - start <= frames
        return (recording, start, stop, int(item)) if fits else None


class CropOrder(CropTable):
    """Crops for self-supervised training: whole short recordings, and long ones cut differently in every epoch.

    A recording of n > max_frames frames is cut into n // max_frames + 1 crops on a grid of max_frames with a random
    shift per epoch: every frame is in exactly one crop. Crops below min_frames are skipped.

    Memory: 8 bytes per recording; the lengths stay in the memory-mapped index.

    Args:
        frames: int [N], lengths of all recordings of the dataset.
        recordings: int [K], indices of the recordings to use; all by default.

    Raises:
        UserError: invalid limits.
        NoCrops: all recordings are shorter than `min_frames`.
    """

    def __init__(
        self,
        frames: np.ndarray,
        max_frames: int,
        min_frames: int,
        seed: int,
        recordings: np.ndarray | None = None,
    ) -> None:
        if not 0 < min_frames <= max_frames:
            raise UserError(f"min_frames {min_frames} and max_frames {max_frames}: need 0 < min_frames <= max_frames")
        selected = np.arange(len(frames), dtype=np.int32) if recordings is None else np.asarray(recordings, np.int32)
        self.frames, self.max_frames, self.min_frames, self.seed = frames, max_frames, min_frames, seed
        kept, counts = [], []
        for chunk in np.array_split(selected, len(selected) // _CHUNK + 1):
            lengths = frames[chunk]
            kept.append(chunk[lengths >= min_frames])
            lengths = lengths[lengths >= min_frames]
            counts.append(np.where(lengths <= max_frames, 1, lengths // max_frames + 1).astype(np.uint32))
        total = sum(int(chunk.sum(dtype=np.int64)) for chunk in counts)
        self.recordings = np.concatenate(kept)
        self.too_short = len(selected) - len(self.recordings)
        # Index of the first crop of every recording, then the number of all crops.
        self._first = np.zeros(len(self.recordings) + 1, np.uint32 if total < 2**32 else np.uint64)
        np.cumsum(np.concatenate(counts), out=self._first[1:])
        if total == 0:
            raise NoCrops(f"all recordings are shorter than min_frames = {min_frames} frames: lower min_seconds")

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def mean_frames(self) -> float:
        return float(self.frames[self.recordings].sum()) / len(self)

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # In the dtype of the table: numpy would copy the table otherwise.
        row = np.searchsorted(self._first, item.astype(self._first.dtype), side="right") - 1
        recording = self.recordings[row].astype(np.int64)
        first, last = self._first[row].astype(np.int64), self._first[row + 1].astype(np.int64)
        length, count = self.frames[recording], last - first
        slack = count * self.max_frames - length
        shift = (mix(_SHIFT, self.seed, epoch, recording) % (slack + 1).astype(np.uint64)).astype(np.int64)
        start = (item - first) * self.max_frames - np.where(count > 1, shift, 0)
        return recording, np.maximum(start, 0), np.minimum(start + self.max_frames, length)
