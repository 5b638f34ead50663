"""Triton kernels of the transducer losses: in the interpreter, compiled without a GPU, and on one."""

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


def compiled(name: str, capability: int, dtype: str, options: dict[str, Any]) -> Any:
    """A kernel, built by Triton for a GPU that need not exist."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bestrq.recognition.losses import kernels

    function = getattr(kernels, name)
    constants = {key: value for key, value in options.items() if key != "num_warps"}
    signature = dict.fromkeys(function.arg_names, f"*{dtype}")
    signature |= {"first_state": "*i64", "layouts": "*i64", **dict.fromkeys(constants, "constexpr")}
    indexed = {(function.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(function, signature, constexprs=indexed)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": options["num_warps"]})


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
    kernel = compiled(name, capability, dtype, options)
    ptx = kernel.asm["ptx"]
    assert re.search(rf"\.target sm_{capability}a?\n", ptx.replace(",", "\n"))
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    assert registers(kernel.asm["cubin"], tmp_path) * 32 * options["num_warps"] <= 65_536
    # Cells of a diagonal are read by other threads: a barrier, and no load through the cache of constants. Sums in a
    # fixed order: no atomic operation.
    assert "bar.sync" in ptx and "ld.global.nc" not in ptx and "atom." not in ptx and "red." not in ptx


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
