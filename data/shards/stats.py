"""Table of durations, texts and speech rate of a dataset, or of its languages, speakers or splits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.format.dataset import Dataset

HEADER = (
    "recordings", "hours", "shortest", "median", "longest",
    "with text", "words", "characters", "distinct words", "distinct characters", "words/s", "characters/s",
)  # fmt: skip
_MAX_PENDING = 1 << 16


@dataclass
class _DistinctStrings:
    """Number of distinct strings, by 64-bit hashes of 8 bytes each."""

    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    pending: set[int] = field(default_factory=set)

    def add(self, strings: Iterable[str]) -> None:
        self.pending.update(map(hash, strings))
        if len(self.pending) > _MAX_PENDING:
            self.fold()

    def fold(self) -> int:
        """Add the pending hashes; return the number of distinct strings."""
        self.hashes = np.union1d(self.hashes, np.fromiter(self.pending, np.int64, len(self.pending)))
        self.pending = set()
        return len(self.hashes)


@dataclass
class _TextTotals:
    """Totals of the texts of a group."""

    recordings: int = 0
    frames: int = 0
    words: int = 0
    characters: int = 0
    vocabulary: _DistinctStrings = field(default_factory=_DistinctStrings)
    alphabet: set[str] = field(default_factory=set)

    def add(self, text: str, frames: int) -> None:
        words = text.split()
        self.recordings += 1
        self.frames += frames
        self.words += len(words)
        self.characters += sum(map(len, words))
        self.vocabulary.add(words)
        self.alphabet.update(*words)


def statistics_table(dataset: Dataset, by: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of cells as text; one row, or one per value of the label `by`.

    Words are separated by spaces; characters do not include spaces; rates are over the recordings with text.
    Raises UserError if the index is damaged.
    """
    if by is None:
        names, codes = ["all"], np.zeros(len(dataset), np.int32)
    else:
        names, codes = dataset.index.labels[by]
    texts = _text_totals(dataset, codes, len(names))
    rate = dataset.features.frames_per_second
    order = np.argsort(codes, kind="stable")
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1))
    rows = []
    for group in sorted(range(len(names)), key=lambda g: names[g]):
        seconds = dataset.frames[order[edges[group] : edges[group + 1]]] / rate
        if not len(seconds):
            continue
        t = texts[group]
        text_seconds = t.frames / rate
        numbers: list[float | None] = [
            len(seconds), seconds.sum() / 3600, seconds.min(), float(np.median(seconds)), seconds.max(),
            t.recordings, t.words, t.characters, t.vocabulary.fold(), len(t.alphabet),
            t.words / text_seconds if text_seconds else None, t.characters / text_seconds if text_seconds else None,
        ]  # fmt: skip
        rows.append([names[group] or "-", *map(_cell, numbers)])
    return [by or "", *HEADER], rows


def _text_totals(dataset: Dataset, codes: np.ndarray, groups: int) -> list[_TextTotals]:
    """Totals of every group, read one batch of the index at a time."""
    texts, first = [_TextTotals() for _ in range(groups)], 0
    for batch in dataset.index.batches:
        dataset.index.value("text", first)  # validates the column
        for number, text in enumerate(batch["text"].to_pylist(), first):
            if text is not None:
                texts[codes[number]].add(text, int(dataset.frames[number]))
        first += len(batch)
    return texts


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def csv_text(rows: Sequence[Sequence[str]]) -> str:
    """Text of a CSV file (RFC 4180)."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
