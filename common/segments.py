"""Segments of packed rows: the description of a batch, shared by loader and models; transfers to a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it; a tensor that is there already is returned as it is.

    CUDA copies asynchronously from page-locked memory only. torch keeps such memory until the copy has finished, and
    the loader that of its batches (data/loading/pinned.py).
    """
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already: without a copy


def to_device_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of one device to another in one transfer, as `to_device` does; those of large dtypes come first."""
    if tensors[0].device.type == device.type:
        return list(tensors)
    buffer = to_device(torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors]), device)
    parts = buffer.split([tensor.nbytes for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class Segments:
    """Positions of the segments of a batch, R rows of S slots, at one frame rate.

    Loader and models have them on the CPU, where their values can be read without waiting for a device.
    """

    start: Tensor
    """int64 [R, S], first frame of every segment; 0 in unused slots. In mel frames a multiple of the encoder's
    `row_multiple`"""
    length: Tensor
    """int64 [R, S], frames; 0 marks an unused slot"""
    num_frames: int
    """frames of a row, padding included"""
    seed: Tensor | None = None
    """int64 [R, S], seed of every segment's random numbers, such as masks; None if not needed"""
    placed: Segments | None = None
    """the same in the order of their start (`layout.order_segments`), if on the device of the model already"""

    def subsampled(self, stride: int) -> Segments:
        """Segments at 1 / stride of the frame rate; the last frame of a segment may cover fewer frames."""
        if stride == 1:
            return self
        return Segments(self.start // stride, -(-self.length // stride), self.num_frames // stride, self.seed)

    def to(self, device: torch.device) -> Segments:
        """Copy to a device in one transfer, without waiting for it."""
        if device.type == "cpu":
            return self
        numbers = [self.start, self.length] + ([] if self.seed is None else [self.seed])
        start, length, *seed = to_device_together(numbers, device)
        return Segments(start, length, self.num_frames, seed[0] if seed else None)

    def used(self) -> list[tuple[int, int, int, int]]:
        """(row, slot, start, stop) of every used slot, by row, then slot."""
        rows, slots = self.length.nonzero(as_tuple=True)
        start = self.start[rows, slots]
        stop = start + self.length[rows, slots]
        return list(zip(rows.tolist(), slots.tolist(), start.tolist(), stop.tolist(), strict=True))
