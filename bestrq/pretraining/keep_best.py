"""Retention of the checkpoints of a pretraining: the newest ones, and the one with the lowest dev_loss."""

from __future__ import annotations

from collections.abc import Iterable

from bestrq.training.checkpoint import CheckpointSettings, list_checkpoints, prune_checkpoints
from bestrq.training.metrics_file import finite_number, read_metrics
from bestrq.training.run_folder import RunFolder


def prune(run: RunFolder, settings: CheckpointSettings, step: int, changes: Iterable[int] = ()) -> None:
    """`prune_checkpoints` after a checkpoint of `step`, keeping the one with the lowest dev_loss too; on rank 0.

    Args:
        changes: steps after which the targets change (`quantizer.pca_steps`, `refine_steps`). Losses of other targets
            cannot be compared, so only checkpoints after the last change count.
    """
    first = max((change + 1 for change in changes if change < step), default=0)
    saved = {number for number, _ in list_checkpoints(run.checkpoints) if number >= first}
    losses = {
        line["step"]: loss
        for line in read_metrics(run.metrics)
        if line.get("kind") == "dev" and line["step"] in saved
        if (loss := finite_number(line.get("dev_loss"))) is not None
    }
    prune_checkpoints(run.checkpoints, settings, min(losses, key=lambda number: losses[number], default=None))
