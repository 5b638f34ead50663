"""Kernels of compiled Conformer blocks, lowered for an H100 or A100 on a machine without a GPU.

    python -m benchmarks.lowered_kernels large-600m --backend flex --gpu h100   # about two minutes of one core

The last line is JSON: `kernels`, `kernels_not_compiled` (errors of the compilers, and kernels that need more shared
memory than the GPU has, without pipelining too), `largest_shared_bytes` and the kernel that needs them.

Dynamo traces a block on fake tensors of device `cuda`; Inductor generates its Triton kernels, forward and backward; the
ptxas of the triton package compiles them to cubins for sm_90a or sm_80. Nothing is executed. The limits of a GPU are
those of NVIDIA's CUDA programming guide, table of compute capabilities.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._dynamo import device_interface
from torch._inductor.compile_fx import compile_fx
from torch._inductor.runtime import triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from benchmarks.machine import print_figures
from bestrq.model.attention.flex import make_block_mask
from bestrq.model.attention.masks import AttentionLayout
from bestrq.model.compilation import run_checkpointed
from bestrq.model.conformer import ConformerBlock
from bestrq.model.layout import ConvolutionLayout, StageLayout, make_layout
from bestrq.model.settings import CheckpointingMode, EncoderSettings
from common.config import from_dict, load_yaml
from common.segments import Segments
from pipelines.cuda_runtime import allow_backward_without_a_gpu

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [(name, backend) for name in ("base-120m", "fast-115m", "large-600m") for backend in ("sdpa", "flex")]
COMMON = {
    "minor": 0, "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "warp_size": 32,
    "max_threads_per_block": 1024, "gcnArchName": "", "shared_memory_per_block": 49_152, "total_memory": 80 * 2**30,
}  # fmt: skip
GPUS = {
    "h100": SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, multi_processor_count=132, L2_cache_size=50 * 2**20,
        shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472, **COMMON,
    ),
    "a100": SimpleNamespace(
        name="NVIDIA A100-SXM4-80GB", major=8, multi_processor_count=108, L2_cache_size=40 * 2**20,
        shared_memory_per_block_optin=166_912, shared_memory_per_multiprocessor=167_936, **COMMON,
    ),
}  # fmt: skip
"""properties as torch reports them; `shared_memory_per_block_optin` is the most that a block of threads may have"""


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel in one of its configurations."""

    name: str
    warps: int
    stages: int
    shared: int
    """bytes of shared memory"""
    target: str
    """architecture of the cubin"""
    limit: int
    """bytes of shared memory that the GPU has for it"""
    error: str = ""

    @property
    def runs(self) -> bool:
        """Whether it was compiled and the GPU can launch it."""
        return not self.error and self.shared <= self.limit


def lower_recipe(name: str, backend: str, gpu: str = "h100") -> dict[str, Any]:
    """Figures of the block of a configuration in configs/, for 4 rows, by a process of its own.

    Raises RuntimeError if that process fails.
    """
    command = [sys.executable, "-m", "benchmarks.lowered_kernels", name, "--backend", backend, "--gpu", gpu]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=CONFIGS.parent)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {result.returncode}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def figures(kernels: list[Kernel]) -> dict[str, Any]:
    """Summary of the kernels of a block."""
    largest = max(kernels, key=lambda kernel: kernel.shared)
    return {
        "kernels": len(kernels),
        "kernels_not_compiled": sum(not kernel.runs for kernel in kernels),
        "largest_shared_bytes": largest.shared,
        "largest_shared_kernel": largest.name,
        "targets": sorted({kernel.target for kernel in kernels if not kernel.error}),
    }


class Lowered(Exception):
    """End of the compilation, before any kernel would be launched."""


def lower_block(
    settings: EncoderSettings, rows: int, frames: int, mode: CheckpointingMode, gpu: SimpleNamespace
) -> list[Kernel]:
    """Kernels of a block of the last stage, for rows of mel frames in bfloat16 with float32 weights.

    Every configuration among which Inductor would choose by time on the device is compiled.

    Args:
        gpu: properties, as in `GPUS`.
    """
    allow_backward_without_a_gpu()
    kernels: list[Kernel] = []
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        torch.autograd.set_multithreading_enabled(False),  # a thread of the device would end the process with a crash
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch._C._cuda_init"),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attend),
    ):
        layout = _fake_layout(fake, settings, rows, frames)
        with fake, torch.device("cuda"):
            block = ConformerBlock(settings.stages[-1]).train()
            x = torch.empty(rows, frames // settings.stride, settings.dim).requires_grad_()

        def lower(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            with simulated_gpu(gpu, kernels):
                compile_fx(graph, inputs)
            raise Lowered

        compiled = torch.compile(run_checkpointed, backend=lower, fullgraph=True, dynamic=False)
        torch._dynamo.reset()
        try:
            with _autocast():
                compiled(block, mode, x, layout)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, Lowered):
                raise
    return kernels


def _autocast() -> torch.autocast:
    """Autocast to bfloat16, which torch would disable without a driver."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        return torch.autocast("cuda", torch.bfloat16)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, dropout: float, enable_gqa: bool
) -> torch.Tensor:
    """Kernel that `scaled_dot_product_attention` takes on these GPUs for a mask; the choice itself needs a driver."""
    assert not enable_gqa
    bias = torch.where(mask, 0.0, -torch.inf).to(q.dtype).expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout)[0]


def _fake_layout(fake: FakeTensorMode, settings: EncoderSettings, rows: int, frames: int) -> StageLayout:
    """Layout of rows of four segments, on the fake device."""
    start = torch.arange(0, frames, frames // 4 // settings.row_multiple * settings.row_multiple)[:4].expand(rows, 4)
    segments = Segments(start, torch.full_like(start, frames // 4 - 2 * settings.row_multiple), frames)
    cpu, backend = torch.device("cpu"), "varlen" if settings.backend == "varlen" else "dense"
    real = make_layout(segments, settings, training=True, device=cpu, dtype=torch.float32, backend=backend).output

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device="cuda")
        if isinstance(value, StageLayout | ConvolutionLayout | AttentionLayout):
            fields = {field.name: moved(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return replace(value, **fields)
        return value

    with fake:
        layout = moved(real)
        if settings.backend == "flex":
            mask = make_block_mask(layout.attention.first_key, layout.attention.stop_key)
            layout = replace(layout, attention=replace(layout.attention, backend="flex", backend_mask=mask))
    return layout


# ---- A device for the compilers


class _Driver:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, gpu: SimpleNamespace) -> None:
        self.gpu = gpu
        properties = {
            "max_shared_mem": gpu.shared_memory_per_block_optin, "multiprocessor_count": gpu.multi_processor_count,
            "warpSize": 32, "max_num_regs": 65536,
        }  # fmt: skip
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    launcher_cls = None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.gpu.major, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def simulated_gpu(gpu: SimpleNamespace, kernels: list[Kernel]) -> Iterator[None]:
    """Context in which torch's and Triton's compilers find this GPU; compiled kernels are added to the list."""
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.scheduler
    import torch.utils._triton as has

    def precompile(self: Any, *args: Any, **options: Any) -> None:
        if not getattr(self, "was_lowered", False):
            self.was_lowered = True
            kernels.extend(_compile(self, config, gpu.shared_memory_per_block_optin) for config in self.configs)

    def zeros(*args: Any) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    nothing, zero, true = (lambda *a, **k: None), (lambda *a, **k: 0), (lambda *a, **k: True)
    interface = device_interface.CudaInterface
    replaced: list[tuple[Any, str, Any]] = [
        (triton_heuristics.CachingAutotuner, "precompile", precompile),
        *((torch.cuda, name, nothing) for name in ("_lazy_init", "set_device", "synchronize")),
        (torch._C, "_cuda_init", nothing),
        *((torch.cuda, name, zero) for name in ("current_device", "_exchange_device", "_maybe_exchange_device")),
        *((torch.cuda, name, true) for name in ("is_available", "is_bf16_supported")),
        *((module, "get_rng_state", zeros) for module in (torch.cuda, torch.cuda.random)),
        *((module, "set_rng_state", nothing) for module in (torch.cuda, torch.cuda.random)),
        (torch.cuda, "device_count", lambda: 1),
        *((triton.runtime.driver, name, _Driver(gpu)) for name in ("_default", "_active")),
        (torch.cuda, "memory_allocated", zero),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "get_device_properties", lambda *args: gpu),
        (torch.cuda, "get_device_capability", lambda *args: (gpu.major, gpu.minor)),
        (torch.cuda, "get_device_name", lambda *args: gpu.name),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (has, "has_triton", true),
        (torch._inductor.scheduler, "has_triton", true),
        *((interface, name, staticmethod(zero))
          for name in ("exchange_device", "maybe_exchange_device", "current_device", "get_raw_stream")),
        *((interface, name, staticmethod(nothing)) for name in ("set_device", "synchronize")),
        (interface, "device_count", staticmethod(lambda: 1)),
        (interface, "get_device_properties", staticmethod(lambda device=None: gpu)),
        (interface.Worker, "get_device_properties", staticmethod(lambda device=None: gpu)),
        (interface.Worker, "current_device", staticmethod(zero)),
        (torch._inductor.runtime.triton_helpers, "set_driver_to_gpu", nothing),
        # Patterns of attention and of padded products are traced on the device, and change no block of ours.
        (joint, "lazy_init", nothing),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"compile_threads": 1, "force_disable_caches": True}
        options |= {"joint_graph_constant_folding": False, "use_static_triton_launcher": False}
        stack.enter_context(torch._inductor.config.patch(options))
        # Recomputed dropout takes its random state from a generator of the device, or, without one, in the graph.
        options = {"force_non_lazy_backward_lowering": True, "graphsafe_rng_functionalization": False}
        stack.enter_context(torch._functorch.config.patch(options))
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _compile(autotuner: Any, config: Any, limit: int) -> Kernel:
    """Compile one configuration; without pipelining if it needs too much shared memory, as Inductor does."""
    name = autotuner.inductor_meta.get("kernel_name") or autotuner.fn.__name__
    first = _compile_once(autotuner, config, name, limit)
    if first.runs or first.error or config.num_stages == 1:
        return first
    config = copy.deepcopy(config)
    config.num_stages = 1
    if "NUM_STAGES" in config.kwargs:
        config.kwargs["NUM_STAGES"] = 1
    return _compile_once(autotuner, config, name, limit)


def _compile_once(autotuner: Any, config: Any, name: str, limit: int) -> Kernel:
    try:
        result = autotuner._precompile_config(config)
    except Exception as error:  # noqa: BLE001 - any error of the compilers is the result
        return Kernel(name, config.num_warps, config.num_stages, 0, "", limit, f"{type(error).__name__}: {error}"[:500])
    binary = getattr(result, "kernel", result)
    target = binary.asm["ptx"].split(".target ", 1)[1].split("\n")[0].strip(", ")
    return Kernel(name, config.num_warps, config.num_stages, binary.metadata.shared, target, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a file in configs/, such as base-120m")
    parser.add_argument("--backend", choices=("sdpa", "flex", "varlen"), default="sdpa", help="attention")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="GPU to compile for")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_yaml(CONFIGS / f"{args.recipe}.yaml")
    settings = from_dict(EncoderSettings, config["encoder"])
    settings = replace(settings, backend=args.backend, attention_dropout=0.0)
    kernels = lower_block(settings, 4, config["data"]["row_frames"], settings.activation_checkpointing, GPUS[args.gpu])
    for kernel in kernels:
        status = "" if kernel.runs else f" NOT COMPILED {kernel.error}"
        print(f"{kernel.shared:8d} bytes, {kernel.warps} warps, {kernel.stages} stages  {kernel.name[:90]}{status}")
    print_figures(figures(kernels), "bfloat16")
    sys.stdout.flush()
    # torch's threads of the device that is not there crash at the end of the interpreter.
    os._exit(0)


if __name__ == "__main__":
    main()
