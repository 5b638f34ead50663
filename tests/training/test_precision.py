"""Precision: chosen from the hardware once, recorded, and kept when a run resumes on another machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks import machine
from bestrq.long_form.inference import InferenceSettings
from bestrq.training import flops, meters, precision
from bestrq.training.flops import peak_flops
from bestrq.training.meters import Throughput
from bestrq.training.precision import has_bfloat16, matmul_rate, processor_name, resolve_precision, with_precision
from bestrq.training.process import DistributedSettings, World, autocast
from bestrq.training.run_folder import RunFolder
from common.config import load_yaml
from common.errors import UserError
from pipelines.finetuning import FinetuneConfig, heldout_inference
from tests.gloo import run_distributed

CPU = torch.device("cpu")


@dataclass
class Config:
    distributed: DistributedSettings = field(default_factory=DistributedSettings)


@pytest.fixture(params=[False, True], ids=["emulated", "hardware"])
def hardware(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("capabilities", "kernels", "onednn", "expected"),
    [
        ({"avx2": True}, "AVX2", False, False),
        ({"avx512_f": True}, "AVX512", True, False),  # Skylake: oneDNN accepts bfloat16, and emulates it
        ({"avx512_f": True, "avx512_bf16": True}, "AVX512", True, True),
        ({"amx_bf16": True}, "AVX512", True, True),
        ({"avx512_bf16": True}, "AVX2", False, False),  # ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA forbid it
        ({"avx512_bf16": True}, "AVX2", True, False),
        ({"avx512_bf16": True}, "AVX512", False, False),
        ({"neon": True, "bf16": True}, "DEFAULT", True, True),  # Graviton 3
        ({"neon": True}, "DEFAULT", False, False),
    ],
)
def test_bfloat16_is_hardware_only_where_instructions_and_kernels_are(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], kernels: str, onednn: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    assert has_bfloat16(CPU) == expected
    assert processor_name().endswith(", bf16") == expected


def test_auto_is_the_precision_of_the_hardware_and_says_why(hardware: bool, tmp_path: Path) -> None:
    chosen = resolve_precision(DistributedSettings(), RunFolder(tmp_path / "run"), World())
    assert chosen.name == ("bfloat16" if hardware else "float32")
    assert processor_name() in str(chosen) and ("no bfloat16 hardware" in chosen.reason) == (not hardware)
    config = with_precision(Config(), chosen)
    assert config.distributed.precision == chosen.name
    with autocast(World(), config.distributed):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if hardware else torch.float32)


def test_an_unresolved_precision_computes_nothing() -> None:
    with pytest.raises(AssertionError):
        autocast(World(), DistributedSettings())


@pytest.mark.parametrize("hardware", [False, True], indirect=True)
@pytest.mark.parametrize("began", ["float32", "bfloat16"])
def test_a_run_keeps_its_precision_on_another_machine_and_refuses_another(
    hardware: bool, began: str, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    first = with_precision(Config(), resolve_precision(DistributedSettings(precision=began), run, World()))
    run.start(first, World(), facts={"precision": "why"})
    assert load_yaml(run.config)["distributed"]["precision"] == began
    assert json.loads(run.record.read_text())["starts"][0]["precision"] == "why"
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    again = resolve_precision(DistributedSettings(), run, World())
    assert (again.name, again.reason) == (began, "recorded by the run")
    other = "float32" if began == "bfloat16" else "bfloat16"
    config = with_precision(Config(), resolve_precision(DistributedSettings(precision=other), run, World()))
    with pytest.raises(UserError, match=rf"distributed\.precision was '{began}', is '{other}'"):
        run.start(config, World())


def test_before_its_first_checkpoint_a_run_has_no_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: False)
    run = RunFolder(tmp_path / "run")
    run.start(with_precision(Config(), precision.Precision("bfloat16", "")), World())
    assert resolve_precision(DistributedSettings(), run, World()).name == "float32"


def test_asking_for_emulated_bfloat16_warns_once_with_the_measured_factor(
    hardware: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "emulation_factor", lambda: 8.25)
    resolve_precision(DistributedSettings(precision="bfloat16"), RunFolder(tmp_path), World())
    warning = capsys.readouterr().err
    assert warning.count("warning: distributed.precision is bfloat16") == (0 if hardware else 1)
    assert ("8.2 times as long" in warning) == (not hardware)
    resolve_precision(DistributedSettings(precision="float32"), RunFolder(tmp_path), World())
    assert capsys.readouterr().err == ""


def test_validation_in_emulated_bfloat16_warns_too(
    hardware: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "emulation_factor", lambda: 8.25)
    heldout_inference(FinetuneConfig(inference=InferenceSettings(precision="bfloat16")), World())
    assert capsys.readouterr().err.count("inference.precision is bfloat16") == (0 if hardware else 1)
    heldout_inference(FinetuneConfig(), World())
    assert capsys.readouterr().err == ""


def resolve_beside(world: World, folder: str) -> str:
    precision._cpu_has_bfloat16 = lambda: world.is_main  # type: ignore[assignment]
    return resolve_precision(DistributedSettings(), RunFolder(folder), world).name


def test_ranks_on_different_processors_agree(tmp_path: Path) -> None:
    assert run_distributed(resolve_beside, 2, str(tmp_path)) == ["float32", "float32"]


def peak_beside(world: World, name: str) -> tuple[float | None, float]:
    flops.has_bfloat16 = lambda device: world.is_main  # type: ignore[attr-defined]
    flops.matmul_rate = lambda dtype: 1e11  # type: ignore[attr-defined]
    return peak_flops(world, name), world.max(world.rank)  # type: ignore[arg-type]


def test_the_peak_of_ranks_on_different_processors_is_unknown_in_bfloat16_to_all() -> None:
    assert run_distributed(peak_beside, 2, "bfloat16") == [(None, 1.0)] * 2
    assert run_distributed(peak_beside, 2, "float32") == [(2e11, 1.0)] * 2


def test_the_peak_is_that_of_the_precision_and_unknown_where_it_is_emulated(
    hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 1e11, torch.bfloat16: 4e11}
    monkeypatch.setattr(flops, "matmul_rate", lambda dtype: rates[dtype])
    assert peak_flops(World(), "float32") == 1e11
    assert peak_flops(World(), "bfloat16") == (4e11 if hardware else None)


def test_the_rate_of_products_is_measured_until_it_is_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy for its first second and a half is not taken for a slow one."""
    now, products = [0.0], [0]

    class Product:
        def to(self, dtype: torch.dtype) -> Product:
            return self

        def __matmul__(self, other: Product) -> None:
            products[0] += 1
            now[0] += max(0.02, 0.2 - 0.02 * products[0])

    monkeypatch.setattr(precision.torch, "randn", lambda *_, **__: Product())
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    assert matmul_rate(torch.float32, size=1000) == pytest.approx(2e9 / 0.02)
    assert now[0] < 5.0


@pytest.mark.parametrize("peak", [1e9, 1e8])
def test_mfu_is_left_out_where_the_machine_was_faster_than_its_measured_peak(
    peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    throughput = Throughput(World(), 20, torch.nn.Identity(), peak)
    now[0] += 1.0
    throughput.count(audio_seconds=1.0, flops=5e8)
    assert throughput.interval(step=1).get("mfu") == (pytest.approx(0.5) if peak == 1e9 else None)


def test_a_figure_names_processor_precision_and_threads(capsys: pytest.CaptureFixture[str], hardware: bool) -> None:
    machine.print_figures({"ratio": 2.0}, machine.hardware_precision(), threads=2)
    line = json.loads(capsys.readouterr().out)
    assert line == {"ratio": 2.0, "processor": processor_name(), "precision": "bfloat16" if hardware else "float32",
                    "threads": 2}  # fmt: skip
    assert machine.hardware_autocast()._enabled == hardware


def test_every_benchmark_ends_with_such_a_line() -> None:
    programs = [path for path in Path("benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert len(programs) > 10
    assert [path.name for path in programs if "print_figures(" not in path.read_text()] == []
    assert [path.name for path in programs if "print(json.dumps(" in path.read_text()] == []
