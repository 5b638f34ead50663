"""The rank whose forward passes take longest is named by all ranks."""

import time

import torch
from torch import nn

from bestrq.training.meters import Throughput
from bestrq.training.process import World
from bestrq.training.stragglers import ForwardTimes
from tests.gloo import run_distributed


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def figures(world: World) -> list[dict[str, float]]:
    model = Slow(0.3 if world.rank == 1 else 0.1)
    throughput = Throughput(world, 10, model)
    found = []
    for _ in range(2):
        model.train()
        model(torch.zeros(1))
        model.eval()
        model.seconds = 1.0 if world.rank == 0 else 0.0  # a validation does not count
        model(torch.zeros(1))
        throughput.count(1.0)
        found.append(throughput.interval(1))
        model.seconds = 0.1 if world.rank != 2 else 0.3
    return found


def test_the_slowest_rank_is_named_since_the_last_log_line() -> None:
    for first, second in run_distributed(figures, 3):
        assert first["slowest_rank"] == 1 and 1.5 < first["slowest_rank_ratio"] < 4
        assert second["slowest_rank"] == 2


def test_one_process_has_no_slowest_rank() -> None:
    assert "slowest_rank" not in Throughput(World(), 10, nn.Identity()).interval(1)
    timer = ForwardTimes(model := nn.Identity(), World())
    model(torch.zeros(1))
    assert timer.slowest() == {"slowest_rank": 0, "slowest_rank_ratio": 1.0}
