"""Peak memory of a section of code: of the process on a CPU (Linux), or of torch's allocator on a GPU."""

import ctypes
import resource
import sys
from pathlib import Path

import torch

from bestrq.training.process import World


def resident_bytes(field: str) -> int:
    """`VmRSS` (current) or `VmHWM` (peak since `reset_peak`) of this process. Raises OSError except on Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Reset `VmHWM` to the current resident size. Raises OSError if the process lacks the permission."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def release_freed_memory() -> None:
    """Return memory cached by glibc to the system; no effect with other C libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_gib(world: World) -> float:
    """Peak memory of this process: allocated by torch on the GPU, or the resident set on the CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class PeakMemory:
    """Peak memory since construction, minus the memory in use at construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        # Scripts keep freed memory (`machine.keep_freed_memory`), which would hide the peak of what follows.
        release_freed_memory()
        try:
            reset_peak()
            self.before = resident_bytes("VmRSS")
        except OSError:  # another system, or a container without /proc: unknown
            return

    def megabytes(self) -> float:
        """Peak in MB; -1 if unknown."""
        if self.before is None:
            return -1.0
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else resident_bytes("VmHWM")
        return max(0.0, (peak - self.before) / 1e6)
