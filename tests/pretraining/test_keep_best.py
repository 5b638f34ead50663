"""The checkpoint with the lowest dev_loss is kept, among those with the same targets."""

import json
from pathlib import Path

import pytest

from bestrq.pretraining.keep_best import prune
from bestrq.training.checkpoint import COMPLETE, CheckpointSettings, list_checkpoints
from bestrq.training.run_folder import RunFolder


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ((), [20, 60]),
        ((0, 70), [20, 60]),
        ((0, 20, 70), [30, 60]),  # the loss of step 20 is of the targets before the change
        ((50,), [60]),  # nothing has been validated since
    ],
)
def test_the_best_checkpoint_is_kept(changes: tuple[int, ...], kept: list[int], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for step in (10, 20, 30, 40, 50, 60):
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / COMPLETE).write_text('{"files": {}}')
    losses = {10: 3.0, 15: 0.1, 20: 1.0, 30: 2.0, 40: 2.5, 50: None}  # none at 60, no checkpoint at 15
    lines = [{"step": step, "kind": "dev", "dev_loss": loss} for step, loss in losses.items()]
    lines.append({"step": 40, "kind": "train", "dev_loss": 0.0})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prune(run, CheckpointSettings(keep_last=1), 60, changes)
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == kept
