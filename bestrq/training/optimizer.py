"""Optimizer step: the optimizer, learning rates as a pure function of the step, random seeds, and the guard.

The learning rate has no state: it is computed from the settings at every step, so checkpoints do not hold it. All ranks
apply a step, or none does, if a loss or the gradient is not finite.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from bestrq.training.process import LaterRead, World, unsharded
from common.errors import UserError

MIN_SPIKE_HISTORY = 8  # norms required before a spike is reported


@dataclass
class OptimizerSettings:
    """Optimizer, learning rate schedule and gradient clipping."""

    name: Literal["adamw", "muon", "madgrad"] = "adamw"
    """adamw; muon (Jordan et al. 2024) for the matrices of the blocks, with AdamW for the rest; or madgrad (Defazio and
    Jelassi, arXiv 2101.11075: momentum betas[0], other rates, and less weight decay, which is an L2 penalty)"""
    learning_rate: PositiveFloat = 1e-3
    """peak learning rate, reached at the end of the warm-up"""
    muon_rate: PositiveFloat = 1.0
    """learning rate of muon's matrices as a multiple of learning_rate; their updates are as large as AdamW's at 1"""
    betas: tuple[float, float] = (0.9, 0.98)
    """decay rates of the running means of the gradient and of its square"""
    eps: PositiveFloat = 1e-8
    """term added to the denominator for numerical stability"""
    weight_decay: NonNegativeFloat = 0.01
    """decoupled weight decay of matrices; biases and norms have none"""
    warmup_steps: NonNegativeInt = 1000
    """optimizer steps of the linear warm-up from 0"""
    schedule: Literal["cosine", "noam", "constant", "tri_stage", "wsd"] = "cosine"
    """schedule after the warm-up: cosine decay, inverse square root (Noam), constant, or constant for hold_fraction and
    then an exponential (tri_stage: fairseq, wav2vec 2.0) or linear decay (wsd: Haegele et al., arXiv 2405.18392)"""
    hold_fraction: ClosedUnitInterval = 0.4
    """tri_stage, wsd: fraction of all steps at the peak, after the warm-up (0.4 in fairseq's wav2vec 2.0 recipes)"""
    final_fraction: ClosedUnitInterval = 0.05
    """fraction of the peak learning rate at the end of cosine, tri_stage and wsd"""
    clip_norm: NonNegativeFloat = 5.0
    """maximum global norm of the gradient; 0 disables clipping"""
    frozen_steps: NonNegativeInt = 0
    """first optimizer steps that do not change these parameters; the warm-up starts after them"""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}: give two numbers from 0 to below 1")
        if self.schedule == "noam" and self.warmup_steps == 0:
            raise UserError("optimizer.warmup_steps is 0 with optimizer.schedule 'noam': give 1 or more")
        if self.schedule == "tri_stage" and self.final_fraction == 0:
            raise UserError("optimizer.final_fraction is 0 with optimizer.schedule 'tri_stage': give more")


def learning_rate_factor(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Fraction of `settings.learning_rate` at optimizer step `step` (from 1) of `total_steps`.

    Noam is the schedule of Vaswani et al. 2017 ("Attention is all you need"), scaled to a peak of 1.
    """
    step, total_steps = step - settings.frozen_steps, total_steps - settings.frozen_steps
    if step <= 0:
        return 0.0
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.schedule == "noam":
        return math.sqrt(settings.warmup_steps / step)
    if settings.schedule == "constant":
        return 1.0
    hold_steps = settings.hold_fraction * total_steps if settings.schedule in ("tri_stage", "wsd") else 0
    first = settings.warmup_steps + hold_steps
    progress = min(1.0, max(0.0, step - first) / max(1, total_steps - first))
    if settings.schedule == "tri_stage":
        return settings.final_fraction**progress
    if settings.schedule == "wsd":
        return 1 - (1 - settings.final_fraction) * progress
    return settings.final_fraction + (1 - settings.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    groups: Sequence[tuple[Iterable[tuple[str, nn.Parameter]], OptimizerSettings]],
) -> torch.optim.Optimizer:
    """Optimizer of groups of named parameters, such as encoder and head, each with its own settings (but one `name`).

    One-dimensional parameters (biases, norms) have no weight decay; parameters without `requires_grad` are skipped.
    Called after `parallelise`, because sharding replaces the parameters. Raises UserError if nothing is trainable.
    """
    param_groups = []
    for named_parameters, settings in groups:
        trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        for decayed in (True, False):
            chosen = [(name, parameter) for name, parameter in trained if (parameter.ndim > 1) == decayed]
            if chosen:
                names, parameters = map(list, zip(*chosen, strict=True))
                values = {"params": parameters, "names": names, "settings": settings, "lr": 0.0}
                decay = settings.weight_decay if decayed else 0.0
                param_groups.append({**values, "betas": settings.betas, "eps": settings.eps, "weight_decay": decay})
    if not param_groups:
        raise UserError("the optimizer has no trainable parameter")
    (name,) = {settings.name for _, settings in groups}
    if name == "muon":
        from bestrq.training.muon import Muon  # imported only if used, as is MADGRAD

        return Muon(param_groups)
    if name == "madgrad":
        from bestrq.training.madgrad import Madgrad

        return Madgrad(param_groups, {})
    return torch.optim.AdamW(param_groups, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> list[float]:
    """Set the learning rates of optimizer step `step` (from 1); returns one per settings object, in their order."""
    rates: dict[int, float] = {}
    for group in optimizer.param_groups:
        settings = group["settings"]
        group["lr"] = settings.learning_rate * learning_rate_factor(settings, step, total_steps)
        rates[id(settings)] = group["lr"]
    return list(rates.values())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (CPU and CUDA) for one optimizer step of one rank.

    Called at the start of every step. Random numbers are therefore independent of earlier steps, checkpoints hold no
    generator state, and a resumed run draws the same numbers as an uninterrupted one.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    torch.default_generator.manual_seed(number)  # torch.manual_seed also looks for all other kinds of devices
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


@dataclass
class GuardSettings:
    """Handling of non-finite losses, gradient spikes and steps that hang."""

    max_bad_updates: PositiveInt = 5
    """consecutive skipped steps (non-finite loss or gradient) after which the run stops with an error"""
    spike_sigma: PositiveFloat = 6.0
    """gradient norms this many standard deviations above the mean of recent steps are logged as spikes"""
    spike_window: int = 128
    """number of recent steps for that mean"""
    step_minutes: NonNegativeFloat = 10.0
    """minutes without progress after which the run ends with a report (RUN_FOLDER/hangs), or ten times the longest step
    so far if that is more; 0 disables it"""
    first_step_minutes: PositiveFloat = 30.0
    """the same until the first step is done, and in a validation, probe or checkpoint"""

    def __post_init__(self) -> None:
        if self.spike_window < MIN_SPIKE_HISTORY:
            raise UserError(f"guard.spike_window is {self.spike_window}: give {MIN_SPIKE_HISTORY} or more")


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step."""

    grad_norm: float = math.nan
    """global norm of the gradient before clipping"""
    applied: bool = True
    """False if a loss or gradient was not finite on some rank: no rank has changed weights or optimizer state"""
    spike: bool = False
    """the norm is far above the recent ones; the step was applied"""


@dataclass(frozen=True)
class _Pending:
    """Step whose outcome the host has not read yet."""

    step: int
    numbers: LaterRead
    samples: Sequence[str]


def update_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float, world: World
) -> Tensor:
    """Clip and apply the accumulated gradients, or skip the step if a loss or gradient is not finite; clear them.

    All ranks must call it. Returns the norm before clipping, the loss, and the number of bad ranks: float64 `[3]`, on
    the device.

    Args:
        loss: this rank's detached sum over micro-batches, a scalar.
        clip_norm: maximum gradient norm; 0 disables clipping.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = unsharded(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).to(loss.device)
    bad_ranks = world.sum((~(norm.isfinite() & loss.isfinite())).double())
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    optimizer.found_inf = (bad_ranks > 0).float()  # type: ignore[attr-defined]
    optimizer.step()
    for parameter in parameters:  # a tenth of the time of `zero_grad`
        parameter.grad = None
    return torch.stack((norm.double(), loss.double(), bad_ranks))


class StepGuard:
    """Gradient clipping and the optimizer step, skipped on all ranks if a loss or gradient is not finite.

    The decision stays on the device, where the optimizer reads it (`found_inf`, as torch's fused optimizers do for a
    gradient scaler), so that the host can prepare the next step meanwhile. Recent norms and the count of skipped steps
    are not checkpointed: they affect logging and the error only.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skipped_in_a_row = 0
        self.norms: deque[float] = deque(maxlen=settings.spike_window)
        self._pending: _Pending | None = None

    def apply(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float,
        world: World, samples: Sequence[str] = (),
    ) -> StepResult:  # fmt: skip
        """Apply the accumulated gradients on all ranks, or skip the step on all ranks (`update_weights`).

        A skipped step is reported on stderr by every rank, with its number, its loss and the ids of its samples: a
        non-finite loss identifies the rank with bad samples.

        Returns:
            the outcome of this step on a CPU; on other devices that of the step before, which is known by then, and a
            default at the first call.

        Raises:
            RuntimeError: on all ranks, after `max_bad_updates` consecutive skipped steps.
        """
        numbers = LaterRead(update_weights(model, optimizer, loss, clip_norm, world))
        pending, self._pending = self._pending, _Pending(step, numbers, samples)
        if loss.device.type == "cpu":
            pending, self._pending = self._pending, None
        return StepResult() if pending is None else self._finish(pending, world)

    def _finish(self, pending: _Pending, world: World) -> StepResult:
        """Outcome of a step, and the report if it was skipped."""
        norm, loss, bad_ranks = pending.numbers.tolist()
        if not bad_ranks:
            self.skipped_in_a_row = 0
            return StepResult(norm, spike=self._is_spike(norm))
        print(
            f"step {pending.step} skipped on all ranks: a loss or the gradient is not finite (loss of rank "
            f"{world.rank}: {loss:g}). Samples of rank {world.rank}: {', '.join(pending.samples)}",
            file=sys.stderr,
            flush=True,
        )
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.settings.max_bad_updates:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient. The last checkpoint is "
                "older; lower the learning rate, or inspect the samples logged with the skipped steps"
            )
        return StepResult(norm, applied=False)

    def _is_spike(self, norm: float) -> bool:
        count = len(self.norms)
        mean = sum(self.norms) / max(1, count)
        deviation = math.sqrt(sum((other - mean) ** 2 for other in self.norms) / max(1, count))
        self.norms.append(norm)
        return count >= MIN_SPIKE_HISTORY and norm > mean + self.settings.spike_sigma * deviation and norm > 2 * mean
