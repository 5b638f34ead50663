"""Metrics logging and throughput: interval sums, metrics.jsonl, TensorBoard, console lines and rates."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bestrq.training.precision import Precision
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder, TrackingSettings
from common.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from bestrq.training.metrics_file import Totals
    from bestrq.training.tracking import Tracker


MAX_KEPT = 256
"""scalars of a counter on the device, before they are added up"""


class IntervalSums:
    """Named float64 counters of a log interval.

    `add` waits for no device and launches no kernel: `totals` adds tensors up, with one all-reduce and one transfer.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._device = device
        self._numbers = dict.fromkeys(names, 0.0)
        self._tensors: dict[str, list[Tensor]] = {name: [] for name in names}

    def add(self, **values: Tensor | float) -> None:
        """Add scalars to the counters of these names; tensors must be on the device."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._tensors[name].append(value.detach())
                if len(kept := self._tensors[name]) == MAX_KEPT:
                    kept[:] = [torch.stack(kept).double().sum()]
            else:
                self._numbers[name] += value

    def totals(self, world: World) -> dict[str, float]:
        """Sums over the interval and all ranks; the counters restart at 0. All ranks must call it."""
        sums = torch.tensor(list(self._numbers.values()), dtype=torch.float64, device=self._device)
        for index, kept in enumerate(self._tensors.values()):
            if kept:
                sums[index] += torch.stack(kept).double().sum()
                kept.clear()
        self._numbers = dict.fromkeys(self._numbers, 0.0)
        return dict(zip(self._numbers, world.sum(sums).tolist(), strict=True))


class MetricsLog:
    """Metrics of a run by step. Only rank 0 writes files; on other ranks all methods do nothing."""

    def __init__(
        self, folder: RunFolder, resume_step: int, world: World, tracking: TrackingSettings | None = None
    ) -> None:
        """Open the files and delete lines after `resume_step` (0 for a new run), which will be written again.

        Raises UserError, on all ranks, if the tracker is not installed.
        """
        self._writer: SummaryWriter | None = None
        self._tracker: Tracker | None = None
        self._path = folder.metrics
        self.before: Totals | None = None
        """totals of the earlier starts at `resume_step`, on rank 0"""
        if tracking is not None and tracking.name != "none":
            from bestrq.training.tracking import open_tracker

            self._tracker = open_tracker(tracking, folder, resume_step, world)
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # a slow import, needed on rank 0 only

            from bestrq.training.metrics_file import truncate_metrics

            self.before = truncate_metrics(folder.metrics, resume_step)
            self._writer = SummaryWriter(str(folder.tensorboard), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Append a line `{"step": ..., "kind": ..., NAME: VALUE}`; numbers also go to TensorBoard as KIND/NAME.

        Non-finite numbers are null in the file, because JSON cannot represent them.
        """
        if self._writer is None:
            return
        line = json.dumps({"step": step, "kind": kind, **{name: _finite(value) for name, value in values.items()}})
        try:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}; the last checkpoint is untouched") from error
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(step, numbers)

    @property
    def active(self) -> bool:
        """Whether this rank writes files; other ranks need not draw pictures."""
        return self._writer is not None

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write an image, uint8 `[height, width, 3]`, to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Close the files and the tracker."""
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Throughput:
    """Rates of a log interval: audio seconds per second, share of time waiting for data, MFU, memory, ETA; and totals.

    Args:
        model: its forward passes are timed, to find the slowest of several ranks.
        peak: FLOP/s of all devices (`flops.peak_flops`); None omits the MFU.
        before: totals of the earlier starts, on rank 0 (`MetricsLog.before`).
    """

    def __init__(
        self, world: World, total_steps: int, model: nn.Module, peak: float | None = None, before: Totals | None = None
    ) -> None:
        from bestrq.training.metrics_file import RunTotals

        self.world, self.total_steps, self.peak = world, total_steps, peak
        self._totals = RunTotals(world, before)
        self._forward: Any = None  # ForwardTimes of several ranks
        if world.size > 1:
            from bestrq.training.stragglers import ForwardTimes

            self._forward = ForwardTimes(model, world)
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._audio, self._flops, self._wait = 0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context of the loader's `next`, whose time counts as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time is excluded from all rates, such as validation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def count(self, audio_seconds: float, flops: float = 0.0) -> None:
        """Count a finished step with this rank's audio (without padding) and model FLOPs (forward and backward)."""
        self._steps += 1
        self._audio += audio_seconds
        self._totals.count(audio_seconds)
        self._flops += flops

    def interval(self, step: int) -> dict[str, float]:
        """Rates since the last call, over all ranks; all ranks must call it.

        Keys: `audio_seconds_per_second`, `step_seconds`, `data_wait` (share of time, mean over ranks), `memory_gib`
        (maximum over ranks), `eta_seconds`, the cumulative `audio_hours`, `run_seconds` and `starts`
        (`metrics_file.Totals`), `mfu` if the peak is known, and of several ranks those of `ForwardTimes.slowest`.
        """
        from bestrq.training.memory import memory_gib

        seconds = time.perf_counter() - self._start
        totals = torch.tensor([self._audio, self._flops, self._wait / seconds], dtype=torch.float64)
        audio, flops, wait = self.world.sum(totals.to(self.world.device)).tolist()
        step_seconds = seconds / max(1, self._steps)
        figures = {
            "audio_seconds_per_second": audio / seconds,
            "step_seconds": step_seconds,
            "data_wait": wait / self.world.size,
            "memory_gib": self.world.max(memory_gib(self.world)),
            "eta_seconds": step_seconds * max(0, self.total_steps - step),
            **self._totals.figures(step),
        }
        # A rate above the peak means that a busy machine lowered the measured peak: omit the MFU.
        if self.peak and 0 < flops / seconds <= self.peak:
            figures["mfu"] = flops / seconds / self.peak
        if self._forward:
            figures |= self._forward.slowest()
        self._restart()
        return figures

    def record(self, step: int, metrics: MetricsLog) -> None:
        """Write the totals at a checkpoint, so that a resumed run continues them; all ranks must call it."""
        figures = self._totals.figures_once(step)
        if figures:
            metrics.write(step, figures, kind="checkpoint")


def start_line(model: nn.Module, source: str, precision: Precision, world: World, step: int) -> str:
    """Start of the first console line: resumed step, size and source of the model, processes, device, precision."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    start = f"continuing after step {step}" if step else "starting"
    origin = f" from {source}" if source else ""
    processes = f"{world.size} process(es) of {torch.get_num_threads()} thread(s) on {world.device.type}"
    return f"{start}: {millions:.1f} M parameters{origin}, {processes} in {precision}"


def console_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """Aligned console line of the given losses, accuracies, learning rate, gradient norm and rates."""
    from bestrq.training.console_columns import COLUMNS

    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, form in COLUMNS.items():
        if name in values:
            parts.append(form(values[name]))
    return "  ".join(parts)
