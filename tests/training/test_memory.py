"""Peak memory of a section of code, independent of earlier work of the process."""

import pytest
import torch

from bestrq.training.machine import keep_freed_memory
from bestrq.training.memory import PeakMemory
from bestrq.training.process import World
from tests.gloo import run_distributed


def peaks(world: World, sizes: list[int]) -> None:
    keep_freed_memory()
    found = []
    for size in sizes:
        peak = PeakMemory(torch.device("cpu"))
        torch.ones(size, dtype=torch.uint8)
        found.append(peak.megabytes())
    assert found == [pytest.approx(size / 1e6, abs=20) for size in sizes]


def test_the_peak_of_a_second_piece_of_work_is_not_hidden_by_the_first() -> None:
    run_distributed(peaks, 1, [200_000_000, 100_000_000, 200_000_000])
