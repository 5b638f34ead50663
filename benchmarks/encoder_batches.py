"""Workloads of benchmarks.encoder_speed: the same lengths, packed into rows for bestrq, padded for the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.machine import hardware_dtype
from bestrq.model.settings import EncoderSettings
from data.loading.rows import pack_rows

FRAMES_PER_SECOND = 100
"""mel frames"""
POOL = 1024
"""number of utterances that rows and batches are drawn from"""
SHORTEST, LONGEST, EQUAL, ROW = 2.0, 17.0, 10.0, 20.0
"""seconds: bounds of a mixed utterance, length of an equal one, length of a packed row"""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Batch of packed rows, or of padded utterances: rows with one segment that starts at 0."""

    x: Tensor
    """bf16 `[B, T, D]`, or float32 log-mel `[B, F, M]`"""
    start: Tensor
    """int64 `[B, S]`, the first frame (of x) of every segment; 0 in unused slots"""
    length: Tensor
    """int64 `[B, S]`, frames of every segment; 0 marks an unused slot"""

    @property
    def frames(self) -> int:
        """Number of frames in segments, without gaps and padding."""
        return int(self.length.sum())

    @property
    def size(self) -> int:
        """Number of frames with gaps and padding."""
        return self.x.shape[0] * self.x.shape[1]


def draw_lengths(workload: str, stride: int) -> list[int]:
    """Encoder frames (`stride` mel frames each) of the utterances of the pool."""
    if workload == "equal":
        return [round(EQUAL * FRAMES_PER_SECOND / stride)] * POOL
    seconds = SHORTEST + (LONGEST - SHORTEST) * torch.rand(POOL, generator=torch.Generator().manual_seed(1))
    return (seconds * FRAMES_PER_SECOND / stride).round().long().tolist()


def padded_batches(lengths: list[int], batch_frames: int, count: int, width: int) -> list[Batch]:
    """Return `count` batches of utterances of similar length, each of about `batch_frames` frames with padding."""
    ascending = sorted(lengths)
    groups: list[list[int]] = []
    while ascending and len(ascending) >= (size := max(1, round(batch_frames / ascending[-1]))):
        groups.append(ascending[-size:])
        del ascending[-size:]
    return [_make_batch([[(0, n)] for n in group], max(group), width) for group in _select_evenly(groups, count)]


def packed_batches(
    lengths: list[int], row_frames: int, settings: EncoderSettings, batch_frames: int, count: int
) -> list[Batch]:
    """Return `count` batches of packed rows, each of about `batch_frames` frames."""
    gap = -(-settings.row_gap // settings.stride)
    rows = pack_rows(lengths, row_frames, gap, settings.row_multiple // settings.stride, max_segments=POOL)
    size = max(1, round(batch_frames / row_frames))
    chosen = _select_evenly([[(start, lengths[i]) for i, start in row] for row in rows], size * count)
    return [_make_batch(chosen[i::count], row_frames, settings.dim) for i in range(count)]


def as_log_mel(batch: Batch, settings: EncoderSettings) -> Batch:
    """Return random log-mel with the segments of a batch of encoder frames."""
    rows, frames, _ = batch.x.shape
    stride = settings.stride
    return Batch(torch.randn(rows, frames * stride, settings.num_mels), batch.start * stride, batch.length * stride)


def _select_evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Select `count` of the items at even distances."""
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def _make_batch(rows: list[list[tuple[int, int]]], frames: int, width: int) -> Batch:
    """Make a batch of noise from rows of (start, length): the arithmetic is the same as on speech."""
    slots = max(map(len, rows))
    start, length = (torch.tensor([[s[i] for s in r] + [0] * (slots - len(r)) for r in rows]) for i in (0, 1))
    return Batch(torch.randn(len(rows), frames, width).to(hardware_dtype()).requires_grad_(), start, length)
