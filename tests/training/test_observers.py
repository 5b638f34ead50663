"""Norms by module against float64, on one process, DDP and FSDP2; traces of steps."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from bestrq.training import profiling
from bestrq.training.meters import MetricsLog
from bestrq.training.module_norms import ModuleNorms, module_of, own_square
from bestrq.training.process import DistributedSettings, World, gradient_sync, parallelise
from bestrq.training.profiling import StepProfiler
from bestrq.training.run_folder import NormSettings, ProfileSettings
from tests.gloo import run_distributed

ROWS, STEPS = 8, (1, 2)


class Encoder(nn.Module):
    """Odd sizes, so that shards are uneven; the second block is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.subsampling = nn.Linear(6, 7)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(3)])
        self.blocks[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.subsampling(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Model(nn.Module):
    """Its unused layer is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.unused = Encoder(), nn.Linear(7, 3), nn.Linear(2, 2)
        self.unused.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Lines(list[dict[str, Any]]):
    """Stands for `MetricsLog`."""

    def write(self, step: int, values: dict[str, Any], kind: str) -> None:
        self.append({"step": step, "kind": kind, **values})


def make_model(dtype: torch.dtype = torch.float32) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model().to(dtype), (torch.randn(ROWS, 4, 6) * 3).to(dtype)


def norms_of(world: World, strategy: str, detail: str) -> list[dict[str, Any]]:
    """Lines of two steps of two micro-batches, of which the second step has one; on rank 0."""
    model, rows = make_model()
    settings = DistributedSettings(strategy=cast(Any, strategy), precision="float32")
    parallel = parallelise(model, model.encoder.blocks, world, settings)
    lines, hooks = Lines(), [len(module._forward_hooks) for module in model.modules()]
    norms = ModuleNorms(NormSettings(2, cast(Any, detail)), parallel, cast(MetricsLog, lines), world)
    for step in STEPS:
        norms.start(step)
        mine = rows[world.rank :: world.size].chunk(2)
        for i, micro in enumerate(mine):
            with gradient_sync(parallel, i == len(mine) - 1):
                (parallel(micro).square().sum() / ROWS).backward()
        norms.write(step)
        parallel.zero_grad(set_to_none=True)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    return list(lines)


def reference(detail: str) -> dict[str, float]:
    """The same norms by plain float64 loops."""
    model, rows = make_model(torch.float64)
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output.detach()}))
    (model(rows).square().sum() / ROWS).backward()
    names = ["encoder.subsampling", *(f"encoder.blocks.{i}" for i in range(3)), "head", "unused"]
    if detail == "layers":
        blocks = [f"encoder.blocks.{i}.{j}" for i in range(3) for j in (0, 2)]
        names = ["encoder.subsampling", *blocks, "head", "unused"]
    values = {}
    for name in names:
        gradients = [p.grad for p in model.get_submodule(name).parameters() if p.grad is not None]
        values[f"gradient/{name}"] = math.sqrt(sum(float(x) ** 2 for g in gradients for x in g.flatten()))
    for name in names:
        if name in outputs:
            elements = [float(x) for x in outputs[name].flatten()]
            values[f"activation/{name}"] = math.sqrt(math.fsum(x * x for x in elements) / len(elements))
    return values


@pytest.mark.parametrize("detail", ["blocks", "layers"])
@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_norms_are_those_of_all_ranks_and_micro_batches(size: int, strategy: str, detail: str) -> None:
    if size == 1:
        lines = norms_of(World(), strategy, detail)
    else:
        lines = run_distributed(norms_of, size, strategy, detail)[0]
    (line,) = lines
    assert (line.pop("step"), line.pop("kind")) == (2, "norms")
    expected = reference(detail)
    assert line == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
    assert line["gradient/unused"] == 0 and "activation/unused" not in line
    frozen = "encoder.blocks.1" if detail == "blocks" else "encoder.blocks.1.0"
    assert line[f"gradient/{frozen}"] == 0 and line[f"activation/{frozen}"] > 0


def hybrid_square(world: World) -> Tensor:
    """Squared norm of a gradient that is sharded within two pairs of ranks, which are replicas."""
    mesh = init_device_mesh("cpu", (2, 2))
    gradient = distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh, [Replicate(), Shard(0)])
    return world.sum(own_square(gradient, world))


def test_replicas_of_a_sharded_gradient_count_once() -> None:
    for square in run_distributed(hybrid_square, 4):
        assert float(square) == pytest.approx(sum(i * i for i in range(15)))


def test_compiled_blocks_are_observed_as_a_whole_only() -> None:
    model, rows = make_model()
    model.encoder.blocks[0].compiled = lambda: None  # as `compile_blocks` sets it
    lines = Lines()
    norms = ModuleNorms(NormSettings(1, "layers"), model, cast(MetricsLog, lines), World())
    norms.start(1)
    model(rows).sum().backward()
    norms.write(1)
    assert "activation/encoder.blocks.0.0" not in lines[0] and "activation/encoder.blocks.2.0" in lines[0]
    assert "gradient/encoder.blocks.0.0" in lines[0]


def test_names_of_modules() -> None:
    cases = {"encoder.blocks.3.attention.qkv.weight": ("encoder.blocks.3", "encoder.blocks.3.attention"),
             "encoder.subsampling.conv1.weight": ("encoder.subsampling", "encoder.subsampling.conv1"),
             "heads.quantizer.bias": ("heads", "heads.quantizer"), "head.weight": ("head", "head"),
             "encoder.mask": ("encoder", "encoder"), "scale": ("", "")}  # fmt: skip
    assert {name: (module_of(name, False), module_of(name, True)) for name in cases} == cases


def trace(folder: Path, start: int, last: int, **settings: Any) -> None:
    profiler = StepProfiler(ProfileSettings(**settings), folder, World())
    for step in range(start, last + 1):
        profiler.start(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.close()


def steps_in(path: Path) -> list[str]:
    events = json.loads((path / "trace.json").read_text())["traceEvents"]
    steps = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("name", "").startswith("optimizer")
    )
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(steps)), "steps overlap"
    return [name for _, _, name in steps]


def test_a_trace_has_the_steps_of_the_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace(tmp_path / "profile", 1, 6, first_step=3, steps=2)
    (folder,) = (tmp_path / "profile").iterdir()
    assert folder.name == "steps-3-4-rank-0"
    assert steps_in(folder) == ["optimizer step 3", "optimizer step 4"]
    table = (folder / "operators.txt").read_text()
    assert "aten::mm" in table and "Self CPU" in table
    trace(tmp_path / "profile", 4, 6, first_step=3, steps=2)  # resumed within the window
    trace(tmp_path / "profile", 3, 3, first_step=3, steps=2)  # the run ends within it
    trace(tmp_path / "profile", 5, 6, first_step=3, steps=2)  # resumed after it
    trace(tmp_path / "profile", 1, 6, first_step=3, steps=2)  # repeated after a kill
    names = {"steps-3-4-rank-0": [3, 4], "steps-4-4-rank-0": [4], "steps-3-3-rank-0": [3]}
    assert {path.name for path in (tmp_path / "profile").iterdir()} == set(names)
    for name, steps in names.items():
        assert steps_in(tmp_path / "profile" / name) == [f"optimizer step {step}" for step in steps]
    assert "warning" not in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("a file")
    trace(tmp_path / "profile", 1, 4, first_step=2, steps=1)
    assert "warning: no profile of rank 0" in capsys.readouterr().err

    def attached(**_: Any) -> Any:
        raise RuntimeError("another profiler is attached")

    monkeypatch.setattr(profiling, "profile", attached)
    trace(tmp_path / "other", 1, 4, first_step=2, steps=2)
    assert capsys.readouterr().err.count("another profiler is attached") == 1
