"""Which crop comes k-th in epoch e: pure functions of (seed, e, k), nothing materialised, nothing remembered.

Everything random about a crop (its place in the order, its shift, its seed) is a hash of integers, so any process can
work it out by itself, at any point of any epoch, at the cost of looking at that crop alone.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import DataError
from data.shards import Dataset
from data.transcripts import Word, label_text

ROUNDS = 6
# A pause longer than this many seconds is cut half as far from either word, and what lies between is left out.
LONG_PAUSE = 1.0
_ORDER, _SHIFT, _CROP = 1, 2, 3  # domains of the hash: two uses never share numbers


def mix(*numbers: int | np.ndarray) -> np.ndarray:
    """Hash integers (each taken modulo 2**64) or arrays of them to uint64, elementwise.

    Each number is added to the state, which then goes through the finaliser of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014).
    """
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in numbers:
            word = np.uint64(number % (1 << 64)) if isinstance(number, int) else number.astype(np.uint64)
            state = state + word + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


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


class CropTable(ABC):
    """The one shape of an order: `len()` crops an epoch, of which `crops(epoch, k)` gives any.

    Attributes:
        seed: int that the order is keyed with.
        max_frames: no crop is longer.
        min_frames: crops shorter than this are to be left out.
    """

    seed: int
    max_frames: int
    min_frames: int

    @abstractmethod
    def __len__(self) -> int:
        """Crops in an epoch, those to be left out included."""

    @abstractmethod
    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(recording, start, stop) of the items, int64."""

    def text(self, item: int) -> str:
        """Transcript of an item; "" where the order knows none."""
        return ""

    def crops(self, epoch: int, k: np.ndarray) -> Crops:
        """Crops number k (int64 array, each in range(len)) of an epoch."""
        item = permute(k, len(self), self.seed, epoch)
        seed = (mix(_CROP, self.seed, epoch, item) >> np.uint64(1)).astype(np.int64)
        return Crops(*self._cut(epoch, item), seed, item)

    def crop(self, epoch: int, k: int) -> tuple[int, int, int, int]:
        """(recording, start, stop, seed) of crop k of an epoch."""
        one = self.crops(epoch, np.array([k]))
        return int(one.recording[0]), int(one.start[0]), int(one.stop[0]), int(one.seed[0])


class CropOrder(CropTable):
    """Crops for self-supervised training: short recordings whole, long ones cut anew at every epoch.

    A recording of n > max_frames frames is cut into n // max_frames + 1 pieces on a grid of max_frames that a random
    shift moves from epoch to epoch: every frame is in exactly one piece. Pieces below min_frames are left out.

    Args:
        frames: int [N], lengths of the recordings.
        recordings: int [N], their numbers in the dataset; by default 0 .. N - 1.
    """

    def __init__(
        self, frames: np.ndarray, max_frames: int, min_frames: int, seed: int, recordings: np.ndarray | None = None
    ) -> None:
        if not 0 < min_frames <= max_frames:
            raise DataError(f"min_frames {min_frames} and max_frames {max_frames}: need 0 < min_frames <= max_frames")
        frames = np.asarray(frames, np.int64)
        recordings = np.arange(len(frames)) if recordings is None else np.asarray(recordings, np.int64)
        long_enough = frames >= min_frames
        self.too_short = int(len(frames) - long_enough.sum())
        self.frames, self.recordings = frames[long_enough], recordings[long_enough]
        self.max_frames, self.min_frames, self.seed = max_frames, min_frames, seed
        pieces = np.where(self.frames <= max_frames, 1, self.frames // max_frames + 1)
        self._first = np.concatenate([[0], np.cumsum(pieces)])
        if len(self) == 0:
            raise DataError(f"no recording has the {min_frames} frames that min_frames asks for")

    def __len__(self) -> int:
        return int(self._first[-1])

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row = np.searchsorted(self._first, item, side="right") - 1
        length, recording = self.frames[row], self.recordings[row]
        pieces = self._first[row + 1] - self._first[row]
        slack = pieces * self.max_frames - length
        shift = (mix(_SHIFT, self.seed, epoch, recording) % (slack + 1).astype(np.uint64)).astype(np.int64)
        begin = (item - self._first[row]) * self.max_frames - np.where(pieces > 1, shift, 0)
        return recording, np.maximum(begin, 0), np.minimum(begin + self.max_frames, length)


class FixedCrops(CropTable):
    """A table of crops with transcripts, the same in every epoch, in another order each time.

    Args:
        recording, start, stop: int [N].
        texts: N transcripts.
        left_out: what did not become a crop: a count for every reason.
    """

    def __init__(
        self,
        recording: Sequence[int] | np.ndarray,
        start: Sequence[int] | np.ndarray,
        stop: Sequence[int] | np.ndarray,
        texts: list[str],
        seed: int = 0,
        left_out: dict[str, int] | None = None,
    ) -> None:
        columns = (np.asarray(column, np.int64) for column in (recording, start, stop))
        self.recording, self.start, self.stop = columns
        self.texts = texts
        self.seed = seed
        self.left_out = left_out or {}
        if not len(self.recording) == len(self.start) == len(self.stop) == len(texts):
            raise DataError("a crop table's columns differ in length")
        if not texts:
            raise DataError("a crop table without crops: nothing to train on")
        lengths = self.stop - self.start
        self.max_frames, self.min_frames = int(lengths.max()), int(lengths.min())

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, item: int) -> str:
        return self.texts[item]

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.recording[item], self.start[item], self.stop[item]


def supervised_crops(
    dataset: Dataset,
    recordings: np.ndarray,
    max_frames: int,
    min_frames: int,
    seed: int = 0,
    normalise: Callable[[str, str], str] = label_text,
) -> FixedCrops:
    """The crops of labelled training: recordings whole, or cut between words where they exceed max_frames.

    No word is split: cuts lie in the middle of a gap between two words. What cannot be used is left out, counted in
    `left_out` and logged as a warning: long recordings without word times, words longer than max_frames, crops below
    min_frames or without a word.

    Args:
        recordings: int [N], numbers of the recordings (`dataset.select(...)`).
        normalise: (text, language) -> label; a crop whose label is empty is left out.
    Raises:
        DataError: recordings without a transcript (counted, the first named), or nothing is left.
    """
    texts = [dataset.text(i) for i in recordings]
    silent = [int(i) for i, text in zip(recordings, texts, strict=True) if text is None]
    if silent:
        raise DataError(
            f"{dataset.path}: {len(silent)} of {len(texts)} recordings have no transcript, the first is "
            f"{dataset.id(silent[0])!r}; select others, or prepare the dataset with its transcripts"
        )
    table: list[tuple[int, int, int, str]] = []
    left_out: Counter[str] = Counter()
    for recording, text in zip(recordings.tolist(), texts, strict=True):
        frames = int(dataset.frames[recording])
        pieces = [(0, frames, str(text))]
        if frames > max_frames:
            words = dataset.words(recording)
            if not words:
                left_out["long recordings without word times"] += 1
                continue
            pieces, skipped = cut_between_words(words, frames, max_frames, dataset.features.frames_per_second)
            left_out["words longer than a crop"] += skipped
        language = dataset.languages[recording].as_py() or ""
        for start, stop, piece in pieces:
            label = normalise(piece, language)
            if stop - start < min_frames:
                left_out["crops that are too short"] += 1
            elif not label:
                left_out["crops without a word"] += 1
            else:
                table.append((recording, start, stop, label))
    left_out += Counter()  # drops the zeros
    if left_out:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        logging.getLogger(__name__).warning("%s: left out of training: %s", dataset.path, counts)
    if not table:
        raise DataError(f"{dataset.path}: no crop of {min_frames} to {max_frames} frames with a transcript: {left_out}")
    recording_column, start_column, stop_column, labels = (list(column) for column in zip(*table, strict=True))
    return FixedCrops(recording_column, start_column, stop_column, labels, seed, dict(left_out))


def cut_between_words(
    words: list[Word], frames: int, max_frames: int, frames_per_second: float
) -> tuple[list[tuple[int, int, str]], int]:
    """Cut a long recording into pieces (start, stop, text) of at most max_frames; and how many words fitted nowhere."""
    places = [0]
    edges = [0.0, *(edge for _, start, end, _ in words for edge in (start, end)), frames / frames_per_second]
    for end, start in zip(edges[::2], edges[1::2], strict=True):
        margin = min(start - end, LONG_PAUSE) / 2
        if margin >= 0:  # overlapping words are not parted
            places += [round((end + margin) * frames_per_second), round((start - margin) * frames_per_second)]
    places = sorted({min(place, frames) for place in places} | {frames})
    pieces, skipped, begin = [], 0, 0
    middles = np.array([(start + end) / 2 * frames_per_second for _, start, end, _ in words])
    while begin < len(places) - 1:
        start = places[begin]
        last = int(np.searchsorted(places, start + max_frames, side="right")) - 1
        inside = [words[i][0] for i in np.flatnonzero((middles >= start) & (middles < places[max(last, begin + 1)]))]
        if last == begin:
            skipped += len(inside)
        elif inside:
            pieces.append((start, places[last], " ".join(inside)))
        begin = max(last, begin + 1)
    return pieces, skipped
