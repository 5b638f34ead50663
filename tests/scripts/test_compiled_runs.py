"""Setting `encoder.compile`: its default, its errors, runs of the scripts with compiled blocks, changes on resuming."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.model import compilation
from bestrq.model.settings import EncoderSettings
from bestrq.training import process
from bestrq.training.process import DistributedSettings, start_world
from bestrq.training.stop import StopRequest
from common.config import parse
from common.errors import UserError
from pipelines import kernels
from pipelines.kernels import check_kernels, compiles
from tests.tiny import DATA, ENCODER, RUN, make_dataset

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCRIPTS: dict[str, tuple[Any, list[str]]] = {
    "pretrain": (pretrain, ["--quantizer.codebook_size=64"]),
    "ctc": (finetune_ctc, ["--validation.every_steps=2"]),
    "rnnt": (finetune_rnnt, ["--transducer.prediction_dim=12", "--transducer.joint_dim=10", "--transducer.dropout=0"]),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def quick_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run by torch's operators instead of generated code."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compilation, "compile_blocks", partial(compilation.compile_blocks, backend="aot_eager"))
    with torch._dynamo.config.patch(optimize_ddp=torch._dynamo.config.optimize_ddp):  # restored
        yield


def run(script: str, dataset: Path, folder: Path, *more: str) -> list[float]:
    """Run a script for 4 steps; return the losses."""
    module, options = SCRIPTS[script]
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0"]
    still = ["--encoder.dropout=0", "--encoder.attention_dropout=0", "--run.steps=4"]
    module.train(parse(module.Config, [*ENCODER, *DATA, *RUN, *options, *places, *still, *more]))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_of_a_compiled_run_equal_those_of_an_eager_one(
    script: str, dataset: Path, tmp_path: Path, quick_compilation: None
) -> None:
    eager = run(script, dataset, tmp_path / "eager")
    assert counters["stats"]["unique_graphs"] == 0  # auto is false on a CPU
    compiled = run(script, dataset, tmp_path / "compiled", "--encoder.compile=true")
    assert compiled == pytest.approx(eager, rel=1e-4) and len(eager) == 4
    assert counters["stats"]["unique_graphs"] == 1


def test_compilation_may_change_when_a_run_is_resumed(
    dataset: Path, tmp_path: Path, quick_compilation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("pretrain", dataset, tmp_path / "whole")
    with monkeypatch.context() as patch:
        answers = iter([False, True])
        patch.setattr(StopRequest, "noticed", lambda self: next(answers, True))
        stopped = run("pretrain", dataset, tmp_path / "resumed", "--encoder.compile=true")
    assert len(stopped) < len(whole)
    resumed = run("pretrain", dataset, tmp_path / "resumed", "--encoder.compile=false")
    assert resumed == pytest.approx(whole, rel=1e-4)


def test_auto_compiles_on_cuda_where_a_compiler_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, batch_norm = EncoderSettings(), EncoderSettings(convolution_norm="batch_norm")
    monkeypatch.setattr(kernels, "missing_compiler", lambda: "")
    assert compiles(auto, CUDA) and not compiles(auto, CPU) and not compiles(batch_norm, CUDA)
    monkeypatch.setattr(kernels, "missing_compiler", lambda: "there is no C compiler")
    assert not compiles(auto, CUDA)
    for device in (CPU, CUDA):
        assert compiles(replace(auto, compile=True), device) and not compiles(replace(auto, compile=False), device)


def test_compilation_that_is_impossible_is_an_error_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = EncoderSettings(compile=True)
    check_kernels(forced, CPU)
    with pytest.raises(
        UserError, match=r"encoder\.compile is true, but the collectives of .*'batch_norm'.*give 'auto'"
    ):
        check_kernels(replace(forced, convolution_norm="batch_norm"), CPU)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"encoder\.compile is true, but there is no C\+\+ compiler .*apt install g\+\+"
    ):
        check_kernels(forced, CPU)
    with pytest.raises(UserError, match=r"encoder\.compile is true, .*no C compiler"):
        check_kernels(forced, CUDA)
    check_kernels(forced, CPU, training=False)  # evaluation runs uncompiled


def test_attention_of_cudnn_is_off_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(process.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(process.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(process.torch.cuda, "set_device", lambda device: None)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert start_world(DistributedSettings()).device.type == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
