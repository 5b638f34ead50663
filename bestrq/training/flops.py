"""FLOPs of a step, and the peak rate of the devices, for the MFU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bestrq.training.precision import DTYPES, has_bfloat16, matmul_rate
from bestrq.training.process import World

# Dense bfloat16 FLOP/s from the manufacturers' data sheets; the first name contained in the device name applies.
GPU_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(world: World, precision: Literal["float32", "bfloat16"]) -> float | None:
    """Peak FLOP/s of the devices of all ranks together in this precision; None if unknown. All ranks must call it.

    GPU: data sheet value for bfloat16; None for a GPU that is not in the table, and for float32, which TF32 accelerates
    up to eight times. CPU: rate of a matrix product, measured on all ranks simultaneously; None for emulated bfloat16,
    because most of a step then runs in float32, which is faster than the emulated products.
    """
    peak = 0.0
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device) if precision == "bfloat16" else ""
        peak = next((rate for part, rate in GPU_PEAKS.items() if part in name), 0.0)
    else:
        emulated = precision == "bfloat16" and not has_bfloat16(world.device)
        if not world.any(emulated):  # a barrier too, after which all ranks measure
            peak = matmul_rate(DTYPES[precision])
    if world.any(not peak):
        return None
    return float(world.sum(torch.tensor(peak, dtype=torch.float64, device=world.device)))


@torch.no_grad()
def count_flops(loss: Callable[[], Tensor]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a forward and backward pass of `loss()`.

    Three times those of the forward pass, since the backward pass has two products of the same size for each. The
    backward pass itself is not counted, because torch's counter treats the weight gradient of a depthwise convolution
    as a dense one. The counter slows down every operator: call it once, before training.
    """
    with FlopCounterMode(display=False) as counter:
        loss()
    return 3 * counter.get_total_flops()
