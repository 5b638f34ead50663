"""What a run says of itself: metrics.jsonl (the record), TensorBoard (the view), the console line, the rates."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from bestrq.training.precision import DTYPES, has_bfloat16, matmul_rate
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder
from common.files import write_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Dense bfloat16 rates in FLOP/s without sparsity, from the makers' data sheets; the first name that fits counts.
GPU_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class MetricsLog:
    """The numbers of a run, by step. Only rank 0 holds files; on the other ranks all methods do nothing."""

    def __init__(self, folder: RunFolder, resume_step: int, world: World) -> None:
        """Open the record and forget what lies beyond `resume_step` (0 for a new run): it will be written again."""
        self._writer: SummaryWriter | None = None
        self._path = folder.metrics
        if world.is_main:
            truncate_metrics(folder.metrics, resume_step)
            from torch.utils.tensorboard import SummaryWriter  # a slow import, and only rank 0 needs it

            self._writer = SummaryWriter(str(folder.tensorboard), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Append one line `{"step": ..., "kind": ..., NAME: VALUE}`; numbers go to TensorBoard as KIND/NAME.

        A non-finite number is null in the file: JSON has no name for it.
        """
        if self._writer is None:
            return
        line = json.dumps({"step": step, "kind": kind, **{name: _finite(value) for name, value in values.items()}})
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    @property
    def active(self) -> bool:
        """Whether this rank writes; on the others a picture need not be drawn."""
        return self._writer is not None

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show uint8 `[height, width, 3]` in TensorBoard; the record has numbers only."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Push TensorBoard's events to disk; the record is there already."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a last line that was cut short does not count."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop all lines with a step beyond `last_step`, and torn ones. Atomic."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= last_step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))


def peak_flops(world: World, precision: Literal["float32", "bfloat16"]) -> float | None:
    """Peak FLOP/s of the devices of all ranks together in this precision, None if unknown. All ranks must call it.

    GPU: the data sheet's figure for bfloat16; None for a GPU that is not in the table, and for float32, which TF32
    makes eight times as fast. CPU: the rate of a matrix product, measured on all ranks at once; None for emulated
    bfloat16, since much of a step then runs in float32, which is faster than the emulated products.
    """
    peak = 0.0
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device) if precision == "bfloat16" else ""
        peak = next((rate for part, rate in GPU_PEAKS.items() if part in name), 0.0)
    else:
        emulated = precision == "bfloat16" and not has_bfloat16(world.device)
        if not world.any(emulated):  # and all ranks measure from here on
            peak = matmul_rate(DTYPES[precision])
    if world.any(not peak):
        return None
    return float(world.sum(torch.tensor(peak, dtype=torch.float64, device=world.device)))


class Throughput:
    """Rates of an interval: audio per second, share of time spent waiting for data, MFU, memory, ETA."""

    def __init__(self, world: World, total_steps: int, peak: float | None = None) -> None:
        """`peak` is the FLOP/s of all devices from `peak_flops`, or None for no MFU."""
        self.world, self.total_steps, self.peak = world, total_steps, peak
        self._restart()

    def _restart(self) -> None:
        self._begin = time.perf_counter()
        self._steps, self._audio, self._flops, self._wait = 0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the loader's `next`: time in here is time waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._wait += time.perf_counter() - begin

    def count(self, audio_seconds: float, flops: float = 0.0) -> None:
        """One update done: this rank's seconds of audio (real, not padding) and model FLOPs (forward and backward)."""
        self._steps += 1
        self._audio += audio_seconds
        self._flops += flops

    def interval(self, step: int) -> dict[str, float]:
        """Figures since the last call, over all ranks; all ranks must call it. Keys: `audio_seconds_per_second`,
        `step_seconds`, `data_wait` (share, mean over ranks), `memory_gib` (largest rank), `eta_seconds`, and `mfu` if
        the peak is known."""
        seconds = time.perf_counter() - self._begin
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
        # A rate above the peak means that the peak was measured too low on a busy machine: leave MFU out.
        if self.peak and 0 < flops / seconds <= self.peak:
            figures["mfu"] = flops / seconds / self.peak
        self._restart()
        return figures


def memory_gib(world: World) -> float:
    """Peak memory of this process: what torch allocated on the GPU, or the resident set on the CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def console_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """One aligned line of an interval, from whichever of these are there: `loss`, `accuracy`, `learning_rate`,
    `grad_norm`, and the figures of `Throughput.interval`."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, form in _COLUMNS.items():
        if name in values:
            parts.append(form(values[name]))
    return "  ".join(parts)


def _audio(rate: float) -> str:
    """Audio-hours per second where that is a readable number, audio-seconds per second below."""
    return f"{rate / 3600:7.2f} audio-h/s" if rate >= 3600 else f"{rate:7.1f} audio-s/s"


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
    "accuracy": lambda value: f"acc {value:6.2%}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad {value:8.3g}",
    "audio_seconds_per_second": _audio,
    "mfu": lambda value: f"MFU {value:6.1%}",
    "memory_gib": lambda value: f"mem {value:5.1f} GiB",
    "data_wait": lambda value: f"wait {value:5.1%}",
    "eta_seconds": lambda value: f"ETA {duration(value):>6}",
}
