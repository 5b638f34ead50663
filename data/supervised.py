"""The crops of labelled training: recordings whole, long ones cut between their words."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from data.errors import DataError
from data.order import CropTable
from data.shards import Dataset
from data.transcripts import Word, label_text

# A pause longer than this many seconds is cut half as far from either word, and what lies between is left out.
LONG_PAUSE = 1.0


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
        language = dataset.language(recording)
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
