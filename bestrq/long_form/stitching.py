"""Transcripts of overlapping windows joined at token times.

Each window is searched by itself, so no search goes on for longer than a window: what a transducer's prediction network
has been told an hour ago cannot lead it astray. Two windows tell the same story in their overlap, but for their edges,
where a word may be cut. They are joined behind a token that both have, the one nearest to the middle of the overlap.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from bestrq.decoding.tokens import TimedTokens
from bestrq.long_form.inference import InferenceSettings, Outputs, Source, excluded_frames, run_windows

TOLERANCE_SECONDS = 0.5
"""two windows that agree put a token at times closer than this; repeated words are further apart"""
REACH_SECONDS = 8.0
"""to either side of the middle, where a token that both windows have is looked for"""

Search = Callable[[Sequence[Tensor], Sequence[Tensor]], list[TimedTokens]]
"""what was kept of windows, `[T, ...]` each, and the excluded of their frames, bool `[T]`, to the windows' tokens"""


def stitch_recordings(
    outputs: Outputs,
    reduce: Callable[[Tensor], Tensor],
    search: Search,
    sources: Sequence[Source],
    settings: InferenceSettings,
    factor: int,
    frames_per_second: float,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, TimedTokens]]:
    """Tokens of whole recordings, each with the index of its source; the windows of a batch are searched together.

    Args:
        outputs, factor, frames_per_second: as of `inference.transcribe`.
        reduce: what is kept of a window's outputs, `[T, ...]` to `[T, ...]`.
    """
    rate = frames_per_second / factor
    tokens, end = TimedTokens([], [], []), 0
    for done in run_windows(outputs, sources, settings, factor, frames_per_second, device):
        kept, heard = [], []
        for (index, window, _), frames in done:
            start = window.start // factor
            kept.append(reduce(frames).cpu())
            heard.append(excluded_frames(sources[index], start + len(frames), rate)[start:])
        for ((index, window, following), frames), found in zip(done, search(kept, heard), strict=True):
            start = window.start // factor
            tokens = join(tokens, later(found, start), start, end, rate)
            end = start + len(frames)
            if following is None:
                yield index, tokens
                tokens, end = TimedTokens([], [], []), 0


def join(before: TimedTokens, after: TimedTokens, start: int, stop: int, rate: float) -> TimedTokens:
    """The tokens of all that came before and of the next window, without those that both have.

    Up to the first frame of the overlap, `before` is right, from its last one on, `after`. Between, one goes over into
    the other behind the token nearest to the middle that both have, or at the middle where there is none.

    Args:
        before, after: tokens in frames of the recording, in the order of time.
        start: first frame of the next window.
        stop: frame after the last of the window before.
        rate: frames of a second.
    """
    middle, reach, tolerance = (start + stop) / 2, REACH_SECONDS * rate, TOLERANCE_SECONDS * rate
    low, high = max(start, middle - reach), min(stop, middle + reach)
    first, second = _between(before, low, high), _between(after, low, high)
    agreed = [
        (first.start + i, second.start + j)
        for i, j in align_tokens(_take(before, first), _take(after, second), tolerance)
    ]
    if not agreed:
        cut = bisect_left(before.first_frame, middle), bisect_left(after.first_frame, middle)
        return _concatenate(_take(before, slice(cut[0])), _take(after, slice(cut[1], None)))
    i, j = min(agreed, key=lambda pair: abs(before.first_frame[pair[0]] + after.first_frame[pair[1]] - 2 * middle))
    return _in_order(_concatenate(_take(before, slice(i + 1)), _take(after, slice(j + 1, None))))


def align_tokens(one: TimedTokens, other: TimedTokens, tolerance: float) -> list[tuple[int, int]]:
    """Pairs of equal tokens in the same order on both sides: the longest common subsequence, where a pair counts the
    more the closer its times are, and none counts from `tolerance` frames on.

    Returns:
        indices into both, increasing.
    """
    rows, columns = len(one.ids), len(other.ids)
    # best[i][j]: of the tokens from i and from j on
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]

    def weight(i: int, j: int) -> float:
        distance = abs(one.first_frame[i] - other.first_frame[j])
        return max(0.0, 1.0 - distance / tolerance) if one.ids[i] == other.ids[j] else 0.0

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


def later(tokens: TimedTokens, frames: int) -> TimedTokens:
    """The same tokens so many frames later."""
    moved = {name: [t + frames for t in getattr(tokens, name)] for name in ("first_frame", "last_frame")}
    return TimedTokens(**{**_lists(tokens), **moved})


def _between(tokens: TimedTokens, low: float, high: float) -> slice:
    return slice(bisect_left(tokens.first_frame, low), bisect_left(tokens.first_frame, high))


def _lists(tokens: TimedTokens) -> dict[str, list[Any]]:
    """One value a token in each, or none where it is not known."""
    return {field.name: getattr(tokens, field.name) for field in fields(tokens)}


def _take(tokens: TimedTokens, part: slice) -> TimedTokens:
    return TimedTokens(**{name: values[part] for name, values in _lists(tokens).items()})


def _concatenate(one: TimedTokens, other: TimedTokens) -> TimedTokens:
    return TimedTokens(**{name: values + _lists(other)[name] for name, values in _lists(one).items()})


def _in_order(tokens: TimedTokens) -> TimedTokens:
    """No token before an earlier one: two windows that agree on a token may be some frames apart on its time."""
    first, last, latest = [], [], 0
    for begin, end in zip(tokens.first_frame, tokens.last_frame, strict=True):
        latest = max(latest, begin)
        first.append(latest)
        last.append(max(latest, end))
    return TimedTokens(**{**_lists(tokens), "first_frame": first, "last_frame": last})
