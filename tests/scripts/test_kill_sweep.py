"""A kill at any file operation of a training script loses nothing: the same command gives the same bits.

Continuous integration tries a few operations of every script; `KILL_POINTS=all` tries all of them:

    KILL_POINTS=all .venv/bin/python -m pytest -n 0 tests/scripts/test_kill_sweep.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.config import parse
from tests.file_operations import KILLED, FileOperations
from tests.gloo import forkserver
from tests.patience import PATIENCE
from tests.scripts.test_runs import SCRIPTS, arguments, assert_identical, final_weights, losses
from tests.tiny import make_dataset

POINTS_IN_CI = 3
OPTIONS = ["--checkpoint.every_steps=2", "--checkpoint.keep_last=2", "--run.steps=5"]


def run_until(script: str, dataset: Path, folder: Path, point: int) -> None:
    """In a process of its own: run a script and die before the given file operation in its folder, from 0."""
    operations = FileOperations(folder, point)
    operations.watch()
    module = SCRIPTS[script]
    module.train(parse(module.Config, arguments(script, dataset, folder, *OPTIONS)))
    (folder.parent / "operations").write_text(str(operations.count))


def started(script: str, dataset: Path, folder: Path, point: int = -1) -> int | None:
    child = forkserver().Process(target=run_until, args=(script, dataset, folder, point))
    child.start()
    child.join(PATIENCE)
    return child.exitcode


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_at_a_file_operation_changes_no_weight_and_no_line_of_the_metrics(script: str, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", recordings=30)
    assert started(script, dataset, tmp_path / "undisturbed") == 0
    operations = int((tmp_path / "operations").read_text())
    assert operations > 40
    chosen = range(operations)
    if os.environ.get("KILL_POINTS") != "all":
        chosen = range(3, operations, max(1, operations // POINTS_IN_CI))
    for point in chosen:
        folder = tmp_path / f"kill-{point}"
        assert started(script, dataset, folder, point) == KILLED, point
        assert started(script, dataset, folder) == 0, point
        assert_identical(final_weights(folder), final_weights(tmp_path / "undisturbed"))
        assert losses(folder) == losses(tmp_path / "undisturbed"), point
        assert not [*folder.rglob(".tmp-*"), *folder.rglob(".old-*")], point
