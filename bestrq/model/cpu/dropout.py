"""Dropout with masks that are cheap to draw on a CPU.

On a CPU, torch draws one number per element in scalar code on one core: a quarter of a small model's training time.
Here, a 64-bit random number serves eight elements, one byte each. An element is dropped if its byte is below a
threshold k. The dropout probability is k / 256, nearest to the setting; kept elements are scaled by 256 / (256 - k).

The random numbers are SplitMix64 (Steele et al., Fast splittable pseudorandom number generators, 2014), a hash of a
counter, computed by torch's integer arithmetic on all cores. The counter starts at a seed from torch's global
generator, so the same seed, or the same restored state of that generator, repeats the masks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.hashing import INCREMENT, splitmix64


def drop_threshold(probability: float) -> int:
    """Threshold k with k / 256 nearest to the probability: 1 to 255, or 0 if the probability is 0."""
    return 0 if probability == 0 else min(max(round(probability * 256), 1), 255)


def keep_scale(threshold: int) -> float:
    """Scale of kept elements that preserves the mean."""
    return 256 / (256 - threshold)


def draw_seed(count: int = 1) -> list[int]:
    """Draw seeds of masks from torch's global generator."""
    return torch.randint(2**62, (count,)).tolist()


def random_words(count: int, seed: int) -> Tensor:
    """Uniform 64-bit numbers, int64 `[count]`: SplitMix64 of the counters from `seed`."""
    return splitmix64(torch.arange(seed, seed + count).mul_(INCREMENT))


def draw_kept(shape: tuple[int, ...], threshold: int, seed: int) -> Tensor:
    """Draw a mask, uint8 on the CPU: 1 for kept, 0 for dropped elements."""
    count = math.prod(shape)
    drawn = random_words((count + 7) // 8, seed).view(torch.uint8)[:count].view(shape)
    # The output is uint8: the kernel that writes bool is not vectorised and takes 15 times as long.
    return torch.ge(drawn, threshold, out=drawn)


class _DropoutFunction(torch.autograd.Function):
    """`dropout(x)` with a byte mask."""

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
    """`x + alpha * dropout(y)` with a byte mask, in one pass."""

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

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def extra_repr(self) -> str:
        return str(self.probability)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.probability)
        return _DropoutFunction.apply(x, drop_threshold(self.probability))

    def add(self, x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
        """Add a residual branch: `x + alpha * dropout(y)`."""
        masked = self.training and self.probability > 0 and y.device.type == "cpu"
        if masked and not torch.compiler.is_compiling():
            return _AddDropoutFunction.apply(x, y, alpha, drop_threshold(self.probability))
        return torch.add(x, self(y), alpha=alpha)
