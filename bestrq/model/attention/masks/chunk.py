"""Chunks with left context, for streaming (Zhang et al., U2, arXiv 2012.05481, section 3.2).

A chunk's frames see each other and some chunks before, so a chunk can be encoded as soon as it is complete. With a
bounded left context the cost is linear in the length.
"""

from dataclasses import dataclass

import torch

from bestrq.model.attention.masks import Frames
from common.errors import UserError


@dataclass(frozen=True)
class ChunkMask:
    """The query's chunk and `left_chunks` before it."""

    size: int = 4
    """frames in a chunk"""
    left_chunks: int = 1
    """chunks seen before the query's own; -1 for all"""

    def __post_init__(self) -> None:
        if self.size < 1 or self.left_chunks < -1:
            raise UserError(f"{self}: give a size of 1 or more, and left_chunks of 0 or more, or -1 for all")

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        chunk = query // self.size
        first = query * 0 if self.left_chunks < 0 else (chunk - self.left_chunks) * self.size
        return first, (chunk + 1) * self.size

    @property
    def reach(self) -> tuple[int | None, int]:
        left = None if self.left_chunks < 0 else (self.left_chunks + 1) * self.size - 1
        return left, self.size - 1


def draw_chunk_size(largest: int, multiple: int) -> int | None:
    """Dynamic chunk training (U2, section 3.2): None, the whole segment, every other time, else any size up to
    `largest` with the same probability; a whole number of `multiple` frames.

    From torch's global generator, which the scripts seed anew for every update.
    """
    whole, size = torch.rand(2).tolist()
    return None if whole < 0.5 else multiple * (1 + int(size * (largest // multiple)))


if __name__ == "__main__":
    from bestrq.model.attention.masks.draw import main

    main(ChunkMask)
