"""Where a long recording is cut, so that the words of a piece are those that are said in it.

What may not be parted is a *unit*: a word, words that overlap, or a run of words whose times are guesses (confidence 0)
with the gaps around it, in which they may be said anywhere. Units are disjoint and sorted, in whole frames, so whatever
lies at a frame is found by bisection: a recording of ten hours is cut in milliseconds.

Pieces never touch the recording's excluded stretches, nor have more than `max_frames` frames.
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

# A cut keeps this many seconds away from words, where the pause is long enough; otherwise it goes through its middle.
MARGIN = 0.5
# Pauses from this many seconds on are preferred to mere boundaries between words, whose times may be a little off.
SILENCE = 0.1

CUT = "words that a cut goes through"
EXCLUDED = "words in excluded stretches"
LONGER = "words longer than a crop"


@dataclass(frozen=True)
class CuttingSettings:
    """What happens to a word that straddles the place where a long recording would be cut."""

    straddling: Literal["shift", "drop", "mask"] = "shift"
    """shift: cut earlier, at the nearest pause. drop: the word's text is in neither piece, its sound in both. mask:
    neither its text nor its frames are in either piece. Where shift finds no place it does as mask."""
    shift_seconds: float = 2.0
    """How many seconds earlier shift may cut."""

    def __post_init__(self) -> None:
        if self.straddling not in ("shift", "drop", "mask"):
            raise UserError(f"cutting.straddling is {self.straddling!r}: must be one of shift, drop, mask")
        if not 0 <= self.shift_seconds < math.inf:
            raise UserError(f"cutting.shift_seconds is {self.shift_seconds}: give 0 or more")


@dataclass(frozen=True)
class Pieces:
    """Pieces of a recording, in order."""

    start: list[int]
    """First frames."""
    stop: list[int]
    """Frames after the last ones."""
    texts: list[str]
    """Words joined by spaces; "" where none is said."""
    left_out: Counter[str]
    """Words that are in no piece: a count for every reason."""


@dataclass(frozen=True)
class Units:
    """What may not be parted, sorted: int64 or bool arrays of one length."""

    start: np.ndarray
    """First frame."""
    end: np.ndarray
    """Frame after the last."""
    first: np.ndarray
    """Number of its first word, and one entry more: the number of words."""
    guessed: np.ndarray
    """Whether it holds a word whose time is a guess: no cut may be decided by it."""

    def words(self, unit: int) -> range:
        """Numbers of a unit's words."""
        return range(int(self.first[unit]), int(self.first[unit + 1]))


def cut_recording(
    words: Sequence[Word],
    frames: int,
    max_frames: int,
    frames_per_second: float,
    settings: CuttingSettings | None = None,
    excluded: Sequence[tuple[float, float]] = (),
) -> Pieces:
    """Cut a recording into pieces of at most `max_frames`, clear of what is excluded; every word is in one or counted.

    A stretch between excluded ones that is short enough stays whole; a longer one is cut at nominal places, every
    `max_frames`, counted from the stretch's begin or (shift) from the last cut.

    A masked word's frames are left out by ending a piece at the word's first frame and beginning the next one after its
    last: at the edge of a crop, a frame that is masked out of attention, loss and scoring and one that is not there are
    the same thing to the encoder, which treats what lies between packed segments exactly so.

    Args:
        words: sorted by start (see `data.transcripts.check_word_times`).
        frames: of the recording.
        settings: by default `CuttingSettings()`.
        excluded: (start, end) in seconds.
    Raises:
        UserError: an excluded stretch whose times cannot be.
    """
    settings = settings or CuttingSettings()
    is_drop = settings.straddling == "drop"
    units = find_units(words, frames, frames_per_second, merge=not is_drop)
    gaps = excluded_frames(excluded, frames, frames_per_second)
    out = _overlapping(units, gaps)
    if not is_drop:  # all the sound of a word that is left out goes with it
        gaps = _merged(np.concatenate([gaps, np.stack([units.start[out], units.end[out]], axis=1)]))
    kept = np.flatnonzero(~out)
    kept_start = units.start[kept]
    limit, margin, silence = (round(s * frames_per_second) for s in (settings.shift_seconds, MARGIN, SILENCE))
    starts, stops, texts = [], [], []
    left_out: Counter[str] = Counter()
    # A word without length may have no place, though it shares no frame with a gap.
    placed = np.zeros(len(out), bool)
    for begin, end in _between(gaps, frames):
        inside = kept[np.searchsorted(kept_start, begin) : np.searchsorted(kept_start, end, "right")]
        placed[inside] = True
        stretch = _Stretch(begin, end, units.start[inside], units.end[inside], units.guessed[inside])
        if is_drop:
            pieces, lost = _drop(stretch, max_frames)
        elif settings.straddling == "mask":
            pieces, lost = _mask(stretch, max_frames)
        else:
            pieces, lost = _shift(stretch, max_frames, limit, margin, silence)
        for start, stop, numbers in pieces:
            starts.append(start)
            stops.append(stop)
            texts.append(" ".join(words[w].word for u in inside[numbers].tolist() for w in units.words(u)))
        for u in inside[lost].tolist():
            left_out[LONGER if units.end[u] - units.start[u] > max_frames else CUT] += len(units.words(u))
    left_out[EXCLUDED] += int(np.diff(units.first)[~placed].sum())
    return Pieces(starts, stops, texts, +left_out)


def find_units(words: Sequence[Word], frames: int, frames_per_second: float, merge: bool) -> Units:
    """The units of a recording; with merge=False every word by itself (they may overlap, their starts are sorted)."""
    count = len(words)
    start, end = (
        np.rint(np.fromiter((word[field] for word in words), np.float64, count) * frames_per_second)
        .astype(np.int64)
        .clip(0, frames)
        for field in (1, 2)
    )
    guessed = np.fromiter((word.confidence == 0 for word in words), bool, count)
    # A guessed word may be anywhere between the sure ones around it.
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
    """Excluded stretches as frames: int64 [N, 2] of (first, after the last), sorted and disjoint. Raises UserError."""
    for start, end in excluded:
        if not 0 <= start <= end:  # also false for NaN
            raise UserError(f"excluded stretch {start} to {end} s: must start at 0 or later, and end after its start")
    # Rounded first: 0.07 s is 7 frames, whatever 0.07 * 100 is in binary.
    spans = np.round(np.array(excluded, np.float64).reshape(-1, 2) * frames_per_second, 6)
    whole = np.stack([np.floor(spans[:, 0]), np.ceil(spans[:, 1])], axis=1)
    return _merged(whole.clip(0, frames).astype(np.int64))


def _merged(spans: np.ndarray) -> np.ndarray:
    """Spans [N, 2] sorted, those that touch made one, empty ones left out."""
    spans = spans[spans[:, 1] > spans[:, 0]]
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    if not len(spans):
        return spans
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.flatnonzero(np.concatenate([[True], spans[1:, 0] > reach[:-1]]))
    return np.stack([spans[first, 0], reach[np.concatenate([first[1:], [len(spans)]]) - 1]], axis=1)


def _between(gaps: np.ndarray, frames: int) -> list[tuple[int, int]]:
    """What sorted disjoint gaps leave of [0, frames)."""
    edges = [0, *gaps.ravel().tolist(), frames]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]


def _overlapping(units: Units, gaps: np.ndarray) -> np.ndarray:
    """bool [N]: which units share a frame with a gap, or have no length and lie within one."""
    behind = np.searchsorted(gaps[:, 1], units.start, side="right")  # the first gap that ends after the unit's start
    begin = np.concatenate([gaps[:, 0], [np.iinfo(np.int64).max]])[behind]
    return np.asarray(begin < units.end)


@dataclass(frozen=True)
class _Stretch:
    """What lies between two excluded stretches, and its units (all of each)."""

    begin: int
    stop: int
    start: np.ndarray
    end: np.ndarray
    guessed: np.ndarray


class _Cutter:
    """Collects pieces (begin, stop, numbers of the units) of a stretch from left to right, and lost units."""

    def __init__(self, stretch: _Stretch) -> None:
        self.start, self.end = stretch.start.tolist(), stretch.end.tolist()
        self.begin, self.unit = stretch.begin, 0  # of the piece that has begun
        self.pieces: list[tuple[int, int, Any]] = []
        self.lost: list[int] = []

    def after(self, place: int) -> int:
        """The first unit that ends after a place."""
        return bisect_right(self.end, place, lo=self.unit)

    def cut(self, place: int, unit: int) -> None:
        """End the piece at `place`, in front of `unit`, and begin the next one there."""
        if place > self.begin:
            self.pieces.append((self.begin, place, slice(self.unit, unit)))
        else:  # words without length can be where no frame is left
            self.lost += range(self.unit, unit)
        self.begin, self.unit = max(place, self.begin), unit

    def cut_out(self, unit: int) -> None:
        """End the piece at the unit's begin, and begin the next one at its end."""
        self.cut(self.start[unit], unit)
        self.lost.append(unit)
        self.begin, self.unit = self.end[unit], unit + 1


_Found = tuple[list[tuple[int, int, Any]], list[int]]


def _drop(stretch: _Stretch, max_frames: int) -> _Found:
    """Cut at every nominal place; units with a place inside are lost."""
    places = [*range(stretch.begin, stretch.stop, max_frames), stretch.stop]
    last = len(places) - 2
    first_piece = np.minimum((stretch.start - stretch.begin) // max_frames, last)
    last_piece = np.maximum(-(-(stretch.end - stretch.begin) // max_frames) - 1, first_piece)
    whole = np.flatnonzero(first_piece == last_piece)  # their pieces are sorted, as their starts are
    edges = np.searchsorted(first_piece[whole], np.arange(last + 2))
    pieces = [(places[k], places[k + 1], whole[edges[k] : edges[k + 1]]) for k in range(last + 1)]
    return pieces, np.flatnonzero(first_piece < last_piece).tolist()


def _mask(stretch: _Stretch, max_frames: int) -> _Found:
    """Cut at every nominal place, or cut out the unit that is there."""
    cutter = _Cutter(stretch)
    for place in range(stretch.begin + max_frames, stretch.stop, max_frames):
        unit = cutter.after(place)
        if unit < len(cutter.start) and cutter.start[unit] < place:
            cutter.cut_out(unit)
        elif place > cutter.begin:  # else a unit was cut out that is longer than a piece
            cutter.cut(place, unit)
    cutter.cut(stretch.stop, len(cutter.start))
    return cutter.pieces, cutter.lost


def _shift(stretch: _Stretch, max_frames: int, limit: int, margin: int, silence: int) -> _Found:
    """Cut at the last pause before every nominal place, else between two words, else cut out the unit that is there."""
    cutter = _Cutter(stretch)
    count = len(cutter.start)
    gap = stretch.start - np.concatenate([[stretch.begin], stretch.end])[:count]
    place_before = (stretch.start - np.minimum(gap // 2, margin)).tolist()
    beside_guess = stretch.guessed | np.concatenate([[False], stretch.guessed])[:count]
    # For every unit the last one, up to itself, that a cut may lie in front of: in a pause, and anywhere.
    pause, boundary = (
        np.maximum.accumulate(np.where(fit, np.arange(count), -1)).tolist()
        for fit in (~beside_guess & (gap >= silence), ~beside_guess)
    )
    while stretch.stop - cutter.begin > max_frames:
        nominal = cutter.begin + max_frames
        unit = cutter.after(nominal)
        candidates = [] if unit == count else [pause[unit], boundary[unit]]
        for candidate in candidates:
            place = min(nominal, place_before[candidate])
            if candidate >= cutter.unit and place > cutter.begin and place >= nominal - limit:
                cutter.cut(place, candidate)
                break
        else:
            if unit < count and cutter.start[unit] < nominal:
                cutter.cut_out(unit)
            else:
                cutter.cut(nominal, unit)
    cutter.cut(stretch.stop, count)
    return cutter.pieces, cutter.lost
