"""Where a long transcript and its recording may be cut, so that every piece can be aligned by itself.

A cut is the frame where a word begins whose first label `anchors.match_labels` has matched amid labels that are matched
too. What lies between two cuts is a region; regions side by side make a piece, as large as memory allows.

T encoder frames, U labels, N words, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bestrq.alignment.anchors import Labels, match_labels
from bestrq.decoding.tokens import BLANK

STAR = -1
"""In a word's labels: anything that may be said."""
# Labels that must agree on both sides of a cut.
_CONTEXT = 2
# More labels heard in a region than this says that the transcript leaves something out there.
_SURPLUS_SHARE, _SURPLUS_LABELS = 1.2, 3
# What is likely to be heard of a word that is starred.
_LABELS_OF_A_STAR = 8


@dataclass(frozen=True)
class Transcript:
    """The labels of N words in a row, separators between them."""

    ids: Labels
    """int64 `[U]`"""
    first: Labels
    """int64 `[N]`, place of the word's first label"""
    stop: Labels
    """int64 `[N]`, place after its last; equal to `first` for a word without labels"""

    @classmethod
    def of(cls, words: Sequence[Sequence[int]], separator: Sequence[int]) -> "Transcript":
        """From the labels of every word, 1 .. V - 1 or STAR, and those between two words (a space, or nothing)."""
        ids: list[int] = []
        edges = np.zeros((len(words), 2), np.int64)
        for edge, word in zip(edges, words, strict=True):
            if word and ids:
                ids += separator
            edge[:] = len(ids), len(ids) + len(word)
            ids += word
        return cls(np.array(ids, np.int64), edges[:, 0], edges[:, 1])

    def frames_needed(self) -> int:
        """Frames that CTC needs for all of it."""
        return _frames_needed(self.ids)


@dataclass(frozen=True)
class Region:
    """What lies between two cuts: words [first, stop) in the frames [start, end)."""

    first: int
    stop: int
    start: int
    end: int
    starred: bool
    """much more was heard here than the transcript has"""


@dataclass(frozen=True)
class Piece:
    """Regions that are aligned together."""

    regions: list[Region]
    ids: list[int]
    places: list[int]
    """of every id in the transcript's labels; -1 for a star that stands for no word"""
    possible: bool
    """whether there are frames enough for the labels, and cells enough for both"""

    @property
    def frames(self) -> int:
        return self.regions[-1].end - self.regions[0].start

    @property
    def num_written(self) -> int:
        """Labels that are not stars."""
        return sum(label != STAR for label in self.ids)


def cut(transcript: Transcript, best: Labels) -> list[Region]:
    """The regions of a recording: they tile its words and its frames.

    Args:
        best: int64 `[T]`, the likeliest label of every frame.
    """
    frame = np.flatnonzero(np.diff(best, prepend=BLANK) * (best != BLANK))
    heard = best[frame]
    matched = match_labels(transcript.ids, heard)
    padded = np.pad(matched, _CONTEXT, constant_values=-1)
    beside = np.lib.stride_tricks.sliding_window_view(padded, 2 * _CONTEXT + 1)
    agreed = (beside >= 0).all(axis=1) & (np.diff(beside, axis=1) == 1).all(axis=1)
    words = np.flatnonzero(transcript.first < transcript.stop)
    words = words[agreed[transcript.first[words]]]
    places = transcript.first[words]
    partners = matched[places]
    last = len(transcript.first), len(best), len(transcript.ids), len(heard)
    first_words, starts, label_edges, heard_edges = (
        np.concatenate([[0], inner, [end]])
        for inner, end in zip((words, frame[partners], places, partners), last, strict=True)
    )
    stars = np.concatenate([[0], np.cumsum(transcript.ids == STAR)])[label_edges]
    expected = np.diff(label_edges) + _LABELS_OF_A_STAR * np.diff(stars)
    starred = np.diff(heard_edges) > _SURPLUS_SHARE * expected + _SURPLUS_LABELS
    columns = (first_words[:-1], first_words[1:], starts[:-1], starts[1:], starred)
    return [Region(*one) for one in zip(*(column.tolist() for column in columns), strict=True)]


def plan_pieces(
    transcript: Transcript, best: Labels, vocab_size: int, piece_cells: int, max_cells: int
) -> Iterator[Piece]:
    """Regions side by side, up to `piece_cells` together; what cannot be aligned stays alone.

    Args:
        best: int64 `[T]`, the likeliest label of every frame.
        piece_cells, max_cells: see `alignment.AlignmentSettings`.
    """

    def cells(frames: int, labels: int) -> int:
        return frames * (2 * labels + 1 + vocab_size)

    gathered: Piece | None = None
    for region in cut(transcript, best):
        ids, places = _labels(region, transcript)
        frames = region.end - region.start
        possible = _frames_needed(ids) <= frames and cells(frames, len(ids)) <= max_cells
        if gathered and possible and cells(gathered.frames + frames, len(gathered.ids) + len(ids)) <= piece_cells:
            gathered.regions.append(region)
            gathered.ids.extend(ids)
            gathered.places.extend(places)
            continue
        if gathered:
            yield gathered
        gathered = Piece([region], ids, places, possible)
        if not possible:
            yield gathered
            gathered = None
    if gathered:
        yield gathered


def _frames_needed(ids: Sequence[int] | Labels) -> int:
    """Frames that CTC needs for labels: one each, and a blank between equal ones."""
    labels = np.asarray(ids)
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def _labels(region: Region, transcript: Transcript) -> tuple[list[int], list[int]]:
    """Labels of a region up to the next one's first word, and their places in the transcript."""
    begin = int(transcript.first[region.first])
    end = int(transcript.first[region.stop]) if region.stop < len(transcript.first) else len(transcript.ids)
    if not region.starred:
        return transcript.ids[begin:end].tolist(), list(range(begin, end))
    ids: list[int] = []
    places: list[int] = []

    def add_star() -> None:
        if not ids or ids[-1] != STAR:
            ids.append(STAR)
            places.append(-1)

    for word in range(region.first, region.stop):
        first, stop = int(transcript.first[word]), int(transcript.stop[word])
        if first == stop:
            continue
        # A region begins where its first word does; only the recording may begin with something else.
        if transcript.ids[first] != STAR and (first > begin or region.start == 0):
            add_star()
        ids += transcript.ids[first:stop].tolist()
        places += range(first, stop)
    add_star()
    return ids, places
