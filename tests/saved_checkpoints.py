"""Checkpoints of tests, written as those of training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import checkpoint_path, take_snapshot, write_checkpoint
from bestrq.training.process import World


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World,
    extra: dict[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Save a checkpoint and return its folder once it is complete for all ranks."""
    writer = BackgroundWriter(world)
    writer.begin(step)
    writer.submit(write_checkpoint, folder, take_snapshot(step, model, optimizer, state, world, extra))
    writer.close()
    return checkpoint_path(folder, step)
