"""Crops to fixed-size rows: which crops share a row, and where each begins."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence

import numpy as np

from common.errors import UserError

Row = list[tuple[int, int]]
"""(index into the lengths, first frame) of every segment of a row, by first frame."""


def pack_rows(
    lengths: Sequence[int] | np.ndarray, row_frames: int, row_gap: int, multiple: int, max_segments: int
) -> list[Row]:
    """Pack segments into rows: longest first, each into the fullest row that still takes it (best-fit decreasing).

    Deterministic; O(n log n). Between two segments lie at least row_gap frames, starts are multiples of `multiple`, a
    row has at most max_segments segments and ends at row_frames.

    Raises:
        UserError: a length above row_frames or below 1, or a row_frames that is no multiple of `multiple`.
    """
    if row_frames % multiple:
        near = row_frames // multiple * multiple
        raise UserError(f"row_frames is {row_frames}: must be a multiple of the subsampling factor {multiple}: {near}")
    if max_segments < 1 or row_gap < 0:
        raise UserError(f"max_segments is {max_segments} and row_gap {row_gap}: need at least 1 and 0")
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and (sizes.max() > row_frames or sizes.min() < 1):
        worst = int(sizes.max() if sizes.max() > row_frames else sizes.min())
        raise UserError(f"a segment of {worst} frames does not fit rows of row_frames = {row_frames}")
    rows: list[Row] = []
    # (where the next segment of a row would begin, the row) of the rows with a slot left, fullest last.
    space: list[tuple[int, int]] = []
    longest_first = np.argsort(-sizes, kind="stable")
    for index, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        fullest = bisect_right(space, (row_frames - size, len(rows))) - 1
        if fullest >= 0:
            begin, row = space.pop(fullest)
        else:
            begin, row = 0, len(rows)
            rows.append([])
        rows[row].append((index, begin))
        following = -(-(begin + size + row_gap) // multiple) * multiple
        if len(rows[row]) < max_segments and following < row_frames:
            insort(space, (following, row))
    return rows
