"""One optimizer step: the seed it starts from, and the decision of all ranks whether it may happen."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bestrq.training.process import World
from common.errors import UserError


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (CPU and CUDA) for one update of one rank.

    Called at the start of every update, so nothing random depends on what ran before: there is no generator state to
    save, and a run continued at `step` draws what the uninterrupted one drew. Nothing else is random in a step.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def report_skipped_update(step: int, loss: Tensor, samples: Iterable[str], world: World) -> None:
    """Every rank says on stderr what it had in hand when no rank updated: its loss tells whose samples were bad."""
    print(
        f"step {step}: no rank updates, a loss (of rank {world.rank}: {float(loss):g}) or the gradient is not finite. "
        f"Samples of rank {world.rank}: {', '.join(samples)}",
        file=sys.stderr,
        flush=True,
    )


@dataclass
class GuardSettings:
    """What to do about bad numbers."""

    max_bad_updates: int = 5
    """Skipped updates (non-finite loss or gradient) in a row after which the run stops with an error."""
    spike_sigma: float = 6.0
    """A gradient norm this many standard deviations above the mean of recent updates is logged as a spike."""
    spike_window: int = 128
    """Updates over which that mean is taken."""

    def __post_init__(self) -> None:
        if self.max_bad_updates < 1:
            raise UserError(f"guard.max_bad_updates must be 1 or more, but is {self.max_bad_updates}")
        if not self.spike_sigma > 0:
            raise UserError(f"guard.spike_sigma must be above 0, but is {self.spike_sigma}")
        if self.spike_window < 8:
            raise UserError(f"guard.spike_window must be 8 or more, but is {self.spike_window}")


@dataclass(frozen=True)
class UpdateResult:
    """What came of one update."""

    grad_norm: float
    """Global norm of the gradient before clipping; non-finite when the update was skipped for it."""
    applied: bool
    """False: a loss or gradient was not finite on some rank, and no rank's weights or optimizer state changed."""
    spike: bool
    """The norm was far above those of the recent updates; the update was applied."""


class UpdateGuard:
    """Clips, agrees, and steps. Holds the recent norms and the count of bad updates; both only watch, and start
    afresh at resume, so they never change a weight."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.bad_updates = 0
        self.norms: deque[float] = deque(maxlen=settings.spike_window)

    def apply_update(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float, world: World
    ) -> UpdateResult:
        """Apply the accumulated gradients, or on no rank any; gradients are cleared either way.

        `loss` is this rank's, a detached scalar (or 0-d sum over micro-batches). `clip_norm` 0 does not clip. All
        ranks must call it. Where `applied` is False the caller logs its sample ids. Raises RuntimeError on all ranks
        when `max_bad_updates` updates in a row were bad.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        grad_norm = float(norm.item())
        if world.any(not (math.isfinite(grad_norm) and bool(torch.isfinite(loss).all()))):
            optimizer.zero_grad(set_to_none=True)
            self.bad_updates += 1
            if self.bad_updates >= self.settings.max_bad_updates:
                raise RuntimeError(
                    f"{self.bad_updates} updates in a row had a non-finite loss or gradient. The last checkpoint is "
                    "from before; lower the learning rate, or look at the samples logged with the skipped updates"
                )
            return UpdateResult(grad_norm, applied=False, spike=False)
        self.bad_updates = 0
        if clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return UpdateResult(grad_norm, applied=True, spike=self._is_spike(grad_norm))

    def _is_spike(self, norm: float) -> bool:
        count = len(self.norms)
        mean = sum(self.norms) / max(1, count)
        deviation = math.sqrt(sum((other - mean) ** 2 for other in self.norms) / max(1, count))
        self.norms.append(norm)
        return count >= 8 and norm > mean + self.settings.spike_sigma * deviation and norm > 2 * mean
