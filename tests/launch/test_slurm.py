"""Interrupted jobs on two nodes of a real SLURM cluster, compared with uninterrupted runs."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from slurm_cluster import Cluster, running_cluster, unavailable_reason, wait_until

from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.format.writer import DatasetWriter
from data.prepare.prepare import main
from data.recording import Recording
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

STEPS = 60
RECIPE = {
    "run": {"steps": STEPS, "log_every": 1},
    "data": {"row_frames": 400, "rows": 4, "max_seconds": 4.0, "num_workers": 1},
    "encoder": {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "subsampling_channels": 8},
    "quantizer": {"codebook_size": 64},
    "optimizer": {"warmup_steps": 10},
    "checkpoint": {"every_steps": 1000},
    "distributed": {"device": "cpu", "precision": "float32"},
}

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        unavailable_reason() is not None, reason=f"no SLURM cluster can be started here: {unavailable_reason()}"
    ),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration file that pretrains a tiny encoder on a tiny dataset of noise."""
    folder = tmp_path_factory.mktemp("recipe")
    generator = np.random.default_rng(0)
    settings = FeatureSettings()
    with DatasetWriter(folder / "dataset", settings) as writer:
        for number in range(40):
            frames = int(generator.integers(150, 400))
            recording = Recording(f"noise-{number:02d}", split="train")
            writer.add(recording, generator.standard_normal((frames, settings.num_mels)))
        writer.finish()
    values = {**RECIPE, "data": {**RECIPE["data"], "dataset": str(folder / "dataset")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with running_cluster(folder, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo") as cluster:
        yield cluster


def command(recipe: Path, run: Path) -> list[str]:
    return ["--config", str(recipe), "--run.folder", str(run)]


def wait_for_steps(cluster: Cluster, job: str, run: Path, more: int) -> None:
    """Wait until the running job has logged `more` additional steps."""

    def logged() -> int:
        metrics = run / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    target = logged() + more
    while logged() < target:
        fields = cluster.job(job)
        assert fields["JobState"] == "RUNNING", f"{fields['JobState']}: {Path(fields['StdOut']).read_text()[-5000:]}"
        time.sleep(0.1)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{STEPS:08d}/model.safetensors")


def test_a_job_interrupted_twice_has_the_weights_of_an_uninterrupted_run(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    """It is requeued by the administrator (SIGTERM to all processes), then by its time-limit signal (SIGUSR2)."""
    reference, interrupted, log = tmp_path / "reference", tmp_path / "interrupted", tmp_path / "job.log"
    script = ["launch/pretrain.sbatch", *command(recipe, interrupted)]
    job = cluster.command("sbatch", "--parsable", "--nodes=2", f"--output={log}", *script, cwd=REPOSITORY)
    cluster.wait(job, "RUNNING")
    wait_for_steps(cluster, job, interrupted, 5)
    cluster.command("scontrol", "requeue", job)
    cluster.wait(job, "RUNNING")
    wait_for_steps(cluster, job, interrupted, 5)
    cluster.command("scancel", "--batch", "--signal=USR2", job)
    end = cluster.wait(job, "COMPLETED", "FAILED")
    output = log.read_text()
    assert end["JobState"] == "COMPLETED" and end["Restarts"] == "2", output
    assert "got SIGTERM" in output and "got SIGUSR2" in output, output

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        ["bash", "launch/torchrun.sh", "-n", "2", "pretrain.py", *command(recipe, reference)],
        cwd=REPOSITORY, env=env, check=True, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    starts = json.loads((interrupted / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 2, 2]
    expected, actual = weights(reference), weights(interrupted)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_cancelled_job_saves_and_is_not_requeued(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    log, run = tmp_path / "job.log", tmp_path / "run"
    script = ["launch/pretrain.sbatch", *command(recipe, run)]
    job = cluster.command("sbatch", "--parsable", "--nodes=2", f"--output={log}", *script, cwd=REPOSITORY)
    cluster.wait(job, "RUNNING")
    wait_for_steps(cluster, job, run, 3)
    cluster.command("scancel", job)
    wait_until(lambda: not cluster.command("squeue", "--noheader"), "the job has ended", tmp_path)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert "SLURM is ending this job itself" in log.read_text()
    (saved,) = (run / "checkpoints").iterdir()
    assert 3 <= int(saved.name.removeprefix("step-")) < STEPS
    time.sleep(1)
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_a_job_array_with_a_requeued_part_makes_the_same_dataset(cluster: Cluster, tmp_path: Path) -> None:
    """Three parts on two nodes; the administrator requeues the first part while it writes (SIGTERM)."""
    log, out = tmp_path / "%a.log", tmp_path / "out"
    corpus = ["synthetic", "--languages=en,de", "--train_hours=0.1", "--test_long_recordings=1", "--long_minutes=1"]
    array = ["--array=0-2", f"--output={log}", "launch/prepare.sbatch", *corpus, "--workers=1", f"--out={out}"]
    first = cluster.command("sbatch", "--parsable", *array, cwd=REPOSITORY) + "_0"
    cluster.wait(first, "RUNNING")
    wait_until(lambda: any(out.glob("shard-00000*")), "the first part writes", cluster.folder)
    cluster.command("scontrol", "requeue", first)
    end = cluster.wait(first, "COMPLETED", "FAILED")
    wait_until(lambda: not cluster.command("squeue", "--noheader"), "all parts have ended", tmp_path)
    # The last output of the first start may be lost: srun does not wait for it.
    logs = [(tmp_path / f"{part}.log").read_text() for part in range(3)]
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), logs
    assert sum("prepare: finished" in log for log in logs) == 1, logs
    assert main([*corpus, "--workers=1", f"--out={tmp_path / 'alone'}"]) == 0
    assert open_dataset(out).fingerprint == open_dataset(tmp_path / "alone").fingerprint
