"""Checkpoints of tests, written as those of training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import checkpoint_path
from bestrq.training.checkpoint_saving import submit_checkpoint, take_snapshot
from bestrq.training.process import World


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World,
    extra: dict[str, Tensor] | None = None, file_gigabytes: float = 2.0,
) -> Path:  # fmt: skip
    """Save a checkpoint and return its folder once it is complete for all ranks."""
    writer = BackgroundWriter(world)
    writer.begin(step)
    snapshot = take_snapshot(step, model, optimizer, state, world, extra, file_gigabytes)
    submit_checkpoint(writer, folder, snapshot)
    writer.close()
    return checkpoint_path(folder, step)
