"""Peak memory of a piece of work: of the process on a CPU, as Linux counts it, or of torch on a GPU."""

import ctypes
from pathlib import Path

import torch


def resident_bytes(field: str) -> int:
    """`VmRSS`, resident now, or `VmHWM`, the highest since `forget_peak`, of this process. OSError but on Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let `VmHWM` begin again at what is resident now. OSError where the process may not."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def give_back_freed_memory() -> None:
    """Hand what glibc keeps of freed memory back to the system; does nothing with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """The peak since this was made, above what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        # Scripts keep freed memory (`process.keep_freed_memory`): work before this would hide the peak of what follows.
        give_back_freed_memory()
        try:
            forget_peak()
            self.before = resident_bytes("VmRSS")
        except OSError:  # another system, or a container that hides it: the figure is left out
            return

    def megabytes(self) -> float:
        """-1 where it is not known."""
        if self.before is None:
            return -1.0
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else resident_bytes("VmHWM")
        return max(0.0, (peak - self.before) / 1e6)
