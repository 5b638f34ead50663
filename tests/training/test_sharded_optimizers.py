"""Muon and MADGRAD in two processes: the updates of one process, joint skips, checkpoints between strategies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bestrq.training.checkpoint import load_checkpoint
from bestrq.training.optimizer import (
    GuardSettings,
    OptimizerSettings,
    StepGuard,
    build_optimizer,
    set_learning_rates,
)
from bestrq.training.process import DistributedSettings, World, parallelise
from tests.gloo import run_distributed
from tests.saved_checkpoints import save_checkpoint

NAMES = ("muon", "madgrad")
STEPS, BAD_STEP = 6, 3
Weights = dict[str, Tensor]


class Attention(nn.Module):
    """Sizes that two processes cannot share equally; the name of the fused projection of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 11)
        self.out = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((5, 3, 3), dim=-1)
        return self.out(q * torch.tanh((k * v).sum(dim=-1, keepdim=True)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(world: World, name: str, strategy: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(world.rank)  # rank 0's initial weights must be used
    model = Model()
    parallel = parallelise(model, model.blocks, world, DistributedSettings(strategy, device="cpu", precision="float32"))
    options = OptimizerSettings(name=name, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    return parallel, build_optimizer([(parallel.named_parameters(), options)])


def train(world: World, name: str, strategy: str, folder: str, start: str | None = None) -> list[bool]:
    """Train to `STEPS`, from a checkpoint if given, with a NaN on the last rank in one step; returns the outcomes."""
    model, optimizer = make(world, name, strategy)
    guard, applied, done = StepGuard(GuardSettings()), [], 0
    if start is not None:
        done = load_checkpoint(Path(start), model, optimizer, world).step
    for step in range(done + 1, STEPS + 1):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).chunk(world.size)[world.rank]
        loss = (model(x) - x[:, :3]).square().sum() / 24
        bad = step == BAD_STEP and world.rank == world.size - 1
        (loss * math.nan if bad else loss).backward()
        set_learning_rates(optimizer, step, STEPS)
        applied.append(guard.apply(step, model, optimizer, loss.detach(), 0.1, world).applied)
        if step in (BAD_STEP, STEPS):
            save_checkpoint(Path(folder), step, model, optimizer, {}, world)
    return applied


def train_all(world: World, folder: str) -> list[list[bool]]:
    """All combinations, and one that continues from the checkpoint of the other strategy."""
    applied = [train(world, name, strategy, f"{folder}/{name}-{strategy}")
               for name in NAMES for strategy in ("ddp", "fsdp")]  # fmt: skip
    for name in NAMES:
        for old, new in (("ddp", "fsdp"), ("fsdp", "ddp")):
            start = f"{folder}/{name}-{old}/step-{BAD_STEP:08d}"
            train(world, name, new, f"{folder}/{name}-{old}-{new}", start)
    return applied


def contents(folder: Path, step: int = STEPS) -> Weights:
    path = folder / f"step-{step:08d}"
    return {f"{part} {key}": tensor for part in ("model", "optimizer")
            for key, tensor in load_file(path / f"{part}.safetensors").items()}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    expected = [[step != BAD_STEP for step in range(1, STEPS + 1)]] * 2 * len(NAMES)
    assert run_distributed(train_all, 2, str(folder)) == [expected, expected]
    for name in NAMES:
        assert train(World(), name, "ddp", str(folder / name)) == expected[0]
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", ["ddp", "fsdp", "ddp-fsdp", "fsdp-ddp"])
def test_two_processes_update_as_one_does_and_skip_a_bad_step_together(name: str, other: str, folder: Path) -> None:
    """Float32: gradients differ by their summation order, which Muon amplifies up to 500 times in directions of small
    singular values (3.4445 ** 5)."""
    expected, found = contents(folder / name), contents(folder / f"{name}-{other}")
    kinds = {"muon": {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"},
             "madgrad": {"step", "gradient_sum", "square_sum", "start"}}  # fmt: skip
    assert {key.split()[1].split("/")[0] for key in expected if key.startswith("optimizer")} == kinds[name]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        if "/" not in key:
            moved = (tensor - contents(folder / name, BAD_STEP)[key]).abs().max()
            assert moved > 1e-3, key  # far above the tolerance
