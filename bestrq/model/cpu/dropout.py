"""Dropout whose masks are cheap to draw on a CPU.

torch draws a number an element there, in scalar code on one core: a quarter of a small model's training time. Here a
64-bit number serves eight elements, a byte each: an element is dropped where its byte is below a threshold k. So the
share dropped is exactly k / 256, the nearest to the one asked for, and what is kept is scaled by exactly
256 / (256 - k).

The numbers are those of splitmix64 (Steele et al., Fast splittable pseudorandom number generators, 2014), a hash of a
counter, which torch's integer arithmetic makes on all cores. The counter begins at a seed from torch's global
generator: the same seed, or the same restored state of that generator, gives the same masks again.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.hashing import INCREMENT, splitmix64


def drop_threshold(share: float) -> int:
    """The k of the share k / 256 nearest to the one asked for: 1 to 255, but 0 for none."""
    return 0 if share == 0 else min(max(round(share * 256), 1), 255)


def keep_scale(threshold: int) -> float:
    """What to multiply kept elements by, so that the mean stays."""
    return 256 / (256 - threshold)


def draw_seed(count: int = 1) -> list[int]:
    """Seeds for masks, from torch's global generator."""
    return torch.randint(2**62, (count,)).tolist()


def random_words(count: int, seed: int) -> Tensor:
    """Uniform 64-bit numbers, int64 `[count]`: splitmix64 of the counters from `seed` on."""
    return splitmix64(torch.arange(seed, seed + count).mul_(INCREMENT))


def draw_kept(shape: tuple[int, ...], threshold: int, seed: int) -> Tensor:
    """Mask of that shape, uint8 on the CPU: 1 where an element is kept, 0 where it is dropped."""
    count = math.prod(shape)
    drawn = random_words((count + 7) // 8, seed).view(torch.uint8)[:count].view(shape)
    # Compared into its own type: the kernel that writes bool is not vectorised and takes 15 times as long.
    return torch.ge(drawn, threshold, out=drawn)


class _DropoutFunction(torch.autograd.Function):
    """`dropout(x)` by a byte mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        kept = draw_kept(tuple(x.shape), threshold, *draw_seed())
        ctx.save_for_backward(kept)
        ctx.scale = keep_scale(threshold)
        return kept.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (kept,) = grads, ctx.saved_tensors
        return kept.to(grad.dtype).mul_(grad).mul_(ctx.scale), None


class _AddDropoutFunction(torch.autograd.Function):
    """`x + alpha * dropout(y)` by a byte mask, in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: float, threshold: int) -> Tensor:
        kept = draw_kept(tuple(y.shape), threshold, *draw_seed())
        ctx.save_for_backward(kept)
        ctx.scale, ctx.dtype = alpha * keep_scale(threshold), y.dtype
        return torch.addcmul(x, y, kept.to(y.dtype), value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (kept,) = grads, ctx.saved_tensors
        return grad, kept.to(grad.dtype).mul_(grad).mul_(ctx.scale).to(ctx.dtype), None, None


class Dropout(nn.Module):
    """`torch.nn.Dropout`, with byte masks on the CPU."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def extra_repr(self) -> str:
        return str(self.share)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.share)
        return _DropoutFunction.apply(x, drop_threshold(self.share))

    def add(self, x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
        """`x + alpha * dropout(y)`: a residual branch."""
        if self.training and self.share > 0 and y.device.type == "cpu":
            return _AddDropoutFunction.apply(x, y, alpha, drop_threshold(self.share))
        return torch.add(x, self(y), alpha=alpha)
