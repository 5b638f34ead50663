"""Estimated time and MFU of a pretraining step on an H100, by counting: part `roofline` of `gpu_readiness`.

Every operator of a step is recorded on fake tensors (`kernel_trace.py`). A kernel takes

    max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency)) + gap

and a step takes the sum: the host is assumed to be ahead of the device. Products lose the part of the GPU that their
last wave of tiles leaves idle. MFU is the project's own (`bestrq/training/flops.py`, `pretraining/cost.py`): FLOPs of
the products, convolutions and allowed pairs of attention, three times those of the forward pass. docs/gpu.md has the
results.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.fake_step import FakeStep, filled_rows
from benchmarks.kernel_trace import Kernel, KernelTrace, Operator, fuse
from bestrq.model.presets import PRESETS
from bestrq.model.settings import EncoderSettings
from bestrq.pretraining.cost import attention_flops
from bestrq.pretraining.quantizer import QuantizerSettings
from bestrq.training.flops import count_flops, gpu_peak
from pipelines.fake_gpu import efficient_attention, fake_gpu, unmasked_attention

ROWS, FRAMES, SEGMENTS, CODEBOOKS = 4, 6000, 4, 4
"""rows and mel frames of configs/base-120m.yaml on 8 GPUs: "a minute: four utterances of average length" """


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU, and the parts of them that kernels reach; no part was measured."""

    peak: float = gpu_peak("NVIDIA H100 80GB HBM3") or 0.0
    """FLOP/s of dense bfloat16 products (data sheet of the H100 SXM)"""
    vector_peak: float = 67e12
    """FLOP/s in float32 without tensor cores (data sheet)"""
    bandwidth: float = 3.35e12
    """bytes per second of the memory (data sheet)"""
    processors: int = 132
    """streaming multiprocessors (data sheet)"""
    products: float = 0.7
    """of the peak in full waves of tiles; assumption"""
    convolutions: float = 0.5
    """of the peak, in a convolution as a product; assumption"""
    attention: float = 0.35
    """of the peak, FlashAttention-2 (arXiv 2407.08608, abstract: 35 % on an H100)"""
    attention_backward: float = 0.25
    """of the peak, FlashAttention-2; assumption"""
    masked_attention: float = 0.2
    """of the peak, the memory-efficient kernel with a mask; assumption"""
    masked_attention_backward: float = 0.15
    """of the peak; assumption"""
    vector: float = 0.7
    """of the vector peak, in float32 products; assumption"""
    depthwise: float = 0.05
    """of the vector peak, in depthwise convolutions of torch and cuDNN: ten instructions per product; assumption"""
    memory: float = 0.8
    """of the bandwidth; assumption"""
    gap: float = 2e-6
    """seconds per kernel: start, last wave, and distance to the next one; assumption"""


H100 = Gpu()
TILE = 128
"""rows and columns of the tiles of a product"""
SPLIT = 1024
"""least length of the parts into which the sums of a product are split, to fill the last wave"""


def product_seconds(product: tuple[int, int, int, int], rate: float, gpu: Gpu) -> float:
    """Time of a product (number, rows, columns, length of the sums) at a rate in FLOP/s for full waves of tiles.

    Tiles at the edges count in full. Sums may be split, as cuBLAS does for the gradients of weights.
    """
    number, rows, columns, sums = product
    tiles = number * math.ceil(rows / TILE) * math.ceil(columns / TILE)
    shares = (tiles * split / (gpu.processors * math.ceil(tiles * split / gpu.processors))
              for split in range(1, max(1, sums // SPLIT) + 1))  # fmt: skip
    return 2 * tiles * TILE**2 * sums / (rate * max(shares))


def compute_seconds(operator: Operator, gpu: Gpu) -> float:
    """Time of the arithmetic of an operator; 0 for operators without products."""
    if operator.kind == "attention":
        name = "attention_backward" if "backward" in operator.name else "attention"
        efficiency = getattr(gpu, f"masked_{name}" if "efficient" in operator.name else name)
        return operator.flops / (gpu.peak * efficiency)
    if operator.depthwise:
        return operator.flops / (gpu.vector_peak * gpu.depthwise)
    if operator.dtype not in (torch.bfloat16, torch.float16):
        return operator.flops / (gpu.vector_peak * gpu.vector)
    efficiency = gpu.convolutions if operator.kind == "convolutions" else gpu.products
    return sum(product_seconds(product, gpu.peak * efficiency, gpu) for product in operator.products)


def kernel_seconds(kernel: Kernel, gpu: Gpu) -> float:
    """Time of a kernel, or of the kernels of one operator."""
    compute = sum(compute_seconds(operator, gpu) for operator in kernel.operators)
    return max(compute, kernel.size / (gpu.bandwidth * gpu.memory)) + kernel.launches * gpu.gap


@dataclass
class Trace:
    """Operators of a step, and the project's count of its FLOPs."""

    operators: list[Operator]
    model_flops: float


def trace_step(
    settings: EncoderSettings, *, varlen: bool = False, bfloat16_residual: bool = False, rows: int = ROWS,
    frames: int = FRAMES, num_segments: int = SEGMENTS, quantizer: QuantizerSettings | None = None,
) -> Trace:  # fmt: skip
    """Record a step.

    Args:
        varlen: attention without a mask and dropout, by segment.
        bfloat16_residual: norms return the dtype of their input.
    """
    if varlen:
        settings = replace(settings, attention_dropout=0.0)
    segments = filled_rows(rows, frames, num_segments, settings)
    of_attention = attention_flops(settings, segments)
    of_all_pairs = 4 * rows * (frames // settings.stride) ** 2 * settings.dim * settings.num_layers
    trace = KernelTrace(of_attention / of_all_pairs if varlen else 1.0)
    with fake_gpu(unmasked_attention if varlen else efficient_attention, bfloat16_residual):
        step = FakeStep(settings, quantizer or QuantizerSettings(num_codebooks=CODEBOOKS), segments)
        step.prepare()
        step.model.eval()
        with torch.autocast("cuda", torch.bfloat16):
            inputs = step.log_mel, segments, step.target_frames, step.targets
            flops = count_flops(lambda: step.model(*inputs)[0], of_attention)
        step.model.train()
        step.initialise_optimizer()
        handles = trace.mark_blocks(list(step.model.encoder.blocks))
        for name in ("prepare", "forward", "backward", "update"):
            with trace.phase(name):
                getattr(step, name)()
        for handle in handles:
            handle.remove()
    return Trace(trace.operators, flops)


def uncompiled(operator: Operator) -> str:
    """Region of `fuse`: nothing is compiled."""
    return ""


def blocks(operator: Operator) -> str:
    """Region of `fuse`: every block is compiled."""
    return operator.block


def everything(operator: Operator) -> str:
    """Region of `fuse`: blocks are compiled, and the rest of each phase: subsampling, heads and loss."""
    return operator.block or operator.phase


def with_depthwise_kernel(operators: Sequence[Operator]) -> list[Operator]:
    """Depthwise convolutions that are bound by memory and take frames with channels last."""
    return [
        replace(o, flops=0.0, products=[], copied=0, launches=1 + ("backward" in o.name)) if o.depthwise else o
        for o in operators
    ]


def without_weight_casts(operators: Sequence[Operator]) -> list[Operator]:
    """Weights whose bfloat16 copies are written by the optimizer, not by casts in every forward pass."""
    found = [
        replace(o, reads=[], writes=[replace(access, size=0) for access in o.writes], launches=0)
        if o.name == "_to_copy" and o.phase == "forward" and o.reads[0].value[1] == -1 and o.dtype == torch.float32
        else o
        for o in operators
    ]  # fmt: skip
    removed = [old for old, new in zip(operators, found, strict=True) if old is not new]
    cast = sum(access.size for operator in removed for access in operator.writes)
    update = max((o for o in found if o.name == "_fused_adamw_"), key=lambda o: len(o.writes))
    return [replace(o, extra_bytes=cast) if o is update else o for o in found]


def with_epilogues(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Bound for kernels of products that also apply activations and dropout, and of gradients that also sum over
    frames: those kernels cost nothing."""

    def remains(kernel: Kernel) -> bool:
        activation = kernel.kind == "fused elementwise" and any("silu" in o.name for o in kernel.operators)
        return not (activation or any(o.over_frames for o in kernel.operators))

    return [kernel for kernel in kernels if remains(kernel)]


@dataclass
class Estimate:
    """Kernels of a step, their time and the MFU."""

    kernels: list[Kernel]
    model_flops: float
    gpu: Gpu = H100

    @property
    def seconds(self) -> float:
        return sum(kernel_seconds(kernel, self.gpu) for kernel in self.kernels)

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.gpu.peak)

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    def by_kind(self) -> dict[str, float]:
        """Milliseconds by kind of kernel."""
        times: dict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            times[kernel.kind] += 1000 * kernel_seconds(kernel, self.gpu)
        return times


def estimates(settings: EncoderSettings) -> dict[str, Estimate]:
    """Estimates by state: each adds one change to the state before it."""
    plain, varlen = trace_step(settings), trace_step(settings, varlen=True)
    narrow = trace_step(settings, varlen=True, bfloat16_residual=True)
    large = trace_step(settings, varlen=True, bfloat16_residual=True, rows=8 * ROWS)
    changed = {
        trace_rows: replace(trace, operators=without_weight_casts(with_depthwise_kernel(trace.operators)))
        for trace_rows, trace in ((ROWS, narrow), (8 * ROWS, large))
    }
    depthwise = replace(narrow, operators=with_depthwise_kernel(narrow.operators))
    graph = replace(H100, gap=H100.gap / 2)
    states = {
        "eager": (plain, uncompiled, H100),
        "compiled": (plain, blocks, H100),
        "varlen": (varlen, blocks, H100),
        "bfloat16_residual": (narrow, blocks, H100),
        "depthwise_kernel": (depthwise, blocks, H100),
        "all_compiled": (depthwise, everything, H100),
        "bfloat16_weights": (changed[ROWS], everything, H100),
        "graph": (changed[ROWS], everything, graph),
        "rows_32": (changed[8 * ROWS], everything, graph),
    }
    found = {
        name: Estimate(fuse(trace.operators, region), trace.model_flops, gpu)
        for name, (trace, region, gpu) in states.items()
    }
    found["epilogues"] = replace(found["rows_32"], kernels=with_epilogues(found["rows_32"].kernels))
    return found


FAVOURABLE: list[dict[str, float]] = [
    {"products": 0.8},
    {"convolutions": 0.65},
    {"masked_attention": 0.35, "masked_attention_backward": 0.25},
    {"depthwise": 0.2},
    {"memory": 0.9},
    {"gap": 1e-6},
]
"""other values of the assumptions, to show how much each of them decides"""


def sensitivity(estimate: Estimate) -> list[str]:
    """Lines with the MFU under each set of `FAVOURABLE`, and under all of them."""
    everything_favourable = {name: value for changes in FAVOURABLE for name, value in changes.items()}
    lines = []
    for changes in [*FAVOURABLE, everything_favourable]:
        names = ", ".join(f"{name} {value:g}" for name, value in changes.items())
        other = replace(estimate.gpu, **changes)  # type: ignore[arg-type] # no change of an integer
        lines.append(f"{replace(estimate, gpu=other).mfu:.3f}  with {names}")
    return lines


def table(found: dict[str, Estimate]) -> str:
    """Milliseconds by kind of kernel and state, then kernels, gigabytes, FLOPs and MFU."""
    times = {name: estimate.by_kind() for name, estimate in found.items()}
    kinds = sorted({kind for each in times.values() for kind in each}, key=lambda kind: -times["eager"].get(kind, 0))
    rows: list[tuple[str, list[str]]] = [
        (kind, [f"{times[name][kind]:.2f}" if kind in times[name] else "" for name in found]) for kind in kinds
    ]
    rows += [
        ("ms", [f"{1000 * e.seconds:.2f}" for e in found.values()]),
        ("kernels", [f"{e.launches:,}" for e in found.values()]),
        ("GB", [f"{sum(k.size for k in e.kernels) / 1e9:.1f}" for e in found.values()]),
        ("TFLOP", [f"{sum(k.flops for k in e.kernels) / 1e12:.2f}" for e in found.values()]),
        ("MFU", [f"{e.mfu:.3f}" for e in found.values()]),
    ]
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows])


def measure_roofline() -> dict[str, Any]:
    """Print the table of `base-120m`, and return the estimated MFU of every state."""
    found = estimates(PRESETS["base-120m"])
    model_flops = found["compiled"].model_flops
    print(f"\nbase-120m, {ROWS} rows of {FRAMES:,} mel frames, H100, {model_flops / 1e12:.2f} TFLOP for the MFU; ms:")
    print(table(found))
    for name in ("compiled", list(found)[-1]):
        print(f"MFU of '{name}' under other assumptions:", *sensitivity(found[name]), sep="\n  ", flush=True)
    figures = {f"estimated_mfu_base_120m_{name}": round(estimate.mfu, 3) for name, estimate in found.items()}
    return {"estimated_mfu_base_120m": figures.pop("estimated_mfu_base_120m_compiled"), **figures}
