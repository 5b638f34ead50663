"""One optimizer step: its random seed, and the joint decision of all ranks to apply or skip it."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bestrq.training.process import World
from common.errors import UserError

MIN_SPIKE_HISTORY = 8  # norms required before a spike is reported


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (CPU and CUDA) for one optimizer step of one rank.

    Called at the start of every step. Random numbers are therefore independent of earlier steps, checkpoints hold no
    generator state, and a resumed run draws the same numbers as an uninterrupted one.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def report_skipped_step(step: int, loss: Tensor, samples: Iterable[str], world: World) -> None:
    """Print loss and sample ids of every rank to stderr; a non-finite loss identifies the rank with bad samples."""
    print(
        f"step {step} skipped on all ranks: a loss or the gradient is not finite (loss of rank {world.rank}: "
        f"{float(loss):g}). Samples of rank {world.rank}: {', '.join(samples)}",
        file=sys.stderr,
        flush=True,
    )


@dataclass
class GuardSettings:
    """Handling of non-finite losses and of gradient spikes."""

    max_bad_updates: PositiveInt = 5
    """consecutive skipped steps (non-finite loss or gradient) after which the run stops with an error"""
    spike_sigma: PositiveFloat = 6.0
    """gradient norms this many standard deviations above the mean of recent steps are logged as spikes"""
    spike_window: int = 128
    """number of recent steps for that mean"""

    def __post_init__(self) -> None:
        if self.spike_window < MIN_SPIKE_HISTORY:
            raise UserError(f"guard.spike_window is {self.spike_window}: give {MIN_SPIKE_HISTORY} or more")


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step."""

    grad_norm: float
    """global norm of the gradient before clipping"""
    applied: bool
    """False if a loss or gradient was not finite on some rank: no rank has changed weights or optimizer state"""
    spike: bool
    """the norm is far above the recent ones; the step was applied"""


class StepGuard:
    """Gradient clipping and the optimizer step, skipped on all ranks if a loss or gradient is not finite.

    Recent norms and the count of skipped steps are not checkpointed: they affect logging and the error only.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skipped_in_a_row = 0
        self.norms: deque[float] = deque(maxlen=settings.spike_window)

    def apply(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float, world: World
    ) -> StepResult:
        """Apply the accumulated gradients on all ranks, or skip the step on all ranks; gradients are cleared.

        All ranks must call it. It synchronises host and device once, because the host must know the decision.

        Args:
            loss: this rank's detached sum over micro-batches, a scalar.
            clip_norm: maximum gradient norm; 0 disables clipping.

        Raises:
            RuntimeError: on all ranks, after `max_bad_updates` consecutive skipped steps.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(loss.device)
        is_bad = ~(norm.isfinite() & loss.isfinite().all())
        num_bad_ranks = world.sum(is_bad.double())
        grad_norm, any_bad = torch.stack((norm.double(), num_bad_ranks)).tolist()
        if any_bad:
            optimizer.zero_grad(set_to_none=True)
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.settings.max_bad_updates:
                raise RuntimeError(
                    f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient. The last checkpoint is "
                    "older; lower the learning rate, or inspect the samples logged with the skipped steps"
                )
            return StepResult(grad_norm, applied=False, spike=False)
        self.skipped_in_a_row = 0
        if clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, applied=True, spike=self._is_spike(grad_norm))

    def _is_spike(self, norm: float) -> bool:
        count = len(self.norms)
        mean = sum(self.norms) / max(1, count)
        deviation = math.sqrt(sum((other - mean) ** 2 for other in self.norms) / max(1, count))
        self.norms.append(norm)
        return count >= MIN_SPIKE_HISTORY and norm > mean + self.settings.spike_sigma * deviation and norm > 2 * mean
