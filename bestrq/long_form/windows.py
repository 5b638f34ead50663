"""How a recording is cut into overlapping windows, and how their outputs become one again.

V outputs of a frame.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A stretch of a recording and the part of its output that is kept."""

    start: int
    """first mel frame, a multiple of the subsampling factor"""
    stop: int
    """mel frame after the last"""
    keep_start: int
    """first encoder frame of the recording that is taken from this window, where only its centre is"""
    keep_stop: int
    """encoder frame after the last that is"""


def plan_windows(num_frames: int, context: int, overlap: float, factor: int) -> list[Window]:
    """Windows of at most `context` mel frames; their kept parts tile the encoder frames of the recording.

    All windows begin a hop of `(1 - overlap) * context` apart, but the last: where windows overlap, it is moved back
    to end with the recording, so that it too has a full context. Without overlap this is plain chunking, and the last
    chunk is what is left.

    Args:
        num_frames: mel frames of the recording.
        context: mel frames of a window; 0 for the whole recording.
        overlap: share of a window that is not kept.
        factor: mel frames of an encoder frame.
    """
    if context == 0 or num_frames <= context:
        return [Window(0, num_frames, 0, -(-num_frames // factor))]
    # All in encoder frames from here: a window that began between two would shift the grid of the subsampling.
    total, size = -(-num_frames // factor), max(1, context // factor)
    hop = min(size, max(1, round(size * (1 - overlap))))
    margin = (size - hop) // 2
    latest = total - 1 if hop == size else max(total - size, 0)
    windows: list[Window] = []
    kept = 0
    while kept < total:
        start = min(max(kept - margin, 0), latest)
        last = start + size >= total
        keep_stop = total if last else start + margin + hop
        windows.append(Window(start * factor, min((start + size) * factor, num_frames), kept, keep_stop))
        kept = keep_stop
    return windows


class RunningAverage:
    """Log-probabilities of a recording's frames, each the mean over all windows that it is in, window by window.

    Probabilities are averaged, all windows alike, as the long-context paper does; done on their logarithms, so that
    none becomes log(0). What is held is the overlap with the next window.

    Source: Flynn and Ragni 2023, arXiv 2310.15672.
    """

    def __init__(self) -> None:
        self.log_sum: Tensor | None = None
        """`[n, V]`: log of the sums of probabilities of the frames that are not finished; the next window's first"""
        self.count: Tensor = torch.zeros(0, dtype=torch.int64)
        """int64 `[n]`: windows that they are in so far"""

    def add(self, log_probs: Tensor, num_finished: int) -> Tensor:
        """Add the next window and return the averages of its first frames, which no later window sees.

        Args:
            log_probs: `[T, V]`, from the first unfinished frame on; it is left as it is.
            num_finished: frames up to the start of the next window; T in the last one.

        Returns:
            `[num_finished, V]`, in the dtype of `log_probs`.
        """
        count = torch.ones(len(log_probs), dtype=torch.int64, device=log_probs.device)
        log_sum = log_probs
        if self.log_sum is not None and len(self.log_sum):
            held = len(self.log_sum)
            log_sum = torch.cat((torch.logaddexp(self.log_sum, log_probs[:held]), log_probs[held:]))
            count[:held] += self.count
        # A copy, as a view would keep the whole window alive.
        self.log_sum, self.count = log_sum[num_finished:].clone(), count[num_finished:]
        return log_sum[:num_finished] - count[:num_finished, None].to(log_sum).log()


def are_log_probs(outputs: Tensor) -> bool:
    """Whether the probabilities of every frame of `[T, V]` add up to one."""
    total = outputs.logsumexp(dim=-1)
    return bool((total.abs() < math.log(1.01)).all())
