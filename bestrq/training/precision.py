"""Precision of matrix products, chosen by the hardware support for bfloat16.

bfloat16 halves the memory and, with hardware support, more than halves the time. CPUs without bfloat16 instructions
emulate it, several times slower than float32.
"""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from bestrq.training.process import DistributedSettings, World
from bestrq.training.run_folder import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Names of torch.cpu.get_capabilities(): AVX-512 and AMX on x86, NEON and SVE on Arm.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@dataclass(frozen=True)
class Precision:
    """Resolved precision of a run."""

    name: Literal["float32", "bfloat16"]
    reason: str
    """reason of the choice, for the console and run.json"""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def processor_name() -> str:
    """CPU model and the instruction set used by torch, such as `AMD EPYC 7763, AVX2`."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [line for line in lines if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}" + (", bf16" if _cpu_has_bfloat16() else "")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware and torch uses those instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    # The instructions alone are not enough: ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA may disable them, and a build
    # without oneDNN has no kernels for them. oneDNN alone is not enough either: it accepts AVX-512 without bfloat16.
    if not any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16_INSTRUCTIONS):
        return False
    if torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2"):
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def matmul_rate(dtype: torch.dtype, size: int = 1024, patience: float = 0.3, limit: float = 5.0) -> float:
    """Measured FLOP/s of square matrix products on the CPU with the current number of threads.

    The measurement ends after `patience` seconds without an improvement of 1 %, or after `limit` seconds.
    """
    left, right = (torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    improved = now = start
    while now - improved < patience and now - start < limit:
        product_start = time.perf_counter()
        left @ right
        now = time.perf_counter()
        if now - product_start < best * 0.99:
            improved = now
        best = min(best, now - product_start)
    return 2 * size**3 / best


def emulation_factor() -> float:
    """Measured time of a bfloat16 matrix product on this CPU, relative to float32."""
    rates = {dtype: matmul_rate(dtype, size=384, patience=0.1, limit=0.5) for dtype in DTYPES.values()}
    return rates[torch.float32] / rates[torch.bfloat16]


def warn_of_emulation(field: str, precision: str, world: World) -> None:
    """Print a warning on rank 0 if bfloat16 is requested and a device emulates it. All ranks must call it."""
    if precision != "bfloat16" or not world.any(not has_bfloat16(world.device)) or not world.is_main:
        return
    slower = ""
    if world.device.type == "cpu":
        slower = f": a matrix product takes {emulation_factor():.1f} times as long as in float32 (measured)"
    print(
        f"warning: {field} is bfloat16, which {_device_name(world.device)} emulates{slower}; float32 is faster here",
        file=sys.stderr,
        flush=True,
    )


def resolve_precision(settings: DistributedSettings, run: RunFolder, world: World) -> Precision:
    """Precision of a run. All ranks must call it before `RunFolder.start`, which refuses to change the precision of a
    run.

    'auto' is the recorded precision of the run in the folder, so that it resumes with the same arithmetic on any
    machine. For a new run it is bfloat16 if the devices of all ranks multiply it in hardware, else float32.
    """
    recorded = world.broadcast(run.recorded_setting("distributed", "precision") if world.is_main else None)
    all_have_bfloat16 = not world.any(not has_bfloat16(world.device))
    if settings.precision != "auto":
        precision = Precision(settings.precision, "set by distributed.precision")
    elif recorded in DTYPES:
        precision = Precision(recorded, "recorded by the run")
    elif all_have_bfloat16:
        precision = Precision("bfloat16", f"in hardware on {_device_name(world.device)}")
    else:
        device = "the device of another rank" if has_bfloat16(world.device) else _device_name(world.device)
        precision = Precision("float32", f"no bfloat16 hardware in {device}")
    warn_of_emulation("distributed.precision", precision.name, world)
    return precision


ConfigT = TypeVar("ConfigT")


def with_precision(config: ConfigT, precision: Precision) -> ConfigT:
    """Copy of the script's settings with the resolved precision, as recorded in config.yaml and checkpoints."""
    distributed: DistributedSettings = config.distributed  # type: ignore[attr-defined]
    return replace(config, distributed=replace(distributed, precision=precision.name))  # type: ignore[type-var]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
