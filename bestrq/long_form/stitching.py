"""Stitching: transcripts of overlapping windows, joined by token times.

Each window is decoded separately, so no search runs for longer than a window, and the state of a transducer's
prediction network cannot drift over an hour. Two windows agree in most of their overlap, but words may be cut at its
edges. They are joined after a common token, the one nearest to the middle of the overlap.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from bestrq.decoding.tokens import TimedTokens
from bestrq.long_form.inference import (
    InferenceSettings,
    OutputFunction,
    RecordingSource,
    excluded_frames,
    run_windows,
)

TOLERANCE_SECONDS = 0.5
"""maximum time difference of a common token in two windows; repeated words are further apart"""
REACH_SECONDS = 8.0
"""distance from the middle of the overlap, on each side, within which common tokens are considered"""

Search = Callable[[Sequence[Tensor], Sequence[Tensor]], list[TimedTokens]]
"""function from reduced outputs of windows, `[T, ...]` each, and their masks of excluded frames, bool `[T]`, to the
tokens of each window"""


def stitch_recordings(
    outputs: OutputFunction,
    reduce: Callable[[Tensor], Tensor],
    search: Search,
    sources: Sequence[RecordingSource],
    settings: InferenceSettings,
    stride: int,
    frames_per_second: float,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, TimedTokens]]:
    """Tokens of whole recordings, each with the index of its source; the windows of a batch are decoded together.

    Args:
        outputs, stride, frames_per_second: as in `inference.model_outputs`.
        reduce: function applied to a window's outputs before the search, `[T, ...]` to `[T, ...]`.
    """
    rate = frames_per_second / stride
    tokens, end = TimedTokens([], [], []), 0
    for batch in run_windows(outputs, sources, settings, stride, frames_per_second, device):
        reduced, excluded = [], []
        for (index, window, _), frames in batch:
            start = window.start // stride
            reduced.append(reduce(frames).cpu())
            excluded.append(excluded_frames(sources[index], start + len(frames), rate)[start:])
        for ((index, window, following), frames), window_tokens in zip(batch, search(reduced, excluded), strict=True):
            start = window.start // stride
            tokens = join(tokens, shift(window_tokens, start), start, end, rate)
            end = start + len(frames)
            if following is None:
                yield index, tokens
                tokens, end = TimedTokens([], [], []), 0


def join(before: TimedTokens, after: TimedTokens, start: int, stop: int, rate: float) -> TimedTokens:
    """Join the tokens so far with those of the next window, without duplicates in their overlap.

    Tokens are taken from `before` up to the common token nearest to the middle of the overlap, and from `after` from
    there on. Without a common token, both are cut at the middle.

    Args:
        before, after: tokens in frames of the recording, ordered by time.
        start: first frame of the next window.
        stop: frame after the last of the previous window.
        rate: frames per second.
    """
    middle, reach, tolerance = (start + stop) / 2, REACH_SECONDS * rate, TOLERANCE_SECONDS * rate
    low, high = max(start, middle - reach), min(stop, middle + reach)
    first, second = _between(before, low, high), _between(after, low, high)
    common = [
        (first.start + i, second.start + j)
        for i, j in align_tokens(_select(before, first), _select(after, second), tolerance)
    ]
    if not common:
        cut = bisect_left(before.first_frame, middle), bisect_left(after.first_frame, middle)
        return _concatenate(_select(before, slice(cut[0])), _select(after, slice(cut[1], None)))
    i, j = min(common, key=lambda pair: abs(before.first_frame[pair[0]] + after.first_frame[pair[1]] - 2 * middle))
    return _monotonic(_concatenate(_select(before, slice(i + 1)), _select(after, slice(j + 1, None))))


def align_tokens(first: TimedTokens, second: TimedTokens, tolerance: float) -> list[tuple[int, int]]:
    """Longest common subsequence of tokens, weighted by time.

    The weight of a pair decreases linearly with the distance of its times, to 0 at `tolerance` frames.

    Returns:
        pairs of indices into both, increasing.
    """
    rows, columns = len(first.ids), len(second.ids)
    # best[i][j]: weight of the best alignment of the tokens from i and from j on
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]

    def weight(i: int, j: int) -> float:
        distance = abs(first.first_frame[i] - second.first_frame[j])
        return max(0.0, 1.0 - distance / tolerance) if first.ids[i] == second.ids[j] else 0.0

    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + weight(i, j))
    pairs = []
    i = j = 0
    while i < rows and j < columns:
        if best[i][j] == best[i + 1][j]:
            i += 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            pairs.append((i, j))
            i, j = i + 1, j + 1
    return pairs


def shift(tokens: TimedTokens, frames: int) -> TimedTokens:
    """Return the tokens with all times moved by a number of frames."""
    shifted = {name: [t + frames for t in getattr(tokens, name)] for name in ("first_frame", "last_frame")}
    return TimedTokens(**{**_lists(tokens), **shifted})


def _between(tokens: TimedTokens, low: float, high: float) -> slice:
    return slice(bisect_left(tokens.first_frame, low), bisect_left(tokens.first_frame, high))


def _lists(tokens: TimedTokens) -> dict[str, list[Any]]:
    """Lists of all fields, each with one value per token, or empty if unknown."""
    return {field.name: getattr(tokens, field.name) for field in fields(tokens)}


def _select(tokens: TimedTokens, part: slice) -> TimedTokens:
    return TimedTokens(**{name: values[part] for name, values in _lists(tokens).items()})


def _concatenate(first: TimedTokens, second: TimedTokens) -> TimedTokens:
    return TimedTokens(**{name: values + _lists(second)[name] for name, values in _lists(first).items()})


def _monotonic(tokens: TimedTokens) -> TimedTokens:
    """Raise times so that none decreases: two windows may place a common token some frames apart."""
    first, last, latest = [], [], 0
    for first_frame, last_frame in zip(tokens.first_frame, tokens.last_frame, strict=True):
        latest = max(latest, first_frame)
        first.append(latest)
        last.append(max(latest, last_frame))
    return TimedTokens(**{**_lists(tokens), "first_frame": first, "last_frame": last})
