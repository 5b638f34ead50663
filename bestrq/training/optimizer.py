"""AdamW, and learning rates that are a pure function of the step.

The learning rate has no state: every step computes it from the settings, so a checkpoint need not hold it and a
changed setting counts from the resumed step on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from common.errors import UserError


@dataclass
class OptimizerSettings:
    """AdamW with warm-up, a schedule, and clipping."""

    learning_rate: float = 1e-3
    """Largest learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and norms have none."""
    warmup_steps: int = 1000
    """Updates over which the learning rate rises from 0 in a straight line."""
    schedule: Literal["cosine", "noam", "constant"] = "cosine"
    """After the warm-up: half a cosine down to the final fraction, inverse square root (Noam), or constant."""
    final_fraction: float = 0.05
    """Share of the largest learning rate left at the end of the cosine."""
    clip_norm: float = 5.0
    """Largest global norm of the gradient; 0 does not clip."""
    frozen_steps: int = 0
    """First updates during which these parameters do not move; the warm-up begins after them."""

    def __post_init__(self) -> None:
        conditions = {
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            "eps": (self.eps > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "final_fraction": (0 <= self.final_fraction <= 1, "in [0, 1]"),
            "clip_norm": (self.clip_norm >= 0, "0 (no clipping) or more"),
            "frozen_steps": (self.frozen_steps >= 0, "0 or more"),
        }
        for name, (right, wanted) in conditions.items():
            if not right:
                raise UserError(f"optimizer.{name} must be {wanted}, but is {getattr(self, name)}")
        if self.schedule == "noam" and self.warmup_steps == 0:
            raise UserError("optimizer.warmup_steps must be above 0 with optimizer.schedule 'noam', but is 0")


def learning_rate_factor(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Share of `settings.learning_rate` used by update `step` (counted from 1) of `total_steps`.

    Noam is the schedule of Vaswani et al. 2017, scaled so that its peak is 1.
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
    """AdamW over named parameters, each group with its own settings (encoder and head, say).

    Parameters of one dimension (biases, norms) and frozen ones (`requires_grad` off, left out) need no weight decay.
    Build it after `parallelise`: sharding replaces the parameters. Raises UserError when nothing is trainable.
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
    """Give every group the learning rate of update `step` (from 1); returns those of the settings, in their order."""
    rates: dict[int, float] = {}
    for group in optimizer.param_groups:
        settings = group["settings"]
        group["lr"] = settings.learning_rate * learning_rate_factor(settings, step, total_steps)
        rates[id(settings)] = group["lr"]
    return list(rates.values())
