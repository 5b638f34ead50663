"""The workloads of benchmarks.encoder_speed: the same lengths, packed into rows for us, padded for the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.machine import hardware_dtype
from bestrq.model.settings import EncoderSettings
from data.loading.packing import pack_rows

FRAMES_PER_SECOND = 100
"""mel frames"""
POOL = 1024
"""utterances that rows and batches are made of"""
SHORTEST, LONGEST, EQUAL, ROW = 2.0, 17.0, 10.0, 20.0
"""seconds: of a mixed utterance, of an equal one, of a packed row"""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """A batch of packed rows, or of padded utterances: those are rows of one segment that begins at 0."""

    x: Tensor
    """bf16 `[B, T, D]`, or float32 log-mel `[B, F, M]`"""
    start: Tensor
    """int64 `[B, S]`, the first frame (of x) of every segment; 0 in unused slots"""
    length: Tensor
    """int64 `[B, S]`, frames of every segment; 0 marks an unused slot"""

    @property
    def frames(self) -> int:
        """Frames of segments: neither gap nor padding."""
        return int(self.length.sum())

    @property
    def size(self) -> int:
        """All frames."""
        return self.x.shape[0] * self.x.shape[1]


def draw_lengths(workload: str, stride: int) -> list[int]:
    """Encoder frames of the utterances of the pool; `stride` mel frames are one."""
    if workload == "equal":
        return [round(EQUAL * FRAMES_PER_SECOND / stride)] * POOL
    seconds = SHORTEST + (LONGEST - SHORTEST) * torch.rand(POOL, generator=torch.Generator().manual_seed(1))
    return (seconds * FRAMES_PER_SECOND / stride).round().long().tolist()


def padded_batches(lengths: list[int], batch_frames: int, count: int, width: int) -> list[Batch]:
    """Utterances of similar length together, about `batch_frames` with their padding; `count` of the batches."""
    waiting = sorted(lengths)
    groups: list[list[int]] = []
    while waiting and len(waiting) >= (size := max(1, round(batch_frames / waiting[-1]))):
        groups.append(waiting[-size:])
        del waiting[-size:]
    return [_make_batch([[(0, n)] for n in group], max(group), width) for group in _evenly(groups, count)]


def packed_batches(
    lengths: list[int], row_frames: int, settings: EncoderSettings, batch_frames: int, count: int
) -> list[Batch]:
    """Utterances packed into rows, about `batch_frames` in a batch."""
    gap = -(-settings.row_gap // settings.stride)
    rows = pack_rows(lengths, row_frames, gap, settings.row_multiple // settings.stride, max_segments=POOL)
    size = max(1, round(batch_frames / row_frames))
    chosen = _evenly([[(start, lengths[i]) for i, start in row] for row in rows], size * count)
    return [_make_batch(chosen[i::count], row_frames, settings.dim) for i in range(count)]


def as_log_mel(batch: Batch, settings: EncoderSettings) -> Batch:
    """The same utterances before the subsampling."""
    rows, frames, _ = batch.x.shape
    stride = settings.stride
    return Batch(torch.randn(rows, frames * stride, settings.num_mels), batch.start * stride, batch.length * stride)


def _evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at even distances."""
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def _make_batch(rows: list[list[tuple[int, int]]], frames: int, width: int) -> Batch:
    """Rows of (start, length), on noise: the arithmetic is the same as on speech."""
    slots = max(map(len, rows))
    start, length = (torch.tensor([[s[i] for s in r] + [0] * (slots - len(r)) for r in rows]) for i in (0, 1))
    return Batch(torch.randn(len(rows), frames, width).to(hardware_dtype()).requires_grad_(), start, length)
