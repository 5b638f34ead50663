"""Benchmarks of the training engine: parts of a step add up, saves are complete, the projection follows its formula."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pretrain
from benchmarks import checkpoint_stall, loop_overhead, random_kills, scaling
from bestrq.training.checkpoint import COMPLETE, verify_checkpoint
from common.config import parse
from tests.tiny import DATA, ENCODER, RUN


def test_the_parts_of_a_step_are_all_of_it(tmp_path: Path) -> None:
    dataset = loop_overhead.make_dataset(tmp_path / "dataset", 0.02)
    places = [f"--data.dataset={dataset}", f"--run.folder={tmp_path / 'run'}", "--data.num_workers=0"]
    steps = [f"--run.steps={loop_overhead.WARMUP + 3}", "--quantizer.codebook_size=64"]
    figures = loop_overhead.measure(parse(pretrain.Config, [*ENCODER, *DATA, *RUN, *places, *steps]))
    parts = [figures[f"{name}_share"] for name in ("forward", "backward", "optimizer", "overhead")]
    assert sum(parts) == pytest.approx(1, abs=1e-3) and all(0 < part < 1 for part in parts)
    assert 0 < figures["targets_share"] < figures["forward_share"]
    assert 0 < figures["clipping_share"] < figures["optimizer_share"]


def test_saves_of_all_systems_are_timed(tmp_path: Path) -> None:
    config = parse(pretrain.Config, [*ENCODER, "--quantizer.codebook_size=64"])
    figures = checkpoint_stall.measure(config, 1, 400, 24, tmp_path)
    assert verify_checkpoint(tmp_path / "step-00000002") is None
    assert {"stall_steps", "dcp_async_stall_steps", "torch_save_seconds", "ours_load_seconds"} <= figures.keys()


def test_a_checkpoint_of_several_processes_is_timed_by_one_rank_and_by_all(tmp_path: Path) -> None:
    config = parse(pretrain.Config, [*ENCODER, "--quantizer.codebook_size=64"])
    figures = checkpoint_stall.measure_ranks(config, 2, 1e-5, tmp_path)
    names = {f"{who}_{part}_seconds" for who in ("alone", "ranks") for part in ("save", "verify", "load")}
    assert figures.keys() == names | {"gigabytes"}
    assert not list((tmp_path / "alone/step-00000001").glob("model-*"))
    assert len(list((tmp_path / "ranks/step-00000001").glob("model-*"))) > 1


def test_the_projection_is_that_of_a_hierarchical_all_reduce() -> None:
    options = Namespace(parameters=1e9, node_bandwidth=4e9, network_bandwidth=1e9, step_seconds=3.0)
    # 16 GPUs: 2 * 7/8 * 4 GB at 4 GB/s and 2 * 1/2 * 4 GB / 8 at 1 GB/s are 2.25 s, 0.25 s more than backward.
    exposed = 0.25 + 2.25 * scaling.BUCKET / 4e9
    assert scaling.projected(16, options) == pytest.approx(3 / (3 + exposed))


def made_run(folder: Path, losses: list[float], weight: float, steps: list[int]) -> Path:
    """Metrics and a checkpoint of a run."""
    checkpoint = folder / "run/checkpoints/step-00000003"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.tensor([weight])}, checkpoint / "model.safetensors")
    (checkpoint / COMPLETE).write_text("{}")
    lines = [{"step": step, "kind": "train", "loss": loss} for step, loss in zip(steps, losses, strict=True)]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("losses", "weight", "steps", "exact", "problem"),
    [
        ([3.0, 2.0, 1.0], 0.5, [1, 2, 3], True, ""),
        ([3.0, 2.0, 1.0], 0.6, [1, 2, 3], True, "weights differ"),
        ([3.0, 2.0, 1.0], 0.6, [1, 2, 3], False, ""),
        ([3.0, 2.1, 1.0], 0.5, [1, 2, 3], False, "losses differ by 0.05"),
        ([3.0, 2.0 + 1e-6, 1.0], 0.5, [1, 2, 3], True, "losses differ by 5e-07"),
        ([3.0, 1.0], 0.5, [1, 3], True, "steps are missing or repeated"),
        ([3.0, 2.0, 2.0, 1.0], 0.5, [1, 2, 2, 3], False, "steps are missing or repeated"),
    ],
)
def test_a_killed_run_is_compared_with_an_undisturbed_one(
    losses: list[float], weight: float, steps: list[int], exact: bool, problem: str, tmp_path: Path
) -> None:
    expected = made_run(tmp_path / "expected", [3.0, 2.0, 1.0], 0.5, [1, 2, 3])
    killed = made_run(tmp_path / "killed", losses, weight, steps)
    found, _ = random_kills.compare(killed, expected, Namespace(steps=3, tolerance=1e-4), exact)
    assert found.startswith(problem) and bool(found) == bool(problem)
