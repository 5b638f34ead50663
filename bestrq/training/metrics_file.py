"""metrics.jsonl of a run: reading, truncation on resumption, and the cumulative figures at its lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bestrq.training.process import World
from common.files import write_file
from common.json_lines import read_json_lines


class Totals(NamedTuple):
    """Cumulative figures of a run after an optimizer step."""

    step: int = 0
    audio_hours: float = 0.0
    """audio of all ranks and steps, without padding; an epoch counts again"""
    run_seconds: float = 0.0
    """wall time of all starts, from the first step's data on, with validation and saving. The time between two starts
    does not count, nor do steps that were lost and repeated"""
    starts: int = 0
    """starts of the run that have written a line which is still in the file"""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a metrics file; a truncated line is skipped."""
    if not path.exists():
        return []
    return [row for row in read_json_lines(path) if isinstance(row.get("step"), int)]


def truncate_metrics(path: Path, last_step: int) -> Totals:
    """Delete lines with a step after `last_step` and truncated lines. Atomic.

    Returns:
        the totals at the last line that is kept.
    """
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    if path.exists():
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
    return totals_of(kept)[-1]


def totals_of(rows: Iterable[Mapping[str, Any]]) -> list[Totals]:
    """Totals at the lines that have them, after an initial zero; no figure decreases.

    Training lines of versions without totals have rates, which are integrated over the steps since the line before. The
    time of validation and saving is missing there.
    """
    totals = [Totals()]
    for row in rows:
        last, step = totals[-1], row["step"]
        if step < last.step:
            continue
        hours, seconds, starts = (finite_number(row.get(name)) for name in Totals._fields[1:])
        if hours is None or seconds is None:
            rate = finite_number(row.get("audio_seconds_per_second"))
            interval = finite_number(row.get("step_seconds"))
            if row.get("kind") != "train" or rate is None or interval is None:
                continue
            elapsed = interval * (step - last.step)
            hours, seconds = last.audio_hours + rate * elapsed / 3600, last.run_seconds + elapsed
        count = last.starts if starts is None else int(starts)
        totals.append(Totals(step, max(hours, last.audio_hours), max(seconds, last.run_seconds), count))
    return totals


class RunTotals:
    """Totals of a run while it trains.

    They are sums over ranks, in which rank 0 alone continues those of earlier starts, and counts time and starts.

    Args:
        before: totals at the step that the run resumes from, on rank 0 (`MetricsLog.before`).
    """

    def __init__(self, world: World, before: Totals | None = None) -> None:
        before = before or Totals()
        self._world = world
        self._seconds_heard = before.audio_hours * 3600
        self._start = time.perf_counter() - before.run_seconds
        self._starts = before.starts + 1
        self._written = before.step

    def count(self, audio_seconds: float) -> None:
        """Count audio of this rank."""
        self._seconds_heard += audio_seconds

    def figures(self, step: int) -> dict[str, float]:
        """Totals over all ranks, as the fields of a line of this step; all ranks must call it."""
        self._written = step
        seconds = time.perf_counter() - self._start
        shares = [self._seconds_heard, *((seconds, float(self._starts)) if self._world.is_main else (0.0, 0.0))]
        totals = self._world.sum(torch.tensor(shares, dtype=torch.float64).to(self._world.device))
        heard, seconds, starts = totals.tolist()
        return {"audio_hours": heard / 3600, "run_seconds": seconds, "starts": int(starts)}

    def figures_once(self, step: int) -> dict[str, float]:
        """`figures`, or {} on rank 0 if a line of this step has them; all ranks must call it."""
        is_written = step == self._written
        figures = self.figures(step)
        return {} if is_written else figures


def finite_number(value: Any) -> float | None:
    """The value as a float, or None if it is not a number, not finite, or too large."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON integers have any size
        return None
    return number if math.isfinite(number) else None
