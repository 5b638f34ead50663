"""Slowest rank: the time of the forward pass by rank.

Ranks finish a step together, since they wait for each other's gradients, so the time of the whole step does not show
which one is slow. The forward pass has no collectives in one process or under DDP; under FSDP2 it waits for gathered
weights, and the ranks differ less.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from bestrq.training.process import World


class ForwardTimes:
    """Timer of the forward passes of a model in training, without waits for the device until `slowest`."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self._marks: list[Any] = []  # start and end of every pass: seconds, or events of a GPU
        model.register_forward_pre_hook(lambda module, _: self._mark(module))
        model.register_forward_hook(lambda module, _, __: self._mark(module))

    def _mark(self, model: nn.Module) -> None:
        if not model.training:
            return
        if self.world.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def slowest(self) -> dict[str, float]:
        """`slowest_rank` and `slowest_rank_ratio`, its forward time relative to the median, since the last call.

        All ranks must call it.
        """
        starts, ends = self._marks[::2], self._marks[1::2]
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
            seconds = sum(start.elapsed_time(end) / 1000 for start, end in zip(starts, ends, strict=True))
        else:
            seconds = sum(end - start for start, end in zip(starts, ends, strict=True))
        self._marks = []
        by_rank = self.world.sum_on_host(
            *(seconds if rank == self.world.rank else 0 for rank in range(self.world.size))
        )
        median = statistics.median(by_rank)
        slowest = max(range(self.world.size), key=by_rank.__getitem__)
        return {"slowest_rank": slowest, "slowest_rank_ratio": by_rank[slowest] / median if median else 1.0}
