"""Precision of matrix products: chosen from the hardware here, and nowhere else.

bfloat16 halves the bytes and, where the hardware multiplies it, more than halves the time. A CPU without such
instructions emulates it several times slower than float32.
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
    """Precision of a run, resolved: no longer 'auto'."""

    name: Literal["float32", "bfloat16"]
    reason: str
    """for the console and run.json"""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def processor_name() -> str:
    """Model of this machine's CPU with the instruction set that torch uses, such as `AMD EPYC 7763, AVX2`."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [line for line in lines if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}" + (", bf16" if _cpu_has_bfloat16() else "")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and torch uses that."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    # The instructions alone are not enough: ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA may forbid them, and a build
    # without oneDNN has no kernels for them. oneDNN alone is not enough either: it accepts AVX-512 without bfloat16.
    if not any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16_INSTRUCTIONS):
        return False
    if torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2"):
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def matmul_rate(dtype: torch.dtype, size: int = 1024, patience: float = 0.3, limit: float = 5.0) -> float:
    """FLOP/s of square matrix products on the CPU with the current number of threads, measured until it is steady:
    until `patience` seconds passed without a product faster by 1 %, at most `limit` seconds."""
    left, right = (torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    improved = end = begin
    while end - improved < patience and end - begin < limit:
        start = time.perf_counter()
        left @ right
        end = time.perf_counter()
        if end - start < best * 0.99:
            improved = end
        best = min(best, end - start)
    return 2 * size**3 / best


def emulation_factor() -> float:
    """Time of a bfloat16 matrix product on this CPU over that of a float32 one, measured."""
    rates = {dtype: matmul_rate(dtype, size=384, patience=0.1, limit=0.5) for dtype in DTYPES.values()}
    return rates[torch.float32] / rates[torch.bfloat16]


def warn_of_emulation(field: str, precision: str, world: World) -> None:
    """Print a warning on rank 0 where bfloat16 was asked for and this device emulates it. Call it on all ranks."""
    if precision != "bfloat16" or not world.any(not has_bfloat16(world.device)) or not world.is_main:
        return
    slower = ""
    if world.device.type == "cpu":
        slower = f": a matrix product takes {emulation_factor():.1f} times as long as in float32 (measured)"
    print(
        f"warning: {field} is bfloat16, which {_device_name(world.device)} emulates{slower}. float32 is faster here",
        file=sys.stderr,
        flush=True,
    )


def resolve_precision(settings: DistributedSettings, run: RunFolder, world: World) -> Precision:
    """Precision of a run. Call it on all ranks, before `RunFolder.start`, which refuses another than the run's own.

    'auto' is the precision in which the run in the folder began, so that it continues with the same arithmetic on any
    machine. In a new run it is bfloat16 if the devices of all ranks multiply that in hardware, else float32.
    """
    began = world.broadcast(run.began_with("distributed", "precision") if world.is_main else None)
    everywhere = not world.any(not has_bfloat16(world.device))
    if settings.precision != "auto":
        precision = Precision(settings.precision, "as distributed.precision asks")
    elif began in DTYPES:
        precision = Precision(began, "as the run began")
    elif everywhere:
        precision = Precision("bfloat16", f"computed in hardware by {_device_name(world.device)}")
    else:
        where = "the device of another rank" if has_bfloat16(world.device) else _device_name(world.device)
        precision = Precision("float32", f"no bfloat16 hardware in {where}")
    warn_of_emulation("distributed.precision", precision.name, world)
    return precision


ConfigT = TypeVar("ConfigT")


def with_precision(config: ConfigT, precision: Precision) -> ConfigT:
    """The script's settings with the resolved precision: it is what config.yaml and checkpoints record."""
    distributed: DistributedSettings = config.distributed  # type: ignore[attr-defined]
    return replace(config, distributed=replace(distributed, precision=precision.name))  # type: ignore[type-var]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
