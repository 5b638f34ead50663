"""The host's time between operators is attributed to places, apart from the calls of operators by modules."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.host_clock import HostClock, measure_overheads
from tests.gpu.simulated_cuda import SimulatedCuda, simulated_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests marked cuda use it")


@pytest.fixture
def gpu() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as gpu:
        yield gpu


def work(seconds: float) -> None:
    """Occupy this thread, in processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        work(0.02)
        return x.neg()


def test_time_between_operators_is_split_and_located(gpu: SimulatedCuda) -> None:
    x = torch.ones(8, device="cuda", requires_grad=True)
    large = torch.ones(1500, 1500, device="cuda")
    gpu.clock = HostClock()
    work(0.05)
    large @ large  # its time is the device's
    Slow()(x).sum().backward()
    assert 0.05 <= sum(gpu.clock.own.values()) < 0.06
    assert 0.02 <= sum(gpu.clock.launching.values()) < 0.04
    place, seconds = max(gpu.clock.own.items(), key=lambda item: item[1])
    line = test_time_between_operators_is_split_and_located.__code__.co_firstlineno + 5
    assert place.startswith(f"tests/gpu/test_host_clock.py:{line} ") and seconds >= 0.05


def test_the_overhead_of_the_simulation_is_subtracted(gpu: SimulatedCuda) -> None:
    device, cpu = measure_overheads(lambda clock: setattr(gpu, "clock", clock))
    assert gpu.clock is None and 0 < device < 1e-3 and 0 < cpu < 1e-3
    x, y = torch.ones(8, device="cuda"), torch.ones(8)
    sums = []
    for overheads in ((0.0, 0.0), (device, cpu), (1.0, 0.0), (0.0, 1.0)):
        gpu.clock = HostClock(*overheads)
        for _ in range(200):
            y.neg()
            x.neg()
        sums.append(sum(gpu.clock.own.values()))
    assert sums[1] < sums[0] and sums[2] == sums[3] == 0
