"""Noise of all segments of a batch in one pass, for devices."""

import math

import torch
from torch import Tensor

from bestrq.model.layout import locate_frames, order_segments
from common.hashing import INCREMENT, splitmix64
from common.segments import Segments


def hashed_noise(segments: Segments, like: Tensor) -> Tensor:
    """Standard normal numbers of the shape and on the device of `like`, `[R, F, M]`, without a generator.

    They are a hash of the seed of the segment, the frame within it, and the mel bin, transformed by Box and Muller (A
    note on the generation of random normal deviates, 1958). Frames in gaps have arbitrary numbers.
    """
    ordered = segments.placed or order_segments(segments).to(like.device)
    _, rank, position = locate_frames(ordered)
    assert ordered.seed is not None
    seed = splitmix64(ordered.seed.gather(1, rank) + 0x4E01)[..., None]
    mel = torch.arange(like.shape[2], device=like.device)
    bits = splitmix64(seed + (position[..., None] * like.shape[2] + mel) * INCREMENT)
    first, second = (((bits >> shift) & 0xFFFFFFFF).float().add_(0.5) * 2**-32 for shift in (32, 0))
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
