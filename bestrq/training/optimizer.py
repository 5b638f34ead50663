"""AdamW with learning rates that are a pure function of the step.

The learning rate has no state: it is computed from the settings at every step, so checkpoints do not hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from common.errors import UserError


@dataclass
class OptimizerSettings:
    """AdamW, learning rate schedule and gradient clipping."""

    learning_rate: PositiveFloat = 1e-3
    """peak learning rate, reached at the end of the warm-up"""
    betas: tuple[float, float] = (0.9, 0.98)
    """decay rates of the running means of the gradient and of its square"""
    eps: PositiveFloat = 1e-8
    """term added to the denominator for numerical stability"""
    weight_decay: NonNegativeFloat = 0.01
    """decoupled weight decay of matrices; biases and norms have none"""
    warmup_steps: NonNegativeInt = 1000
    """optimizer steps of the linear warm-up from 0"""
    schedule: Literal["cosine", "noam", "constant"] = "cosine"
    """schedule after the warm-up: cosine decay to the final fraction, inverse square root (Noam), or constant"""
    final_fraction: ClosedUnitInterval = 0.05
    """fraction of the peak learning rate at the end of the cosine"""
    clip_norm: NonNegativeFloat = 5.0
    """maximum global norm of the gradient; 0 disables clipping"""
    frozen_steps: NonNegativeInt = 0
    """first optimizer steps that do not change these parameters; the warm-up starts after them"""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}: give two numbers from 0 to below 1")
        if self.schedule == "noam" and self.warmup_steps == 0:
            raise UserError("optimizer.warmup_steps is 0 with optimizer.schedule 'noam': give 1 or more")


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
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    return settings.final_fraction + (1 - settings.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    groups: Sequence[tuple[Iterable[tuple[str, nn.Parameter]], OptimizerSettings]],
) -> torch.optim.AdamW:
    """AdamW over groups of named parameters, such as encoder and head, each with its own settings.

    One-dimensional parameters (biases, norms) have no weight decay; parameters without `requires_grad` are skipped.
    Called after `parallelise`, because sharding replaces the parameters. Raises UserError if nothing is trainable.
    """
    param_groups = []
    for named_parameters, settings in groups:
        parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]
        for decayed in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == decayed]
            if chosen:
                decay = settings.weight_decay if decayed else 0.0
                param_groups.append(
                    {
                        "params": chosen,
                        "settings": settings,
                        "lr": 0.0,
                        "betas": settings.betas,
                        "eps": settings.eps,
                        "weight_decay": decay,
                    }  # fmt: skip
                )
    if not param_groups:
        raise UserError("the optimizer has no trainable parameter")
    return torch.optim.AdamW(param_groups, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> list[float]:
    """Set the learning rates of optimizer step `step` (from 1); returns one per settings object, in their order."""
    rates: dict[int, float] = {}
    for group in optimizer.param_groups:
        settings = group["settings"]
        group["lr"] = settings.learning_rate * learning_rate_factor(settings, step, total_steps)
        rates[id(settings)] = group["lr"]
    return list(rates.values())
