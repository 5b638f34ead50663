"""Batch norm over the valid frames of all ranks. Imported only if used."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MaskedBatchNorm(nn.Module):
    """Batch normalisation `[R, T, D] -> [R, T, D]` over the valid frames of all processes; zero elsewhere.

    In training, mean and variance are those of the valid frames of the batch on all ranks (one collective in each
    forward and backward pass, also on a rank without valid frames). They update the running statistics, which are used
    in evaluation, with `momentum`. Statistics are at least float32. Names and values of the state equal those of
    `torch.nn.BatchNorm1d` over the valid frames.

    A batch with fewer than two valid frames has no variance, and one with non-finite values belongs to a skipped
    optimizer step: neither changes the running statistics. Gradient accumulation normalises each micro-batch
    separately. A forward pass repeated by activation checkpointing would count twice.

    Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Normalise the frames of `x` `[R, T, D]` that are True in `valid`, bool `[R, T]`; the dtype is kept."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        keep = valid[..., None]
        if self.training:
            normalised, count, mean, variance = _NormaliseOverRanks.apply(wide, keep.to(wide.dtype), self.eps)
            self._track(count, mean, variance)
        else:
            normalised = (wide - self.running_mean) * torch.rsqrt(self.running_var + self.eps)
        return (normalised * self.weight + self.bias).masked_fill(~keep, 0.0).to(x.dtype)

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, without a branch on `count`, which would synchronise with the device."""
        unbiased = variance * (count / (count - 1).clamp(min=1))
        usable = (count > 1) & mean.isfinite().all() & unbiased.isfinite().all()
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(torch.where(usable, running + self.momentum * (new - running), running))
        self.num_batches_tracked.add_(usable)


class _NormaliseOverRanks(torch.autograd.Function):
    """Normalise `[R, T, D]` by mean and variance of the frames of all ranks for which `keep` `[R, T, 1]` is 1.

    Returns the normalised frames, zero if `keep` is 0; and count, mean and biased variance, without gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Ranks combine their squared deviations from their own means. The mean of squares minus the square of the mean
        # would lose all digits if the mean is large.
        count = keep.sum()
        mean = (x * keep).sum((0, 1)) / count.clamp(min=1)
        squares = ((x - mean) * keep).square().sum((0, 1))
        counts, means, squares_of_ranks = _gather(torch.cat([count[None], mean, squares])).split(
            [1, len(mean), len(mean)], dim=1
        )
        count = counts.sum()
        total = count.clamp(min=1)
        mean = (counts * means).sum(0) / total
        variance = (squares_of_ranks + counts * (means - mean).square()).sum(0) / total
        scale = torch.rsqrt(variance + eps)
        normalised = (x - mean) * scale * keep
        ctx.save_for_backward(normalised, keep, scale, total)
        ctx.mark_non_differentiable(count, mean, variance)
        return normalised, count, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normalised, keep, scale, total = ctx.saved_tensors
        grad = grads[0] * keep
        sums = torch.cat([grad.sum((0, 1)), (grad * normalised).sum((0, 1))])
        if _num_ranks() > 1:
            dist.all_reduce(sums)
        mean, slope = (sums / total).chunk(2)
        return (grad - mean - normalised * slope) * scale * keep, None, None


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(x: Tensor) -> Tensor:
    """Gather `[n]` of every rank to `[ranks, n]`."""
    if _num_ranks() == 1:
        return x[None]
    gathered = x.new_empty(_num_ranks() * len(x))
    dist.all_gather_into_tensor(gathered, x)
    return gathered.view(-1, len(x))
