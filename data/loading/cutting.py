"""Cutting of long recordings between words, so that the audio of a crop contains exactly its words.

A *unit* is never divided: a word, a group of overlapping words, or a run of words with guessed times (confidence 0)
together with the gaps around it, because these words may lie anywhere in it. Units are disjoint, sorted and measured in
frames, so the unit at a frame is found by bisection: a recording of ten hours is cut in milliseconds.

Crops do not overlap the excluded stretches of the recording, and have at most `max_frames` frames.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.errors import UserError
from data.transcripts import Word

# Seconds between a cut and the next word; shorter pauses are cut in the middle.
MARGIN = 0.5
# Seconds of a pause that is preferred to other word boundaries, whose times may be inaccurate.
SILENCE = 0.1

CUT = "words divided by a cut"
EXCLUDED = "words in excluded stretches"
LONGER = "words longer than a crop"


@dataclass(frozen=True)
class CuttingSettings:
    """Treatment of words at the cuts of long recordings."""

    straddling: Literal["shift", "drop", "mask"] = "shift"
    """Treatment of a word that spans a nominal cut. shift: cut at an earlier pause or word boundary, or else as mask.
    drop: its text is in neither crop, its audio is split between both. mask: its text and frames are in no crop."""
    shift_seconds: float = 2.0
    """Maximum number of seconds by which shift cuts earlier."""

    def __post_init__(self) -> None:
        if not 0 <= self.shift_seconds < math.inf:
            raise UserError(f"cutting.shift_seconds is {self.shift_seconds}: give 0 or more")


@dataclass(frozen=True)
class RecordingCrops:
    """Crops of a recording, in order."""

    start: list[int]
    """First frame of every crop."""
    stop: list[int]
    """Frame after the last of every crop."""
    texts: list[str]
    """Words of every crop, joined by spaces; "" without words."""
    left_out: Counter[str]
    """Number of words in no crop, by reason."""


@dataclass(frozen=True)
class Units:
    """Indivisible units of a recording, sorted, as columns."""

    start: np.ndarray
    """int64 [n], first frame"""
    end: np.ndarray
    """int64 [n], frame after the last"""
    first: np.ndarray
    """int64 [n + 1], index of the first word; the last entry is the number of words"""
    guessed: np.ndarray
    """bool [n], True if a word of the unit has a guessed time; no cut is placed next to such a unit"""

    def words(self, unit: int) -> range:
        """Indices of the words of a unit."""
        return range(int(self.first[unit]), int(self.first[unit + 1]))


def cut_recording(
    words: Sequence[Word],
    frames: int,
    max_frames: int,
    frames_per_second: float,
    settings: CuttingSettings | None = None,
    excluded: Sequence[tuple[float, float]] = (),
) -> RecordingCrops:
    """Cut a recording, without its excluded stretches, into crops of at most `max_frames`; count the words in no crop.

    A stretch between two excluded stretches is a single crop if it is short enough. Longer ones are cut at nominal
    positions: every `max_frames` from the start of the stretch or, with shift, from the previous cut.

    The frames of a masked word are removed by ending a crop at its first frame and starting the next one after its
    last. This equals masking them in attention, loss and scoring, because the encoder masks gaps between segments.

    Args:
        words: sorted by start (see `data.word_times.base.check_word_times`).
        frames: length of the recording.
        settings: `CuttingSettings()` by default.
        excluded: (start, end) in seconds.

    Raises:
        UserError: invalid times of an excluded stretch.
    """
    settings = settings or CuttingSettings()
    is_drop = settings.straddling == "drop"
    units = find_units(words, frames, frames_per_second, merge=not is_drop)
    gaps = excluded_frames(excluded, frames, frames_per_second)
    removed = _overlapping(units, gaps)
    if not is_drop:  # the audio of a removed word is removed with it
        gaps = _merged(np.concatenate([gaps, np.stack([units.start[removed], units.end[removed]], axis=1)]))
    kept = np.flatnonzero(~removed)
    kept_start = units.start[kept]
    limit, margin, silence = (round(s * frames_per_second) for s in (settings.shift_seconds, MARGIN, SILENCE))
    starts, stops, texts = [], [], []
    left_out: Counter[str] = Counter()
    # A word of zero length may be outside all stretches although it overlaps no gap.
    placed = np.zeros(len(removed), bool)
    for start, end in _between(gaps, frames):
        inside = kept[np.searchsorted(kept_start, start) : np.searchsorted(kept_start, end, "right")]
        placed[inside] = True
        stretch = _Stretch(start, end, units.start[inside], units.end[inside], units.guessed[inside])
        if is_drop:
            crops, lost = _drop(stretch, max_frames)
        elif settings.straddling == "mask":
            crops, lost = _mask(stretch, max_frames)
        else:
            crops, lost = _shift(stretch, max_frames, limit, margin, silence)
        for first, stop, selected in crops:
            starts.append(first)
            stops.append(stop)
            texts.append(" ".join(words[w].word for unit in inside[selected].tolist() for w in units.words(unit)))
        for unit in inside[lost].tolist():
            left_out[LONGER if units.end[unit] - units.start[unit] > max_frames else CUT] += len(units.words(unit))
    left_out[EXCLUDED] += int(np.diff(units.first)[~placed].sum())
    return RecordingCrops(starts, stops, texts, +left_out)


def find_units(words: Sequence[Word], frames: int, frames_per_second: float, merge: bool) -> Units:
    """Units of a recording, sorted by start. With merge=False every word is a unit, and units may overlap."""
    count = len(words)
    start, end = (
        np.rint(np.fromiter((word[field] for word in words), np.float64, count) * frames_per_second)
        .astype(np.int64)
        .clip(0, frames)
        for field in (1, 2)
    )
    guessed = np.fromiter((word.confidence == 0 for word in words), bool, count)
    # A word with a guessed time may be anywhere between the neighbours with known times.
    before = np.maximum.accumulate(np.where(guessed, 0, end))
    after = np.minimum.accumulate(np.where(guessed, frames, start)[::-1])[::-1]
    start = np.where(guessed, np.minimum(start, before), start)
    end = np.where(guessed, np.maximum(end, after), end)
    if not merge:
        return Units(start, end, np.arange(count + 1), guessed)
    reach = np.maximum.accumulate(end)
    first = np.flatnonzero(np.concatenate([[True], start[1:] >= reach[:-1]])[:count])
    last = np.concatenate([first[1:], [count]])[: len(first)] - 1
    any_guessed = np.logical_or.reduceat(guessed, first) if count else guessed
    return Units(start[first], reach[last], np.concatenate([first, [count]]), any_guessed)


def excluded_frames(excluded: Sequence[tuple[float, float]], frames: int, frames_per_second: float) -> np.ndarray:
    """Excluded stretches in frames: (first, after the last), int64 [n, 2], sorted and disjoint. Raises UserError."""
    for start, end in excluded:
        if not 0 <= start <= end:  # also false for NaN
            raise UserError(f"excluded stretch {start} to {end} s: 0 <= start <= end is required")
    # Rounded first, since 0.07 * 100 is slightly more than 7.
    spans = np.round(np.array(excluded, np.float64).reshape(-1, 2) * frames_per_second, 6)
    rounded = np.stack([np.floor(spans[:, 0]), np.ceil(spans[:, 1])], axis=1)
    return _merged(rounded.clip(0, frames).astype(np.int64))


def _merged(spans: np.ndarray) -> np.ndarray:
    """Sorted union of spans [n, 2]: adjacent and overlapping ones merged, empty ones removed."""
    spans = spans[spans[:, 1] > spans[:, 0]]
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    if not len(spans):
        return spans
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.flatnonzero(np.concatenate([[True], spans[1:, 0] > reach[:-1]]))
    return np.stack([spans[first, 0], reach[np.concatenate([first[1:], [len(spans)]]) - 1]], axis=1)


def _between(gaps: np.ndarray, frames: int) -> list[tuple[int, int]]:
    """Complement of sorted disjoint gaps in [0, frames), as (start, end)."""
    edges = [0, *gaps.ravel().tolist(), frames]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _overlapping(units: Units, gaps: np.ndarray) -> np.ndarray:
    """Mask of the units that share a frame with a gap, or have zero length and lie within one, bool [n]."""
    following = np.searchsorted(gaps[:, 1], units.start, side="right")  # first gap that ends after the unit's start
    gap_start = np.concatenate([gaps[:, 0], [np.iinfo(np.int64).max]])[following]
    return np.asarray(gap_start < units.end)


@dataclass(frozen=True)
class _Stretch:
    """Frames between two excluded stretches, and the units inside."""

    first: int
    stop: int
    start: np.ndarray
    end: np.ndarray
    guessed: np.ndarray


class _Cutter:
    """Builder of the crops (first frame, stop, units) of a stretch, from left to right; `lost` has the other units."""

    def __init__(self, stretch: _Stretch) -> None:
        self.start, self.end = stretch.start.tolist(), stretch.end.tolist()
        self.first, self.unit = stretch.first, 0  # of the open crop
        self.crops: list[tuple[int, int, Any]] = []
        self.lost: list[int] = []

    def unit_after(self, frame: int) -> int:
        """First unit that ends after a frame."""
        return bisect_right(self.end, frame, lo=self.unit)

    def cut(self, frame: int, unit: int) -> None:
        """Close the crop at `frame`, before `unit`, and open the next one there."""
        if frame > self.first:
            self.crops.append((self.first, frame, slice(self.unit, unit)))
        else:  # words of zero length after the last frame
            self.lost += range(self.unit, unit)
        self.first, self.unit = max(frame, self.first), unit

    def cut_out(self, unit: int) -> None:
        """Close the crop at the start of the unit, and open the next one at its end."""
        self.cut(self.start[unit], unit)
        self.lost.append(unit)
        self.first, self.unit = self.end[unit], unit + 1


_CropsAndLost = tuple[list[tuple[int, int, Any]], list[int]]


def _drop(stretch: _Stretch, max_frames: int) -> _CropsAndLost:
    """Cut at every nominal position; units that span a cut are lost."""
    cuts = [*range(stretch.first, stretch.stop, max_frames), stretch.stop]
    last = len(cuts) - 2
    first_crop = np.minimum((stretch.start - stretch.first) // max_frames, last)
    last_crop = np.maximum(-(-(stretch.end - stretch.first) // max_frames) - 1, first_crop)
    undivided = np.flatnonzero(first_crop == last_crop)  # sorted by crop, because units are sorted by start
    edges = np.searchsorted(first_crop[undivided], np.arange(last + 2))
    crops = [(cuts[k], cuts[k + 1], undivided[edges[k] : edges[k + 1]]) for k in range(last + 1)]
    return crops, np.flatnonzero(first_crop < last_crop).tolist()


def _mask(stretch: _Stretch, max_frames: int) -> _CropsAndLost:
    """Cut at every nominal position, or cut out the unit there."""
    cutter = _Cutter(stretch)
    for nominal in range(stretch.first + max_frames, stretch.stop, max_frames):
        unit = cutter.unit_after(nominal)
        if unit < len(cutter.start) and cutter.start[unit] < nominal:
            cutter.cut_out(unit)
        elif nominal > cutter.first:  # false after cutting out a unit longer than a crop
            cutter.cut(nominal, unit)
    cutter.cut(stretch.stop, len(cutter.start))
    return cutter.crops, cutter.lost


def _shift(stretch: _Stretch, max_frames: int, limit: int, margin: int, silence: int) -> _CropsAndLost:
    """Cut at the last pause before every nominal position, else between two words, else cut out the unit there."""
    cutter = _Cutter(stretch)
    count = len(cutter.start)
    gap = stretch.start - np.concatenate([[stretch.first], stretch.end])[:count]
    cut_before = (stretch.start - np.minimum(gap // 2, margin)).tolist()
    next_to_guess = stretch.guessed | np.concatenate([[False], stretch.guessed])[:count]
    # Last unit, up to and including each unit, before which a cut is allowed: in a pause, and at any word boundary.
    pause, boundary = (
        np.maximum.accumulate(np.where(allowed, np.arange(count), -1)).tolist()
        for allowed in (~next_to_guess & (gap >= silence), ~next_to_guess)
    )
    while stretch.stop - cutter.first > max_frames:
        nominal = cutter.first + max_frames
        unit = cutter.unit_after(nominal)
        candidates = [] if unit == count else [pause[unit], boundary[unit]]
        for candidate in candidates:
            frame = min(nominal, cut_before[candidate])
            if candidate >= cutter.unit and frame > cutter.first and frame >= nominal - limit:
                cutter.cut(frame, candidate)
                break
        else:
            if unit < count and cutter.start[unit] < nominal:
                cutter.cut_out(unit)
            else:
                cutter.cut(nominal, unit)
    cutter.cut(stretch.stop, count)
    return cutter.crops, cutter.lost
