"""Processor time of the host between operators on the simulated device: layout, bookkeeping, pure Python.

Time is attributed to the place of the operator that ends it, and split in two: `own` is the code that prepares and
accounts for a batch; `launching` is the time in which modules, backward passes and the optimizer call one operator
after the other, which compiled blocks and CUDA graphs remove. The time in operators on the device, with all of the
simulation, is not counted. The overhead of the dispatch mode between them is measured and subtracted.
"""

from __future__ import annotations

import linecache
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from tests.gpu.places import own_frames, place

LAYOUT = "bestrq/model/layout.py"
"""own code, although a module calls it"""
LAUNCHING_LINES = (".backward(", "optimizer.step(", "get_total_norm(", "clip_grads_with_norm_(")
LAUNCHING_FUNCTIONS = ("forward", "backward")


class HostClock:
    """Seconds by place, of this thread."""

    def __init__(self, device_overhead: float = 0.0, cpu_overhead: float = 0.0) -> None:
        """Seconds that the dispatch mode adds around an operator on the device, and to one on the CPU."""
        self.own: defaultdict[str, float] = defaultdict(float)
        self.launching: defaultdict[str, float] = defaultdict(float)
        self.cpu_operators = 0
        """operators on CPU tensors since the last `start`"""
        self._overheads = device_overhead, cpu_overhead
        self.start()

    def start(self) -> None:
        """Start the time of the host: an operator on the device has been called."""
        self.cpu_operators = 0
        self._started = time.thread_time()

    def stop(self) -> None:
        """End it, before the next one, at the current place."""
        seconds = time.thread_time() - self._started
        device, cpu = self._overheads
        counter = self.launching if _is_launching() else self.own
        counter[place()] += max(0.0, seconds - device - cpu * self.cpu_operators)


def _is_launching() -> bool:
    for name, frame in own_frames():
        if name == LAYOUT:
            return False
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if frame.f_code.co_name in LAUNCHING_FUNCTIONS or any(call in line for call in LAUNCHING_LINES):
            return True
    return False


def measure_overheads(clock_of: Callable[[HostClock | None], None]) -> tuple[float, float]:
    """Seconds that the dispatch mode adds around an operator on the device, and to one on the CPU.

    Called in `simulated_cuda()`. clock_of: sets the clock of the device.
    """
    clock, gaps = HostClock(), []
    x = torch.zeros(8, device="cuda")
    clock_of(clock)
    for _ in range(500):
        clock.own.clear()
        x.neg()
        gaps.append(sum(clock.own.values()))
    clock_of(None)
    y, with_mode, without = torch.zeros(8), [], []
    for _ in range(500):
        start = time.thread_time()
        y.neg()
        with_mode.append(time.thread_time() - start)
    with torch.utils._python_dispatch._disable_current_modes():
        for _ in range(500):
            start = time.thread_time()
            y.neg()
            without.append(time.thread_time() - start)
    return statistics.median(gaps), max(0.0, statistics.median(with_mode) - statistics.median(without))
