"""Crops for supervised training: whole recordings, or parts of them that are cut between words."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from common.text import label_text, label_words
from data.format.dataset import Dataset
from data.loading.cutting import CuttingSettings, cut_recording
from data.loading.order import CropTable, NoCrops


class FixedCrops(CropTable):
    """Fixed table of crops with transcripts, in a different order in every epoch.

    Args:
        recording, start, stop: int [N].
        texts: N transcripts.
        left_out: number of recordings, words or crops that were left out, by reason.

    Raises:
        UserError: columns of different length, or an empty table.
    """

    labelled = True

    def __init__(
        self,
        recording: Sequence[int] | np.ndarray,
        start: Sequence[int] | np.ndarray,
        stop: Sequence[int] | np.ndarray,
        texts: Sequence[str],
        seed: int = 0,
        left_out: dict[str, int] | None = None,
    ) -> None:
        columns = (np.asarray(column, np.int64) for column in (recording, start, stop))
        self.recording, self.start, self.stop = columns
        self.texts = texts
        self.seed = seed
        self.left_out = left_out or {}
        if not len(self.recording) == len(self.start) == len(self.stop) == len(texts):
            raise UserError("the columns of a crop table differ in length")
        if not texts:
            raise UserError("the crop table is empty: no training data")
        lengths = self.stop - self.start
        self.max_frames, self.min_frames = int(lengths.max()), int(lengths.min())

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def mean_frames(self) -> float:
        return float((self.stop - self.start).mean())

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.recording[item], self.start[item], self.stop[item]


def supervised_crops(
    dataset: Dataset,
    recordings: np.ndarray,
    max_frames: int,
    min_frames: int,
    seed: int = 0,
    cutting: CuttingSettings | None = None,
) -> FixedCrops:
    """Crops for supervised training: whole recordings, or crops between words (`data.loading.cutting`).

    Recordings are cut if they exceed max_frames or have excluded stretches. Crops are labelled with their words, whole
    recordings with the transcript (`common.text`). Omissions are counted in `left_out` and logged as a warning: long
    recordings without word times, words in no crop, and crops below min_frames or with an empty label. Another warning
    counts recordings that were cut although their words differ from the transcript.

    Args:
        recordings: int [N], indices of the recordings (`dataset.select(...)`).
        cutting: treatment of words at cuts; `CuttingSettings()` by default.

    Raises:
        UserError: recordings without a transcript (with their number and the first id), invalid limits.
        NoCrops: no crop is left.
    """
    if not 0 < min_frames <= max_frames:
        raise UserError(f"min_frames {min_frames} and max_frames {max_frames}: need 0 < min_frames <= max_frames")
    columns = array("q"), array("q"), array("q")  # 64-bit integers, shared with numpy without a copy
    labels: list[str] = []
    left_out: Counter[str] = Counter()
    without_text, mismatched = [], []
    for recording in recordings.tolist():
        text = dataset.text(recording)
        if text is None:
            without_text.append(recording)
            continue
        crops, reasons, words_match = _recording_crops(dataset, recording, text, max_frames, cutting)
        left_out += reasons
        if not words_match:
            mismatched.append(recording)
        for start, stop, label in crops:
            if stop - start < min_frames:
                left_out["crops that are too short"] += 1
            elif not label:
                left_out["crops without a word"] += 1
            else:
                for column, value in zip(columns, (recording, start, stop), strict=True):
                    column.append(value)
                labels.append(label)
    if without_text:
        raise UserError(
            f"{dataset.location}: {len(without_text)} of {len(recordings)} recordings have no transcript, the first is "
            f"{dataset.id(without_text[0])!r}; select others, or prepare the dataset with its transcripts"
        )
    log = logging.getLogger(__name__)
    if left_out:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        log.warning("%s: left out of training: %s", dataset.location, counts)
    if mismatched:
        message = "%s: the words of %d long recordings differ from their transcripts, the first is %r"
        log.warning(message, dataset.location, len(mismatched), dataset.id(mismatched[0]))
    if not labels:
        limits = f"{min_frames} to {max_frames} frames"
        raise NoCrops(f"{dataset.location}: no crop of {limits} with a transcript: {dict(left_out)}")
    numbers, starts, stops = (np.frombuffer(column, np.int64) for column in columns)
    return FixedCrops(numbers, starts, stops, labels, seed, dict(left_out))


def _recording_crops(
    dataset: Dataset,
    recording: int,
    text: str,
    max_frames: int,
    cutting: CuttingSettings | None,
) -> tuple[list[tuple[int, int, str]], Counter[str], bool]:
    """(start, stop, label) of the crops, counts of omissions by reason, and whether words and transcript agree."""
    frames = int(dataset.frames[recording])
    excluded, language = dataset.excluded(recording) or [], dataset.language(recording)
    label = label_text(text, language)
    if frames <= max_frames and not excluded:
        return [(0, frames, label)], Counter(), True
    words = dataset.words(recording)
    if not words:
        kind = "recordings with excluded stretches" if excluded else "long recordings"
        return [], Counter({f"{kind} without word times": 1}), True
    # Labels of all words at once, because two words may form one label.
    labels = label_words([word.word for word in words], language)
    labelled = [word._replace(word=label) for word, label in zip(words, labels, strict=True)]
    cut = cut_recording(labelled, frames, max_frames, dataset.features.frames_per_second, cutting, excluded)
    texts = (" ".join(text.split()) for text in cut.texts)
    words_match = " ".join(filter(None, labels)) == label
    return list(zip(cut.start, cut.stop, texts, strict=True)), cut.left_out, words_match
