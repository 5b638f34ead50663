"""Metrics logging and throughput: interval sums, metrics.jsonl, TensorBoard, console lines and rates."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bestrq.training.precision import Precision
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder
from common.errors import UserError
from common.files import write_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class IntervalSums:
    """Named float64 counters of a log interval.

    `add` never synchronises host and device: tensors are accumulated on the device, numbers on the host. `totals` joins
    both with one all-reduce and one transfer per interval.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._index = {name: index for index, name in enumerate(names)}
        self._device_sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._host_sums = [0.0] * len(names)

    def add(self, **values: Tensor | float) -> None:
        """Add scalars to the counters of these names; tensors must be on the device."""
        for name, value in values.items():
            index = self._index[name]
            if isinstance(value, Tensor):
                self._device_sums[index] += value.detach()
            else:
                self._host_sums[index] += value

    def totals(self, world: World) -> dict[str, float]:
        """Sums over the interval and all ranks; the counters restart at 0. All ranks must call it."""
        host_sums = torch.tensor(self._host_sums, dtype=torch.float64, device=self._device_sums.device)
        totals = world.sum(self._device_sums + host_sums).tolist()
        self._device_sums.zero_()
        self._host_sums = [0.0] * len(totals)
        return dict(zip(self._index, totals, strict=True))


class MetricsLog:
    """Metrics of a run by step. Only rank 0 writes files; on other ranks all methods do nothing."""

    def __init__(self, folder: RunFolder, resume_step: int, world: World) -> None:
        """Open the files and delete lines after `resume_step` (0 for a new run), which will be written again."""
        self._writer: SummaryWriter | None = None
        self._path = folder.metrics
        if world.is_main:
            truncate_metrics(folder.metrics, resume_step)
            from torch.utils.tensorboard import SummaryWriter  # a slow import, needed on rank 0 only

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
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    @property
    def active(self) -> bool:
        """Whether this rank writes files; other ranks need not draw pictures."""
        return self._writer is not None

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write an image, uint8 `[height, width, 3]`, to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a metrics file; a truncated line is skipped."""
    from common.json_lines import read_json_lines  # not at the top: a reader of the loop need not read it

    if not path.exists():
        return []
    return [row for row in read_json_lines(path) if type(row.get("step")) is int]


def truncate_metrics(path: Path, last_step: int) -> None:
    """Delete lines with a step after `last_step` and truncated lines. Atomic."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= last_step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))


class Throughput:
    """Rates of a log interval: audio seconds per second, share of time waiting for data, MFU, memory, ETA."""

    def __init__(self, world: World, total_steps: int, peak: float | None = None) -> None:
        """`peak`: FLOP/s of all devices (`flops.peak_flops`); None omits the MFU."""
        self.world, self.total_steps, self.peak = world, total_steps, peak
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
        self._flops += flops

    def interval(self, step: int) -> dict[str, float]:
        """Rates since the last call, over all ranks; all ranks must call it.

        Keys: `audio_seconds_per_second`, `step_seconds`, `data_wait` (share of time, mean over ranks), `memory_gib`
        (maximum over ranks), `eta_seconds`, and `mfu` if the peak is known.
        """
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
        }
        # A rate above the peak means that a busy machine lowered the measured peak: omit the MFU.
        if self.peak and 0 < flops / seconds <= self.peak:
            figures["mfu"] = flops / seconds / self.peak
        self._restart()
        return figures


def memory_gib(world: World) -> float:
    """Peak memory of this process: allocated by torch on the GPU, or the resident set on the CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def start_line(model: nn.Module, source: str, precision: Precision, world: World, step: int) -> str:
    """Start of the first console line: resumed step, size and source of the model, processes, device, precision."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    start = f"continuing after step {step}" if step else "starting"
    origin = f" from {source}" if source else ""
    processes = f"{world.size} process(es) of {torch.get_num_threads()} thread(s) on {world.device.type}"
    return f"{start}: {millions:.1f} M parameters{origin}, {processes} in {precision}"


def console_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """Aligned console line of the given losses, accuracies, learning rate, gradient norm and rates."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, form in _COLUMNS.items():
        if name in values:
            parts.append(form(values[name]))
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`2d03h`, `3h07m`, `4m09s` or `12s`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


_COLUMNS = {
    "loss": lambda value: f"loss {value:8.4f}",
    "dev_loss": lambda value: f"dev loss {value:.4f}",
    "accuracy": lambda value: f"acc {value:6.2%}",
    "dev_accuracy": lambda value: f"acc {value:6.2%}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad {value:8.3g}",
    "audio_seconds_per_second": "RTFx {:9,.1f}".format,
    "mfu": lambda value: f"MFU {value:6.1%}",
    "memory_gib": lambda value: f"mem {value:5.1f} GiB",
    "data_wait": lambda value: f"wait {value:5.1%}",
    "eta_seconds": lambda value: f"ETA {duration(value):>6}",
}
