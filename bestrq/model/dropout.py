"""Dropout whose masks are cheap to draw on a CPU.

torch draws one 32-bit number an element there, which takes up to a quarter of a small model's training time. Here every
64-bit number serves eight elements, a byte each: an element is dropped where its byte is below a threshold k, so the
share dropped is k / 256 exactly, the nearest to the one asked for, and what is kept is scaled by exactly 256 / (256 - k).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drop_threshold(share: float) -> int:
    """The k of the nearest share k / 256 to the one asked for: at least 1 for any share above 0, at most 255."""
    return 0 if share == 0 else min(max(round(share * 256), 1), 255)


def draw_kept(shape: tuple[int, ...], threshold: int, generator: torch.Generator | None = None) -> Tensor:
    """Bool mask of the elements kept, on the CPU, from torch's global generator unless another is given."""
    count = 1
    for size in shape:
        count *= size
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return (words.view(torch.uint8)[:count] >= threshold).view(shape)


class Dropout(nn.Module):
    """`torch.nn.Dropout`, with byte masks on the CPU."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def extra_repr(self) -> str:
        return f"{self.share}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.share)
        threshold = drop_threshold(self.share)
        return x * draw_kept(tuple(x.shape), threshold) * (256 / (256 - threshold))
