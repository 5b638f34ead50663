"""Hung and killed loader workers, and stopped ranks: a run stops with a checkpoint, goes on, or ends with a report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bestrq.training.checkpoint import list_checkpoints
from bestrq.training.stop import REQUEUE, STOP
from bestrq.training.watchdog import STATUS
from tests.paths import REPOSITORY
from tests.patience import PATIENCE, wait_until
from tests.ports import free_port
from tests.scripts.test_killed_launcher import children_of, parent_of
from tests.tiny import DATA, ENCODER, RUN, make_dataset

STEPS = 150
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run = Run(dataset, tmp_path_factory.mktemp("undisturbed"))
    assert run.wait() == 0, run.output()
    return run.weights()


class Run:
    """`pretrain.py` in a process of its own, or in two under torchrun, with one loader worker per process."""

    def __init__(self, dataset: Path, folder: Path, ranks: int = 1, *more: str) -> None:
        self.folder, self.log = folder / "run", folder / "log"
        options = [*ENCODER, *DATA, *RUN, "--distributed.threads=1", "--data.num_workers=1", "--data.prefetch=1"]
        places = [f"--data.dataset={dataset}", f"--run.folder={self.folder}", f"--run.steps={STEPS}"]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(launcher if ranks > 1 else []), "pretrain.py", *options, *places, *more],
                cwd=REPOSITORY, stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
            )  # fmt: skip

    def started(self, steps: int = 1) -> None:
        """Wait for the first steps."""
        metrics = self.folder / "metrics.jsonl"
        wait_until(
            lambda: (
                self.process.poll() is not None
                or (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= steps)
            ),
            self.output,
        )
        assert self.process.poll() is None, self.output()

    def workers(self) -> dict[int, list[int]]:
        """Loader workers of each rank, by its process."""
        ranks = (
            [self.process.pid] if "torch.distributed.run" not in self.process.args else children_of(self.process.pid)
        )
        return {rank: children_of(rank) for rank in ranks}

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def weights(self) -> dict[str, torch.Tensor]:
        step, path = list_checkpoints(self.folder / "checkpoints")[-1]
        assert step == STEPS
        return load_file(path / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_is_obeyed_while_a_worker_hangs(
    dataset: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = Run(dataset, tmp_path)
    run.started()
    [workers] = run.workers().values()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    run.process.terminate()
    assert run.wait() == 0, run.output()
    assert (run.folder / REQUEUE).exists() and "stopped after step" in run.output()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    again = Run(dataset, tmp_path)
    assert again.wait() == 0 and same(again.weights(), undisturbed)


def test_the_stop_file_is_obeyed_while_a_worker_of_another_rank_hangs(dataset: Path, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path, 2)
    run.started()
    *_, workers = run.workers().values()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    (run.folder / STOP).touch()
    assert run.wait() == 0, run.output()
    assert (run.folder / REQUEUE).exists() and list_checkpoints(run.folder / "checkpoints")


def test_a_killed_worker_changes_no_weight(dataset: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run = Run(dataset, tmp_path)
    run.started()
    [workers] = run.workers().values()
    os.kill(workers[0], signal.SIGKILL)
    assert run.wait() == 0 and "started again" in run.output(), run.output()
    assert same(run.weights(), undisturbed)


def test_a_stopped_rank_ends_the_run_with_a_report_of_the_others(dataset: Path, tmp_path: Path) -> None:
    # Both limits: the short one applies from step 2 on, but not around a checkpoint.
    run = Run(dataset, tmp_path, 2, "--guard.step_minutes=0.1", "--guard.first_step_minutes=0.5")
    run.started(steps=3)
    stopped, other = run.workers()
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: not parent_of(other), run.output)
    os.kill(stopped, signal.SIGKILL)  # torchrun would do it after half a minute
    assert run.wait() != 0
    assert f"exitcode  : {STATUS}" in run.output(), run.output()
    [report] = (run.folder / "hangs").iterdir()  # the stopped rank writes none
    text = report.read_text()
    assert "no progress" in text and "in train" in text and "rec-" in text and "child process" in text
