"""What may attend to what, within a segment: one mask a file.

A mask is a small frozen dataclass that, called with a query, gives the interval of keys `(first, stop)` that this query
sees, both counted in frames from the start of the segment: an int for an int, int64 tensors for an int64 tensor. The
interval may stick out of the segment; who uses it clips it. Three things are promised of every mask, because the
attention is built on them (tests/model/test_masks.py): a query sees itself, both ends of the interval never fall as the
query rises, and `reach` bounds how far it sees to either side, `None` being without bound.

To see one: `python -m bestrq.model.attention.masks.window --frames 3`. To add one: a file here with such a dataclass, a
line in `make_mask`, and its name in `EncoderSettings.mask`.
"""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

Frames = TypeVar("Frames", int, Tensor)

UNBOUNDED = 1 << 31
"""frames; longer than any segment, small enough to be added to"""


class Mask(Protocol):
    """See the module."""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]: ...

    @property
    def reach(self) -> tuple[int | None, int | None]: ...


def dense(mask: Mask, length: int) -> Tensor:
    """bool `[queries, keys]` of one segment: True where the query sees the key."""
    frame = torch.arange(length)
    first, stop = mask(frame)
    return (frame >= first[:, None]) & (frame < stop[:, None])
