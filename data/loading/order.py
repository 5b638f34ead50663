"""Which crop comes k-th in epoch e: pure functions of (seed, e, k), nothing materialised, nothing remembered.

Everything random about a crop (its place in the order, its shift, its seed) is a hash of integers, so any process can
work it out by itself, at any point of any epoch, at the cost of looking at that crop alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.hashing import mix

ROUNDS = 6
_PART = 1 << 20  # recordings that are looked at together
_ORDER, _SHIFT, _CROP, _SUBSTITUTE = 1, 2, 3, 5  # domains of the hash: two uses never share numbers


def permute(k: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a keyed pseudo-random permutation of range(size) sends each k; int64, O(1) work and memory for each.

    An alternating Feistel network on the smallest power of two that holds `size` (its halves may differ by a bit); what
    falls outside is sent through again until it falls inside (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002), on average less than twice in all.
    """
    bits = max(1, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [int(mix(_ORDER, *key, number)) for number in range(ROUNDS)]
    out = np.asarray(k).astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        low, high = out[todo] & low_mask, out[todo] >> low_bits
        for number in range(0, ROUNDS, 2):
            high = high ^ (mix(keys[number], low) & high_mask)
            low = low ^ (mix(keys[number + 1], high) & low_mask)
        out[todo] = (high << low_bits) | low
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


@dataclass(frozen=True)
class Crops:
    """Some crops, one an element: int64 arrays of one length."""

    recording: np.ndarray
    """Number of the recording in the dataset."""
    start: np.ndarray
    """First frame."""
    stop: np.ndarray
    """Frame after the last; a crop with stop - start < min_frames is to be left out."""
    seed: np.ndarray
    """Non-negative, a pure function of (seed, epoch, crop): seeds the crop's mask and noise."""
    item: np.ndarray
    """Row of the table that the crop comes from: finds its text."""


class NoCrops(UserError):
    """Recordings of which no crop can be made."""


class CropTable(ABC):
    """The one shape of an order: `len()` crops an epoch, of which `crops(epoch, k)` gives any.

    Attributes:
        seed: int that the order is keyed with.
        max_frames: no crop is longer.
        min_frames: crops shorter than this are to be left out.
        labelled: crops belong to texts, so none may be shortened.
        texts: all transcripts; empty where the order knows none.
    """

    seed: int
    max_frames: int
    min_frames: int
    labelled: bool = False
    texts: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Crops in an epoch, those to be left out included."""

    @abstractmethod
    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(recording, start, stop) of the items, int64."""

    @property
    @abstractmethod
    def mean_frames(self) -> float:
        """Frames of a crop, on average over an epoch."""

    @property
    def items(self) -> int:
        """Rows of the table, of which an epoch may have some several times and others not at all."""
        return len(self)

    def settings(self) -> dict[str, int]:
        """What else decides the order, besides seed, lengths and the number of crops: a checkpoint must agree in it."""
        return {}

    def text(self, item: int) -> str:
        """Transcript of an item; "" where the order knows none."""
        return self.texts[item] if self.texts else ""

    def crops(self, epoch: int, k: np.ndarray) -> Crops:
        """Crops number k (int64 array, each in range(len)) of an epoch."""
        item = permute(k, len(self), self.seed, epoch)
        seed = (mix(_CROP, self.seed, epoch, item) >> np.uint64(1)).astype(np.int64)
        return Crops(*self._cut(epoch, item), seed, item)

    def crop(self, epoch: int, k: int) -> tuple[int, int, int, int]:
        """(recording, start, stop, seed) of crop k of an epoch."""
        one = self.crops(epoch, np.array([k]))
        return int(one.recording[0]), int(one.start[0]), int(one.stop[0]), int(one.seed[0])

    def substitute(self, seed: int, frames: int, attempt: int) -> tuple[int, int, int, int] | None:
        """(recording, start, stop, item) of another crop, of at most `frames` frames, for one that cannot be read.

        A pure function of the unreadable crop's seed and of the attempt, so any process finds the same. None where
        this attempt's crop is too long or too short.
        """
        item = mix(_SUBSTITUTE, seed, attempt) % np.uint64(self.items)
        columns = self._cut(0, np.array([item], np.int64))
        recording, start, stop = (int(column[0]) for column in columns)
        if not self.labelled:
            stop = min(stop, start + frames)
        fits = min(self.min_frames, frames) <= stop - start <= frames
        return (recording, start, stop, int(item)) if fits else None


class CropOrder(CropTable):
    """Crops for self-supervised training: short recordings whole, long ones cut anew at every epoch.

    A recording of n > max_frames frames is cut into n // max_frames + 1 pieces on a grid of max_frames that a random
    shift moves from epoch to epoch: every frame is in exactly one piece. Pieces below min_frames are left out.

    Ten million recordings cost 80 MB: two integers of four bytes each; their lengths stay in the index.

    Args:
        frames: int [N], lengths of all recordings of the dataset.
        recordings: int [K], numbers of those that are used; by default all.
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
        asked = np.arange(len(frames), dtype=np.int32) if recordings is None else np.asarray(recordings, np.int32)
        self.frames, self.max_frames, self.min_frames, self.seed = frames, max_frames, min_frames, seed
        kept, pieces = [], []
        for part in np.array_split(asked, len(asked) // _PART + 1):
            lengths = frames[part]
            kept.append(part[lengths >= min_frames])
            lengths = lengths[lengths >= min_frames]
            pieces.append(np.where(lengths <= max_frames, 1, lengths // max_frames + 1).astype(np.uint32))
        total = sum(int(part.sum(dtype=np.int64)) for part in pieces)
        self.recordings = np.concatenate(kept)
        self.too_short = len(asked) - len(self.recordings)
        # The number of every recording's first piece, and after them the number of all pieces.
        self._first = np.zeros(len(self.recordings) + 1, np.uint32 if total < 2**32 else np.uint64)
        np.cumsum(np.concatenate(pieces), out=self._first[1:])
        if total == 0:
            raise NoCrops(f"no recording has the {min_frames} frames that min_frames asks for")

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def mean_frames(self) -> float:
        return float(self.frames[self.recordings].sum()) / len(self)

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Of one type with the table, or numpy would copy the table.
        row = np.searchsorted(self._first, item.astype(self._first.dtype), side="right") - 1
        recording = self.recordings[row].astype(np.int64)
        first, last = self._first[row].astype(np.int64), self._first[row + 1].astype(np.int64)
        length, pieces = self.frames[recording], last - first
        slack = pieces * self.max_frames - length
        shift = (mix(_SHIFT, self.seed, epoch, recording) % (slack + 1).astype(np.uint64)).astype(np.int64)
        begin = (item - first) * self.max_frames - np.where(pieces > 1, shift, 0)
        return recording, np.maximum(begin, 0), np.minimum(begin + self.max_frames, length)
