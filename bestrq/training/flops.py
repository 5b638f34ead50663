"""FLOPs of a step, and the peak rate of the devices, for the MFU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bestrq.training.precision import DTYPES, has_bfloat16, matmul_rate
from bestrq.training.process import World

GPU_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""dense bfloat16 FLOP/s with float32 accumulation, by the words of a device name that identify it.

Sources: NVIDIA's data sheets of each product, half of a figure with 2:4 sparsity (B200, GB200: of HGX B200 and GB200
NVL72; A10G: of AWS EC2 G5); RTX: white papers of GA102 and Ada."""


def gpu_peak(name: str) -> float | None:
    """Entry of `GPU_PEAKS` with the most words, all of them consecutive words of the device name; None if unknown.

    None also for a MIG slice, which has a part of the GPU, and for a laptop's GPU of the same name.
    """
    words = re.split(r"[\s-]+", name.lower())
    if "mig" in words or "laptop" in words:
        return None
    matching = [
        (len(parts), peak)
        for key, peak in GPU_PEAKS.items()
        for parts in [key.lower().split()]
        if any(words[start : start + len(parts)] == parts for start in range(len(words)))
    ]
    return max(matching)[1] if matching else None


def peak_flops(world: World, precision: Literal["float32", "bfloat16"]) -> float | None:
    """Peak FLOP/s of the devices of all ranks together in this precision; None if unknown. All ranks must call it.

    GPU: data sheet value for bfloat16; None for a GPU that is not in the table, and for float32, which TF32 accelerates
    up to eight times. CPU: rate of a matrix product, measured on all ranks simultaneously; None for emulated bfloat16,
    because most of a step then runs in float32, which is faster than the emulated products.
    """
    peak = 0.0
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device) if precision == "bfloat16" else ""
        peak = gpu_peak(name) or 0.0
    else:
        emulated = precision == "bfloat16" and not has_bfloat16(world.device)
        if not world.any(emulated):  # a barrier too, after which all ranks measure
            peak = matmul_rate(DTYPES[precision])
    if world.any(not peak):
        return None
    return float(world.sum(torch.tensor(peak, dtype=torch.float64, device=world.device)))


@torch.no_grad()
def count_flops(loss: Callable[[], Tensor], attention: int | None = None) -> int:
    """FLOPs of the matrix products, convolutions and attention in a forward and backward pass of `loss()`.

    Three times those of the forward pass, since the backward pass has two products of the same size for each. The
    backward pass itself is not counted, because torch's counter treats the weight gradient of a depthwise convolution
    as a dense one. The counter slows down every operator: call it once, before training.

    Args:
        attention: FLOPs of the forward pass that replace those of torch's attention operators, if there are any, which
            are counted as if nothing were masked.
    """
    with FlopCounterMode(display=False) as counter:
        loss()
    counts = counter.get_flop_counts().get("Global", {})
    unmasked = sum(flops for operator, flops in counts.items() if "attention" in str(operator))
    masked = unmasked if attention is None or not unmasked else attention
    return 3 * (counter.get_total_flops() - unmasked + masked)
