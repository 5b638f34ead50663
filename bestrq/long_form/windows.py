"""Overlapping windows of a recording, and averaging of their outputs.

T encoder frames of a window, V outputs per frame.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Window of a recording, and the part of its output that buffered inference keeps."""

    start: int
    """first mel frame, a multiple of the stride"""
    stop: int
    """mel frame after the last"""
    keep_start: int
    """first encoder frame of the recording that is kept from this window"""
    keep_stop: int
    """encoder frame after the last that is kept"""


def plan_windows(num_frames: int, context: int, overlap: float, stride: int) -> list[Window]:
    """Windows of at most `context` mel frames, whose kept parts tile the encoder frames of the recording.

    Windows start a hop of `(1 - overlap) * context` apart. With overlap, the last window is moved back to end with the
    recording, so that it has a full context too. Without overlap this is plain chunking, and the last chunk is shorter.

    Args:
        num_frames: mel frames of the recording.
        context: mel frames of a window; 0 for the whole recording.
        overlap: share of a window that is not kept.
        stride: mel frames per encoder frame.
    """
    if context == 0 or num_frames <= context:
        return [Window(0, num_frames, 0, -(-num_frames // stride))]
    # In encoder frames from here on: a window that started between two would shift the grid of the subsampling.
    total, size = -(-num_frames // stride), max(1, context // stride)
    hop = min(size, max(1, round(size * (1 - overlap))))
    margin = (size - hop) // 2
    latest = total - 1 if hop == size else max(total - size, 0)
    windows: list[Window] = []
    kept = 0
    while kept < total:
        start = min(max(kept - margin, 0), latest)
        is_last = start + size >= total
        keep_stop = total if is_last else start + margin + hop
        windows.append(Window(start * stride, min((start + size) * stride, num_frames), kept, keep_stop))
        kept = keep_stop
    return windows


class RunningAverage:
    """Mean of the probabilities of each frame over all windows that contain it, computed window by window.

    Windows are weighted equally, as in the source. Sums are computed on logarithms, so that no probability
    underflows to log(0). Only the overlap with the next window is held in memory.

    Source: Flynn and Ragni 2023, arXiv 2310.15672.
    """

    def __init__(self) -> None:
        self.log_sum: Tensor | None = None
        """`[n, V]`: log of the sums of probabilities of the unfinished frames, which the next window starts with"""
        self.count: Tensor = torch.zeros(0, dtype=torch.int64)
        """int64 `[n]`: number of windows in each sum"""

    def add(self, log_probs: Tensor, num_finished: int) -> Tensor:
        """Add the next window and return the averages of its first frames, which no later window contains.

        Args:
            log_probs: `[T, V]`, from the first unfinished frame on; not modified.
            num_finished: frames up to the start of the next window; T for the last one.

        Returns:
            `[num_finished, V]`, in the dtype of `log_probs`.
        """
        count = torch.ones(len(log_probs), dtype=torch.int64, device=log_probs.device)
        log_sum = log_probs
        if self.log_sum is not None and len(self.log_sum):
            held = len(self.log_sum)
            log_sum = torch.cat((torch.logaddexp(self.log_sum, log_probs[:held]), log_probs[held:]))
            count[:held] += self.count
        # A copy, because a view would keep the whole window in memory.
        self.log_sum, self.count = log_sum[num_finished:].clone(), count[num_finished:]
        return log_sum[:num_finished] - count[:num_finished, None].to(log_sum).log()


def are_log_probs(outputs: Tensor) -> bool:
    """Return whether the probabilities of each frame of `[T, V]` sum to one."""
    total = outputs.logsumexp(dim=-1)
    return bool((total.abs() < math.log(1.01)).all())
