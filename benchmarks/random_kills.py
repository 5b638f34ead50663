"""Kills at random moments: the same command continues to the same weights and the same metrics.

    python -m benchmarks.random_kills --kills 100
    python -m benchmarks.random_kills --kills 20 --processes 4,2,1,3

Starts a tiny `pretrain.py` again and again and kills (SIGKILL) one rank, all processes, or the launcher, at a moment
drawn uniformly from the duration of an undisturbed run, until the run is complete; then the next run begins. Every
complete run must have one line of metrics per step. With one number of processes, weights and losses must be those of
an undisturbed run, bit for bit; with several, which take turns from start to start, losses must agree within
`--tolerance`.

The last line is JSON: `kills` (by target), `runs`, `wrong_runs` and `largest_loss_difference` (relative).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import print_figures
from bestrq.training.checkpoint import list_checkpoints
from bestrq.training.tensor_reading import read_group
from tests.ports import free_port
from tests.scripts.test_killed_launcher import children_of, parent_of
from tests.tiny import ENCODER, RUN, make_dataset

SETTINGS = [
    *("--data.rows=12", "--data.row_frames=400", "--data.min_seconds=0.5", "--data.max_seconds=4"),
    *("--encoder.dropout=0", "--encoder.attention_dropout=0"),
]
"""rows are divisible among 1, 2, 3 and 4 processes; dropout depends on the rank"""
TARGETS = ("rank", "all", "launcher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--processes", default="2", help="processes of the starts, in turns, such as 4,2,1,3")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative difference of losses")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and targets")
    options = parser.parse_args()
    sizes = [int(size) for size in options.processes.split(",")]
    generator = random.Random(options.seed)
    kills: Counter[str] = Counter()
    differences: list[float] = []
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        dataset = make_dataset(Path(name) / "data", recordings=30)
        start = time.monotonic()
        expected = Path(name) / "undisturbed"
        process = launch(dataset, expected, sizes[0], options.steps)
        assert process.wait() == 0, log_of(expected)
        duration = time.monotonic() - start
        while sum(kills.values()) < options.kills:
            folder = Path(name) / f"run-{len(differences)}"
            starts = 0
            while True:
                process = launch(dataset, folder, sizes[starts % len(sizes)], options.steps)
                starts += 1
                target = kill_later(process, generator, duration, folder)
                if target is None:
                    break
                kills[target] += 1
                print(f"{sum(kills.values())}: {target} after step {last_step(folder)}", flush=True)
            problem, difference = compare(folder, expected, options, exact=len(sizes) == 1)
            wrong += bool(problem)
            differences.append(difference)
            print(f"run {len(differences)} complete after {starts} starts: {problem or 'as undisturbed'}", flush=True)
    figures = {"kills": dict(kills), "runs": len(differences), "wrong_runs": wrong}
    figures |= {"largest_loss_difference": max(differences)}
    print_figures({"benchmark": "random_kills", "processes": sizes, **figures}, "float32", 1)


def launch(dataset: Path, folder: Path, size: int, steps: int) -> subprocess.Popen[bytes]:
    """Start the script, in a session of its own."""
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={free_port()}"]
    settings = [f"--data.dataset={dataset}", f"--run.folder={folder / 'run'}", f"--run.steps={steps}"]
    settings += ["--data.num_workers=1", "--distributed.threads=1", "--checkpoint.every_steps=10"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *(launcher if size > 1 else []), "pretrain.py", *ENCODER, *SETTINGS, *RUN, *settings],
            stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
        )  # fmt: skip


def kill_later(process: subprocess.Popen[bytes], generator: random.Random, duration: float, folder: Path) -> str | None:
    """Kill a target within `duration` seconds and wait for the end of all processes; None if the run was complete."""
    target = generator.choice(TARGETS)
    try:
        if process.wait(generator.uniform(0, duration)) == 0:
            return None
        raise RuntimeError(f"a start ended by itself with status {process.returncode}:\n{log_of(folder)[-5000:]}")
    except subprocess.TimeoutExpired:
        pass
    ranks = children_of(process.pid)
    others = [pid for rank in ranks for pid in children_of(rank)]
    if target == "all" or not ranks:
        target = "all"
        os.killpg(process.pid, signal.SIGKILL)
        for pid in (*ranks, *others):  # torchrun puts its ranks into sessions of their own
            kill(pid)
    else:
        kill(process.pid if target == "launcher" else generator.choice(ranks))
    process.wait()
    while any(parent_of(pid) for pid in (*ranks, *others)):
        time.sleep(0.05)
    return target


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended
        return


def compare(folder: Path, expected: Path, options: argparse.Namespace, exact: bool) -> tuple[str, float]:
    """Problem of a complete run, or "", and the largest relative difference of a loss."""
    lines, undisturbed = train_lines(folder), train_lines(expected)
    if [line["step"] for line in lines] != list(range(1, options.steps + 1)):
        return "steps are missing or repeated in the metrics", float("inf")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(lines, undisturbed, strict=True)]
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    if difference > (0 if exact else options.tolerance):
        return f"losses differ by {difference:.2g}", difference
    weights, others = weights_of(folder), weights_of(expected)
    if exact and not all(torch.equal(weights[name], others[name]) for name in others):
        return "weights differ", difference
    return "", difference


def train_lines(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


def weights_of(folder: Path) -> Mapping[str, torch.Tensor]:
    return read_group(list_checkpoints(folder / "run/checkpoints")[-1][1], "model")


def last_step(folder: Path) -> int:
    """Last step in the metrics, of which a kill may have cut the last line; 0 without any."""
    path = folder / "run/metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"kind": "train"') if path.exists() else 0


def log_of(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
