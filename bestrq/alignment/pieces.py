"""Cuts of a long recording and its transcript into pieces that are aligned independently.

A cut is the first frame of a word whose first label `anchors.match_labels` has matched, with matched labels on both
sides. A region lies between two cuts. Neighbouring regions form a piece, up to a number of lattice cells.

Shapes: T encoder frames, U labels, N words, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bestrq.alignment.anchors import Labels, match_labels
from bestrq.decoding.tokens import BLANK

STAR = -1
"""label that matches any audio"""
# Labels that must match on both sides of a cut.
_CONTEXT = 2
# A region with more decoded labels than this has audio that is missing from the transcript.
_SURPLUS_SHARE, _SURPLUS_LABELS = 1.2, 3
# Expected number of decoded labels for a star.
_LABELS_PER_STAR = 8


@dataclass(frozen=True)
class Transcript:
    """Labels of N consecutive words, with separators between them."""

    ids: Labels
    """int64 `[U]`"""
    first: Labels
    """int64 `[N]`, position of the word's first label"""
    stop: Labels
    """int64 `[N]`, position after its last label; equal to `first` for a word without labels"""

    @classmethod
    def from_words(cls, words: Sequence[Sequence[int]], separator: Sequence[int]) -> "Transcript":
        """Transcript from the labels of every word (1 to V - 1, or STAR) and those of separators (a space, or none)."""
        ids: list[int] = []
        edges = np.zeros((len(words), 2), np.int64)
        for edge, word in zip(edges, words, strict=True):
            if word and ids:
                ids += separator
            edge[:] = len(ids), len(ids) + len(word)
            ids += word
        return cls(np.array(ids, np.int64), edges[:, 0], edges[:, 1])

    def frames_needed(self) -> int:
        """Minimum number of CTC frames for all labels."""
        return _frames_needed(self.ids)


@dataclass(frozen=True)
class Region:
    """Words [first, stop) and frames [start, end) between two cuts."""

    first: int
    stop: int
    start: int
    end: int
    starred: bool
    """the region has many more decoded labels than transcript labels"""


@dataclass(frozen=True)
class Piece:
    """Regions that are aligned together."""

    regions: list[Region]
    ids: list[int]
    places: list[int]
    """position of every id among the transcript's labels; -1 for an inserted star"""
    possible: bool
    """the frames suffice for the labels, and the lattice does not exceed the limit of cells"""

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.regions[-1].end - self.regions[0].start

    @property
    def num_labels(self) -> int:
        """Number of labels, without stars."""
        return sum(label != STAR for label in self.ids)


def cut_regions(transcript: Transcript, best: Labels) -> list[Region]:
    """Regions of a recording, which cover all words and frames.

    Args:
        best: int64 `[T]`, most probable label of every frame.
    """
    frame = np.flatnonzero(np.diff(best, prepend=BLANK) * (best != BLANK))
    decoded = best[frame]
    matched = match_labels(transcript.ids, decoded)
    padded = np.pad(matched, _CONTEXT, constant_values=-1)
    neighbours = np.lib.stride_tricks.sliding_window_view(padded, 2 * _CONTEXT + 1)
    agreed = (neighbours >= 0).all(axis=1) & (np.diff(neighbours, axis=1) == 1).all(axis=1)
    words = np.flatnonzero(transcript.first < transcript.stop)
    words = words[agreed[transcript.first[words]]]
    places = transcript.first[words]
    partners = matched[places]
    ends = len(transcript.first), len(best), len(transcript.ids), len(decoded)
    first_words, starts, label_edges, decoded_edges = (
        np.concatenate([[0], inner, [end]])
        for inner, end in zip((words, frame[partners], places, partners), ends, strict=True)
    )
    stars = np.concatenate([[0], np.cumsum(transcript.ids == STAR)])[label_edges]
    expected = np.diff(label_edges) + _LABELS_PER_STAR * np.diff(stars)
    starred = np.diff(decoded_edges) > _SURPLUS_SHARE * expected + _SURPLUS_LABELS
    columns = (first_words[:-1], first_words[1:], starts[:-1], starts[1:], starred)
    return [Region(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def plan_pieces(
    transcript: Transcript, best: Labels, vocab_size: int, piece_cells: int, max_cells: int
) -> Iterator[Piece]:
    """Pieces of neighbouring regions, up to `piece_cells` together; one that cannot be aligned is a separate piece.

    Args:
        best: int64 `[T]`, most probable label of every frame.
        piece_cells, max_cells: see `alignment.AlignmentSettings`.
    """

    def cells(frames: int, labels: int) -> int:
        return frames * (2 * labels + 1 + vocab_size)

    piece: Piece | None = None
    for region in cut_regions(transcript, best):
        ids, places = _region_labels(region, transcript)
        frames = region.end - region.start
        possible = _frames_needed(ids) <= frames and cells(frames, len(ids)) <= max_cells
        if piece and possible and cells(piece.frames + frames, len(piece.ids) + len(ids)) <= piece_cells:
            piece.regions.append(region)
            piece.ids.extend(ids)
            piece.places.extend(places)
            continue
        if piece:
            yield piece
        piece = Piece([region], ids, places, possible)
        if not possible:
            yield piece
            piece = None
    if piece:
        yield piece


def _frames_needed(ids: Sequence[int] | Labels) -> int:
    """Minimum number of CTC frames: one per label, and a blank between equal neighbours."""
    labels = np.asarray(ids)
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def _region_labels(region: Region, transcript: Transcript) -> tuple[list[int], list[int]]:
    """Labels of a region, up to the first word of the next one, and their positions in the transcript."""
    start = int(transcript.first[region.first])
    end = int(transcript.first[region.stop]) if region.stop < len(transcript.first) else len(transcript.ids)
    if not region.starred:
        return transcript.ids[start:end].tolist(), list(range(start, end))
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
        # A region starts with its first word. Only the first region may have other audio before it.
        if transcript.ids[first] != STAR and (first > start or region.start == 0):
            add_star()
        ids += transcript.ids[first:stop].tolist()
        places += range(first, stop)
    add_star()
    return ids, places
