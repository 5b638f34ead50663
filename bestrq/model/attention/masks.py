"""Attention masks: the interval of keys that each query attends to, within one segment.

A mask called with queries returns the intervals `(first, stop)`, counted in frames from the start of the segment: ints
for an int, int64 tensors for an int64 tensor. An interval may extend beyond the segment; the caller clips it.

All attention backends rely on three properties (tests/model/test_masks.py): a query attends to itself; neither bound of
the interval decreases as the query increases; `reach` limits the interval on both sides.

`python -m bestrq.model.attention.draw_mask window --frames 3` draws a mask. A new mask needs a class here, an entry in
`draw_mask.MASKS`, a line in `layout.make_attention_mask` and its name in `EncoderSettings.mask`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # half a second at run time

Frames = TypeVar("Frames", int, Tensor)

UNBOUNDED = 1 << 31
"""frames: more than in any segment, and small enough that sums do not overflow int64"""


class AttentionMask(Protocol):
    """Interface of all masks."""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]: ...

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Largest number of frames before and after the query; None if unbounded."""


@dataclass(frozen=True)
class SegmentMask:
    """All frames of the segment."""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        return query * 0, query * 0 + UNBOUNDED

    @property
    def reach(self) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class CausalMask:
    """All frames up to the query."""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        return query * 0, query + 1

    @property
    def reach(self) -> tuple[None, int]:
        return None, 0


@dataclass(frozen=True)
class WindowMask:
    """Symmetric window around the query, at a cost linear in the length.

    Source: Beltagy et al., Longformer, arXiv 2004.05150, section 3.1.
    """

    frames: NonNegativeInt = 3
    """frames on each side of the query"""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        return query - self.frames, query + self.frames + 1

    @property
    def reach(self) -> tuple[int, int]:
        return self.frames, self.frames


@dataclass(frozen=True)
class ChunkMask:
    """The query's chunk and `left_chunks` before it, for streaming: a chunk can be encoded once it is complete.

    Source: Zhang et al., U2, arXiv 2012.05481, section 3.2.
    """

    size: PositiveInt = 4
    """frames per chunk"""
    left_chunks: int = 1
    """earlier chunks; -1 for all, at a cost quadratic in the length"""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        chunk = query // self.size
        first = query * 0 if self.left_chunks < 0 else (chunk - self.left_chunks) * self.size
        return first, (chunk + 1) * self.size

    @property
    def reach(self) -> tuple[int | None, int]:
        left = None if self.left_chunks < 0 else (self.left_chunks + 1) * self.size - 1
        return left, self.size - 1


def draw_chunk_size(largest: int, multiple: int) -> int | None:
    """Draw the chunk size of dynamic chunk training (U2, section 3.2): a multiple of `multiple`, or None.

    None (the entire segment) has probability 1/2; sizes up to `largest` are equally probable. Uses torch's global
    generator, which the scripts seed at every optimizer step.
    """
    coin, share = torch.rand(2).tolist()
    return None if coin < 0.5 else multiple * (1 + int(share * (largest // multiple)))


BackendMask: TypeAlias = "Tensor | BlockMask | None"
Reach = tuple[int | None, int | None]


@dataclass
class AttentionLayout:
    """Keys of every query in a batch, in frames of attention (groups of frames if `group_size` is above 1)."""

    segments: list[tuple[int, int]]
    """(start, stop) of every segment in the flattened frames [R * T], as ints for loops; empty if not on the CPU"""
    mask: AttentionMask
    first_key: Tensor
    """int64 [R, T]: first key of every query, as a frame of its row; a padding frame attends to itself"""
    stop_key: Tensor
    """int64 [R, T]: end of the keys, exclusive; neither bound decreases along a row"""
    rotary_phase: Tensor | None
    """[R, T, d / 2, 2]: `positions.rotary_phase`, counted from the start of the segment, or None"""
    backend: str
    """key of `attention.module.ATTEND`"""
    backend_mask: BackendMask
    """mask in the format of the backend; None for 'segments'"""
