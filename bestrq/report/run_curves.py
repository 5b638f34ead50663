"""Curves, last values and settings of training runs, as plain values for a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_STEP = 2**53
"""larger steps are not exact in JavaScript"""
MAX_NUMBER = 1e150
"""larger numbers are gaps, like those that are not finite: sums and ranges of them would not be finite"""
MAX_LIST = 16
"""longest list of numbers that is drawn, as NAME[0], NAME[1], ..."""
MAX_METRICS = 2000
"""names of metrics of one kind of lines; further ones are left out"""
SCRIPTS = {"transducer": "RNN-T", "finetune": "CTC", "quantizer": "pretraining"}
"""section of the settings that only one kind of run has -> the kind; in this order, as RNN-T has finetune too"""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunRecord:
    """Content of a run folder."""

    name: str
    rows: Sequence[Mapping[str, Any]] = ()
    """lines of metrics.jsonl, each with an integer step"""
    totals: Sequence[tuple[int, float, float, int]] = ()
    """step, audio hours, run seconds and starts at some of the lines, none of which decreases"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of config.yaml, nested"""
    starts: int = 0
    """entries of run.json"""
    problems: Sequence[str] = ()
    """files that could not be read"""

    @property
    def script(self) -> str:
        """ "pretraining", "CTC" or "RNN-T"; "" if the settings are unknown."""
        return next((kind for section, kind in SCRIPTS.items() if section in self.settings), "")

    @property
    def last_step(self) -> int:
        """Step of the last training line; 0 without one."""
        return max((row["step"] for row in self.rows if row.get("kind") == "train"), default=0)

    @property
    def state(self) -> str:
        """ "finished", "step 40 of 100", or "empty"."""
        section = self.settings.get("run")
        total = section.get("steps") if isinstance(section, Mapping) else None
        if not self.rows:
            return "empty"
        if not isinstance(total, int):
            return f"step {self.last_step}"
        return "finished" if self.last_step >= total else f"step {self.last_step} of {total}"


@dataclass(frozen=True)
class Line:
    """Curve of a metric: means over groups of lines of the file, and their range."""

    mean: Floats
    """[P], NaN where no line has a finite number"""
    low: Floats
    """[P]"""
    high: Floats
    """[P]"""


@dataclass(frozen=True)
class Curves:
    """Curves of one kind of lines of a run, at P positions."""

    step: Floats
    """[P]"""
    hours: Floats | None
    """[P], audio heard; None if the run has no record of it"""
    seconds: Floats | None
    """[P], run time; None if the run has no record of it"""
    lines: Mapping[str, Line]


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line by name: 0 or 1 for a truth value, NaN for null, NAME[i] for the items of a list."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if name in ("step", "kind"):
            continue
        if isinstance(value, list):
            if len(value) <= MAX_LIST:
                numbers |= {f"{name}[{i}]": _number(item) for i, item in enumerate(value) if _is_number(item)}
        elif value is None or _is_number(value):
            numbers[name] = _number(value)
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _number(value: Any) -> float:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:  # JSON integers have any size
        return math.nan
    return number if abs(number) <= MAX_NUMBER else math.nan


def curves_of(record: RunRecord, max_points: int) -> dict[str, Curves]:
    """Curves of a run by kind of line: "train", "dev", ..., each with at most `max_points` positions."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in record.rows:
        kind = row.get("kind")
        if isinstance(kind, str) and 0 <= row["step"] <= MAX_STEP:
            rows.setdefault(kind, []).append(row)
    return {kind: _curves_of_kind(group, record.totals, max_points) for kind, group in rows.items()}


def _curves_of_kind(rows: list[Mapping[str, Any]], totals: Sequence[Any], max_points: int) -> Curves:
    rows = sorted(rows, key=lambda row: row["step"])
    steps = np.array([row["step"] for row in rows], dtype=np.float64)
    first = np.unique(np.linspace(0, len(rows), min(len(rows), max_points), endpoint=False).astype(np.int64))
    sizes = np.diff([*first, len(rows)])
    table: dict[str, Floats] = {}
    for i, row in enumerate(rows):
        for name, number in numbers_of(row).items():
            if name not in table:
                if len(table) == MAX_METRICS:
                    continue
                table[name] = np.full(len(rows), np.nan)
            table[name][i] = number
    lines = {name: _reduced(values, first) for name, values in table.items() if np.isfinite(values).any()}
    places = [None, None] if len(totals) < 2 else [_interpolated(steps, totals, column) for column in (1, 2)]
    hours, seconds = (None if x is None else np.add.reduceat(x, first) / sizes for x in places)
    return Curves(np.add.reduceat(steps, first) / sizes, hours, seconds, lines)


def _reduced(values: Floats, first: npt.NDArray[np.int64]) -> Line:
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.float64), first)
    with np.errstate(invalid="ignore"):  # 0 / 0
        mean = np.add.reduceat(np.where(finite, values, 0.0), first) / counts
    low = np.minimum.reduceat(np.where(finite, values, np.inf), first)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), first)
    return Line(*(np.where(counts > 0, x, np.nan) for x in (mean, low, high)))


def _interpolated(steps: Floats, totals: Sequence[Any], column: int) -> Floats:
    """Totals at these steps; those of the last line with totals for later steps."""
    known = np.array([[float(entry[0]), entry[column]] for entry in totals], dtype=np.float64)
    last = np.append(known[1:, 0] > known[:-1, 0], True)  # of several lines of one step, the last
    return np.interp(steps, known[last, 0], known[last, 1])


def restarts_of(record: RunRecord) -> list[tuple[int, float, float]]:
    """Step, audio hours and run seconds at which the run was resumed: those of the last line of the start before."""
    pairs = zip(record.totals[:-1], record.totals[1:], strict=True) if record.totals else ()
    return [(old[0], old[1], old[2]) for old, new in pairs if new[3] > old[3] and old[0] > 0]


def last_values(record: RunRecord, kind: str) -> dict[str, tuple[int, float]]:
    """Step and value of the last finite number of each metric of a kind of lines."""
    values: dict[str, tuple[int, float]] = {}
    for row in record.rows:
        if row.get("kind") == kind:
            finite = {name: number for name, number in numbers_of(row).items() if math.isfinite(number)}
            values |= {name: (row["step"], number) for name, number in finite.items()}
    return dict(list(values.items())[:MAX_METRICS])


def best_value(record: RunRecord, kind: str, name: str) -> tuple[int, float]:
    """Step and value of the highest accuracy, or of the lowest value of any other metric."""
    sign = -1 if "accuracy" in name else 1
    rows = (row for row in record.rows if row.get("kind") == kind)
    found = [(sign * numbers_of(row).get(name, math.nan), row["step"]) for row in rows]
    value, step = min((pair for pair in found if math.isfinite(pair[0])), default=(math.nan, 0))
    return step, sign * value


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Fields in which runs differ -> value of each run as text, None for a run without the field.

    A field that only some kinds of runs have is compared among these. `run.folder` is left out: it always differs.
    """
    flat = [dict(flattened(values)) for values in settings]
    names = [name for name in dict.fromkeys(name for values in flat for name in values) if name != "run.folder"]
    return {
        name: [values.get(name) for values in flat]
        for name in names
        if len({values[name] for values in flat if name in values}) > 1
    }


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted name and text of every field; text is JSON, without quotes for a string."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)
