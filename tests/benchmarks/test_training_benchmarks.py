"""Benchmarks of the training engine: parts of a step add up, saves are complete, the projection follows its formula."""

from argparse import Namespace
from pathlib import Path

import pytest

import pretrain
from benchmarks import checkpoint_stall, loop_overhead, scaling
from bestrq.training.checkpoint import verify_checkpoint
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


def test_the_projection_is_that_of_a_hierarchical_all_reduce() -> None:
    options = Namespace(parameters=1e9, node_bandwidth=4e9, network_bandwidth=1e9, step_seconds=3.0)
    # 16 GPUs: 2 * 7/8 * 4 GB at 4 GB/s and 2 * 1/2 * 4 GB / 8 at 1 GB/s are 2.25 s, 0.25 s more than backward.
    exposed = 0.25 + 2.25 * scaling.BUCKET / 4e9
    assert scaling.projected(16, options) == pytest.approx(3 / (3 + exposed))
