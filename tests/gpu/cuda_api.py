"""Functions and classes of `torch.cuda` on a machine with one simulated H100. `gpu` is a `SimulatedCuda`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class Generator(torch._C.Generator):
    """`torch.Generator`, which for the simulated device draws the CPU's numbers."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]


class Event:
    """`torch.cuda.Event`: every kernel has finished at once, and the host waits in `synchronize`."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def record(self, stream: object = None) -> None:
        """Nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Streams wait for nothing."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.wait("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        return 0.0


def replacements(gpu: Any) -> dict[str, Callable[..., Any]]:
    """Functions of `torch.cuda` on a machine with one H100."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    nothing = ("_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all", "empty_cache",
               "reset_peak_memory_stats")  # fmt: skip
    zero = ("current_device", "max_memory_allocated", "memory_allocated", "memory_reserved", "max_memory_reserved")
    stream = SimpleNamespace(
        synchronize=lambda: gpu.wait("Stream.synchronize"), wait_stream=lambda other: None,
        wait_event=lambda event: None, record_event=lambda event=None: event or Event(gpu), query=lambda: True,
    )  # fmt: skip

    def register(address: int, size: int, flags: int) -> int:
        gpu.registered[address] = size
        return 0

    def unregister(address: int) -> int:
        del gpu.registered[address]
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    return {
        **{name: lambda *args, **kwargs: None for name in nothing},
        **{name: lambda *args, **kwargs: 0 for name in zero},
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *args: properties.name,
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (9, 0),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "synchronize": lambda *args: gpu.wait("torch.cuda.synchronize"),
        "Event": lambda *args, **kwargs: Event(gpu),
        "Stream": lambda *args, **kwargs: stream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "cudart": lambda: runtime,
    }
