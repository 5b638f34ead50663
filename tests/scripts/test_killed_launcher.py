"""Ranks whose launcher is killed save a checkpoint and end, and the same command continues."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bestrq.training.stop import REQUEUE
from tests.paths import REPOSITORY
from tests.patience import PATIENCE, wait_until
from tests.ports import free_port
from tests.tiny import DATA, ENCODER, RUN, make_dataset


def parent_of(pid: int) -> int:
    """Parent of a process; 0 if the process is gone or a zombie."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)


def children_of(pid: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [number for number in numbers if parent_of(number) == pid]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the signal at a parent's death is Linux's")
def test_ranks_save_and_end_when_torchrun_is_killed(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    script = ["pretrain.py", f"--data.dataset={tmp_path / 'data'}", f"--run.folder={run}", "--data.num_workers=1"]
    options = [*ENCODER, *DATA, *RUN, "--distributed.threads=1"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [*launcher, *script, *options, "--run.steps=300"], cwd=REPOSITORY, stdout=log, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        metrics = run / "metrics.jsonl"
        wait_until(
            lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 3),
            lambda: (tmp_path / "log").read_text(),
        )
        ranks = children_of(process.pid)
        assert len(ranks) == 2, (tmp_path / "log").read_text()
        process.kill()
        process.wait(PATIENCE)
        wait_until(lambda: not any(map(parent_of, ranks)), lambda: (tmp_path / "log").read_text())
    assert (run / REQUEUE).exists() and list((run / "checkpoints").glob("step-*/COMPLETE"))
    again = subprocess.run(
        [sys.executable, *script, *options, "--run.steps=300"], cwd=REPOSITORY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert again.returncode == 0 and "done" in again.stdout, again.stderr


def test_a_rank_whose_launcher_is_dead_at_its_start_ends_with_an_error(tmp_path: Path) -> None:
    """The signal at a parent's death comes only for a parent that dies later: the rank would wait for the store."""
    make_dataset(tmp_path / "data")
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(free_port())}
    run = subprocess.run(
        [sys.executable, "pretrain.py", f"--data.dataset={tmp_path / 'data'}", f"--run.folder={tmp_path / 'run'}"],
        cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **launch, **elastic}, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "torchrun, which started this process, does not answer at localhost" in run.stderr
    assert not (tmp_path / "run").exists()
