"""Dry runs on fake GPUs: bytes and collectives of a rank against arithmetic, for every script and strategy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.training.process import World
from common.config import parse
from common.errors import UserError
from pipelines import dry_run
from pipelines.dry_run import StepCounts, count_step, formula_bytes
from pipelines.fake_world import hide_gpus
from pipelines.trial_step import TrialStep, make_model, resolved, shape_of
from tests.paths import REPOSITORY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: see cuda_runtime.py")

# No width is a multiple of 8, and some parameters are smaller than the world.
ENCODER = ["--encoder.dim=36", "--encoder.num_layers=2", "--encoder.num_heads=2", "--encoder.feedforward_dim=52",
           "--encoder.kernel_size=5", "--encoder.subsampling_channels=6"]  # fmt: skip
DATA = ["--data.rows=16", "--data.row_frames=400", "--data.max_seconds=1.5", "--data.max_segments=4"]
SCRIPTS: dict[str, Any] = {"pretrain": pretrain, "ctc": finetune_ctc, "rnnt": finetune_rnnt}
OWN = {
    "pretrain": ["--quantizer.codebook_size=50"],
    "ctc": [],
    "rnnt": ["--transducer.prediction_dim=20", "--transducer.joint_dim=20", "--transducer.ctc_weight=0.3"],
}


def configure(script: str, *more: str) -> Any:
    return parse(SCRIPTS[script].Config, [*ENCODER, *DATA, *OWN[script], *more])


def count(config: Any, processes: int = 8, local_size: int = 8) -> StepCounts:
    config, shards = resolved(config, processes, local_size)
    return count_step(config, shape_of(config, processes), processes, shards)


def elements(config: Any, shards: int) -> tuple[int, int]:
    """Padded elements of the shard of rank 0: of blocks, and of the rest."""
    with torch.device("meta"):
        model = make_model(config)
    sizes = [0, 0]
    for name, parameter in model.named_parameters():
        rows = math.ceil(parameter.shape[0] / shards)
        sizes["blocks." not in name] += rows * parameter[0].numel()
    return sizes[0], sizes[1]


def traffic(counts: StepCounts) -> dict[tuple[str, int], int]:
    """Bytes by kind and ranks, without the numbers on which all ranks agree."""
    totals: Counter[tuple[str, int]] = Counter()
    for collective in counts.collectives:
        if collective.bytes > 500 or collective.kind != "all-reduce":
            totals[collective.kind, collective.ranks] += collective.bytes
    return dict(totals)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_a_rank_holds_its_share_of_parameters_gradients_and_moments(script: str, strategy: str) -> None:
    """hsdp: two groups of four. Labels and lengths stay on the CPU, where the losses read them."""
    more = ["--distributed.shard_size=4"] if strategy == "hsdp" else []
    config = configure(script, f"--distributed.strategy={strategy}", *more)
    counts = count(config)
    share = sum(elements(config, {"ddp": 1, "fsdp": 8, "hsdp": 4}[strategy]))
    assert (counts.parameters, counts.gradients, counts.optimizer) == (4 * share, 4 * share, 8 * share)
    assert counts.peak > 16 * share


def test_ddp_sums_4_bytes_per_parameter() -> None:
    config = configure("pretrain", "--accumulation=2")
    assert traffic(count(config)) == {("all-reduce", 8): 4 * sum(elements(config, 1))}


@pytest.mark.parametrize(
    ("precision", "itemsize", "accumulation", "reshard"),
    [("bfloat16", 2, 1, "true"), ("float32", 4, 2, "true"), ("bfloat16", 2, 2, "false")],
)
def test_fsdp_gathers_and_reduces_the_bytes_of_the_formula(
    precision: str, itemsize: int, accumulation: int, reshard: str
) -> None:
    """Blocks are gathered for each forward and backward pass, or once if kept; the rest once per micro-batch, as its
    backward pass follows at once. Gradients are float32."""
    more = [f"--distributed.precision={precision}", f"--accumulation={accumulation}"]
    config = configure("pretrain", "--distributed.strategy=fsdp", f"--distributed.reshard={reshard}", *more)
    blocks, rest = (8 * share for share in elements(config, 8))
    times = (2 * accumulation, accumulation) if reshard == "true" else (1, 1)
    assert traffic(count(config)) == {
        ("all-gather", 8): times[0] * itemsize * blocks + times[1] * 4 * rest,
        ("reduce-scatter", 8): 4 * (blocks + rest),
    }


def test_hsdp_moves_the_bytes_of_fsdp_within_a_node_and_those_of_a_shard_between_nodes() -> None:
    config = configure("pretrain", "--distributed.strategy=hsdp")
    blocks, rest = elements(config, 4)
    assert traffic(count(config, processes=8, local_size=4)) == {
        ("all-gather", 4): 4 * (2 * 2 * blocks + 4 * rest),
        ("reduce-scatter", 4): 4 * 4 * (blocks + rest),
        ("all-reduce", 2): 4 * (blocks + rest),
    }


def test_weights_that_stay_gathered_take_memory() -> None:
    base = "--encoder.num_layers=4", "--distributed.strategy=fsdp", "--data.rows=8"
    kept = count(configure("pretrain", *base, "--distributed.reshard=false"))
    freed = count(configure("pretrain", *base))
    blocks, _ = elements(configure("pretrain", *base), 1)
    assert 0.3 < (kept.peak - freed.peak) / (2 * blocks) < 1  # at most two of four blocks are gathered otherwise


@pytest.mark.parametrize(("strategy", "backend", "above"), [("ddp", "sdpa", 0.05), ("fsdp", "flex", 0.2)])
def test_the_peak_is_that_of_the_formula(strategy: str, backend: str, above: float) -> None:
    """With few blocks, the formula for FSDP is up to a fifth too high: it adds the largest moments of the head."""
    size = ["--config", str(REPOSITORY / "configs/base-120m.yaml"), "--encoder.num_layers=3", "--data.rows=32"]
    more = [f"--distributed.strategy={strategy}", f"--encoder.backend={backend}", "--encoder.attention_dropout=0"]
    config, shards = resolved(parse(pretrain.Config, [*size, *more]), 8, 8)
    shape = shape_of(config, 8)
    formula = formula_bytes(config, shape, shards)
    assert formula is not None
    assert -0.05 < sum(formula) / count_step(config, shape, 8, shards).peak - 1 < above


def test_flex_keeps_no_mask_of_all_pairs_of_frames() -> None:
    """At the loss, sdpa keeps an additive mask of 2 bytes per pair for each of two layers."""
    rows, frames = 2, 1600
    options = [f"--data.rows={rows}", f"--data.row_frames={frames}", "--encoder.attention_dropout=0",
               "--quantizer.codebook_size=8192"]  # the peak is at the loss  # fmt: skip
    peaks = [count(configure("pretrain", *options, f"--encoder.backend={name}"), 1).peak for name in ("sdpa", "flex")]
    assert peaks[0] - peaks[1] == pytest.approx(rows * (frames // 4) ** 2 * 2 * 2, rel=0.01)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_step_trains_on_real_tensors(script: str) -> None:
    config, _ = resolved(configure(script, "--distributed.precision=float32", "--data.rows=2"), 1, 1)
    torch.manual_seed(0)
    step = TrialStep(config, shape_of(config, 1), World(), 1, replicated=True)
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    step.run()
    changed = [not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed) and step.gradient_bytes == step.parameter_bytes
    assert all(bool(p.isfinite().all()) for p in step.model.parameters())


@pytest.mark.parametrize("script", ["pretrain.py", "finetune_ctc.py"])
def test_a_dry_run_of_256_processes_needs_neither_gpu_nor_dataset_and_writes_nothing(
    script: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(REPOSITORY / script), *ENCODER, "--data.rows=256", "--data.row_frames=400"]
    more = ["--data.dataset=nowhere", "--run.folder=run", "--data.max_seconds=4", "--dry_run.world_size=256"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *more, "--distributed.strategy=hsdp"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["processes"], figures["shards"]) == (256, 8)
    assert {entry["ranks"] for entry in figures["collectives"]} == {8, 32, 256}
    assert "Memory of a rank" in done.stdout and list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_tried_are_errors_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="data.rows is 16: it must be a multiple of the 24 .*, such as 24"):
        shape_of(configure("pretrain"), 24)
    teacher = configure("pretrain", "--targets.source=teacher", "--targets.export=runs/x/export")
    with pytest.raises(UserError, match="targets.export is 'runs/x/export'"):
        dry_run.report(teacher, 8, 8)
    with pytest.raises(UserError, match="groups of 3 processes"):
        resolved(configure("pretrain", "--distributed.strategy=hsdp", "--distributed.shard_size=3"), 8, 8)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="CUDA build of torch"):
        hide_gpus()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="has not used a GPU"):
        hide_gpus()
