"""Triton kernels of the transducer and CTC losses: in the interpreter, compiled without a GPU, and on one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bestrq.recognition.losses import backend
from bestrq.recognition.losses.ctc import ctc_losses
from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.tdt import sum_over_durations
from bestrq.recognition.losses.transducer import sum_over_alignments
from tests.paths import REPOSITORY

triton = pytest.importorskip("triton", reason="this build of torch has no Triton")

SHARED_BYTES = {90: 232_448, 80: 166_912}
"""largest shared memory of a block by compute capability (CUDA C programming guide, technical specifications)"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Values printed by `interpreted_kernels`."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.recognition.interpreted_kernels"],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", ["tdt with bands", "plain", "plain with bands", "tdt in blocks"])
def test_losses_and_gradients_of_the_kernels_equal_those_of_the_reference_in_float64(
    interpreted: dict[str, Any], case: str
) -> None:
    assert interpreted[case] < 1e-12


def test_losses_and_gradients_of_the_kernels_equal_those_of_the_reference_in_float32(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["tdt float32"] < 1e-5


def test_the_losses_of_both_transducers_use_the_kernels_where_they_can(interpreted: dict[str, Any]) -> None:
    assert interpreted["selected"] < 1e-12


def test_posteriors_of_a_lattice_with_a_large_loss_do_not_drift(interpreted: dict[str, Any]) -> None:
    """A float32 score of 10,000 nats has a rounding error of 0.0005, at every one of the segment's frames."""
    assert interpreted["drift"] < 1e-5


def test_the_loss_of_an_arc_that_is_not_a_number_is_not_a_number(interpreted: dict[str, Any]) -> None:
    assert interpreted["not a number"] == [True, False]


def test_ctc_losses_and_gradients_of_the_kernels_equal_those_of_torch(interpreted: dict[str, Any]) -> None:
    assert interpreted["ctc"] < 1e-12
    assert interpreted["ctc without labels"] < 1e-12
    assert interpreted["ctc float32"] < 1e-5
    assert interpreted["ctc without gradients"] < 1e-12


def test_a_large_ctc_loss_does_not_drift(interpreted: dict[str, Any]) -> None:
    """A log-probability of -200, the mean here, has a rounding error of 1e-5 itself."""
    loss_error, grad_error, loss = interpreted["ctc drift"]
    assert loss > 10_000 and loss_error < 1e-7 and grad_error < 3e-5


def test_a_log_probability_that_is_not_a_number_is_found_in_the_ctc_loss_of_its_segment(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["ctc not a number"] == [[True, False], [True, False]]


def test_labels_that_do_not_fit_their_frames_have_no_ctc_loss_and_no_gradients(interpreted: dict[str, Any]) -> None:
    *impossible, possible = interpreted["ctc impossible"]
    assert impossible == [0.0] * 4 and possible > 0


def compiled(function: Any, capability: int, types: dict[str, str], options: dict[str, Any]) -> Any:
    """A kernel, built by Triton for a GPU that need not exist. `types` are those of its arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {key: value for key, value in options.items() if key != "num_warps"}
    signature = types | dict.fromkeys(constants, "constexpr")
    indexed = {(function.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(function, signature, constexprs=indexed)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": options["num_warps"]})


def check_resources(kernel: Any, capability: int, num_warps: int, folder: Path) -> None:
    """Assert that a built kernel fits a GPU and has the barrier and the loads that its results need."""
    ptx = kernel.asm["ptx"]
    assert re.search(rf"\.target sm_{capability}a?\n", ptx.replace(",", "\n"))
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    assert registers(kernel.asm["cubin"], folder) * 32 * num_warps <= 65_536
    # Scores are read by other threads: a barrier, and no load through the cache of constants. Sums in a fixed order: no
    # atomic operation.
    assert "barrier" in kernel.asm["ttir"]  # written, not that of a sum over threads
    assert "bar.sync" in ptx and "ld.global.nc" not in ptx and not re.search(r"\b(atom|red)\.", ptx)


def registers(cubin: bytes, folder: Path) -> int:
    """Registers per thread of a built kernel."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("name", ["scores_kernel", "posteriors_kernel"])
@pytest.mark.parametrize(
    ("capability", "dtype", "durations", "banded", "size"),
    [
        (90, "fp32", (0, 1, 2, 3, 4), False, (750, 100)),
        (90, "fp32", None, False, (750, 100)),
        (90, "fp32", (0, 1, 2, 3, 4), True, (30_000, 2000)),
        (90, "fp64", None, True, (30_000, 2000)),
        (80, "fp32", (0, 1, 2, 3, 4), True, (750, 100)),
    ],
)
def test_kernels_compile_for_a_gpu_within_its_registers_and_with_a_barrier(
    name: str, capability: int, dtype: str, durations: tuple[int, ...] | None, banded: bool, size: tuple[int, int],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from bestrq.recognition.losses import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    bands = [torch.zeros(size[0], dtype=torch.int64)] if banded else None
    lattices = Lattices([size[0]], [torch.ones(size[1], dtype=torch.int64)], bands, [5] if banded else None)
    options = kernels.launch_options(lattices, durations, 0.05)
    function = getattr(kernels, name)
    types = dict.fromkeys(function.arg_names, f"*{dtype}") | {"first_state": "*i64", "layouts": "*i64"}
    check_resources(compiled(function, capability, types, options), capability, options["num_warps"], tmp_path)


@pytest.mark.parametrize("name", ["ctc_scores_kernel", "ctc_posteriors_kernel"])
@pytest.mark.parametrize(
    ("capability", "dtype", "most_labels"), [(90, "fp32", 100), (90, "fp32", 2000), (90, "fp64", 0), (80, "fp32", 400)]
)
def test_ctc_kernels_compile_for_a_gpu_within_its_registers_and_with_a_barrier(
    name: str, capability: int, dtype: str, most_labels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bestrq.recognition.losses import ctc_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    options = ctc_kernels.launch_options(most_labels)
    assert options["BLOCK"] >= 2 * most_labels + 1
    function = getattr(ctc_kernels, name)
    types = dict.fromkeys(function.arg_names, f"*{dtype}") | {"plan": "*i64", "vocab": "i32"}
    check_resources(compiled(function, capability, types, options), capability, options["num_warps"], tmp_path)


def test_kernels_are_chosen_on_a_gpu_with_a_compiler_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(is_cuda=True)
    assert not backend.use_kernels(torch.zeros(1))
    monkeypatch.setattr(backend, "missing_for_triton", lambda: None)
    assert backend.use_kernels(gpu)
    monkeypatch.setattr(backend, "missing_for_triton", lambda: "a C compiler")
    with pytest.warns(UserWarning, match="without a C compiler: a slower loss"):
        assert not backend.use_kernels(gpu)


def test_what_triton_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "gcc")
    assert backend.missing_for_triton() == f"{header} (package python3-dev)"
    header.touch()
    assert backend.missing_for_triton() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert backend.missing_for_triton() == "a C compiler (gcc, or the variable CC)"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
@pytest.mark.parametrize("durations", [(0, 1, 2, 3, 4), None], ids=["tdt", "plain"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_kernels_on_a_gpu_equal_the_cpu_and_repeat_every_bit(
    durations: tuple[int, ...] | None, dtype: torch.dtype, tolerance: float
) -> None:
    sizes = [(300, 70), (1, 40), (90, 0), (1, 0), (45, 200), (257, 33), (1500, 1100)]
    generator = torch.Generator().manual_seed(0)
    results = []
    for device in ["cpu", *["cuda"] * 5]:
        labels = [torch.ones(count, dtype=torch.int64, device=device) for _, count in sizes]
        lattices = Lattices([frames for frames, _ in sizes], labels)
        shape = (sum(lattices.cells), 2 + len(durations or ()))
        arcs = torch.randn(shape, generator=generator.manual_seed(0), dtype=torch.float64).log_softmax(dim=-1)
        arcs = arcs.to(device, dtype).requires_grad_()
        losses = (
            sum_over_durations(arcs, lattices, durations, 0.05) if durations else sum_over_alignments(arcs, lattices)
        )
        results.append([losses.detach().cpu(), torch.autograd.grad(losses.sum(), arcs)[0].cpu()])
    for again in results[2:]:
        assert all(torch.equal(*pair) for pair in zip(results[1], again, strict=True))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=max(tolerance / 100, 1e-12), atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_ctc_kernels_on_a_gpu_equal_the_cpu_and_repeat_every_bit(dtype: torch.dtype, tolerance: float) -> None:
    generator, vocab = torch.Generator().manual_seed(0), 40
    lengths, sizes = torch.tensor([750, 1, 90, 20, 1500, 3000]), torch.tensor([120, 1, 0, 30, 700, 1200])
    labels = torch.randint(1, vocab, (len(sizes), 1200), generator=generator)
    segments = (lengths.cumsum(0) - lengths, lengths, labels, sizes)
    outputs = torch.randn(int(lengths.sum()), vocab, generator=generator, dtype=torch.float64)
    results = []
    for device in ["cpu", *["cuda"] * 5]:
        leaf = outputs.to(device, torch.float64 if device == "cpu" else dtype).requires_grad_()
        losses = ctc_losses(leaf.log_softmax(dim=-1), *segments)
        results.append([losses.detach().cpu().double(), torch.autograd.grad(losses.sum(), leaf)[0].cpu().double()])
    for again in results[2:]:
        assert all(torch.equal(*pair) for pair in zip(results[1], again, strict=True))
    assert results[0][0].count_nonzero() == len(sizes) - 1  # 30 labels do not fit 20 frames
    torch.testing.assert_close(results[1][0], results[0][0], rtol=max(tolerance / 100, 1e-12), atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=tolerance)
