"""Page that compares training runs: curves by step, run time and audio heard; last values and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestrq.report.chart_style import COLOURS
from bestrq.report.page import ELEMENTS, SCRIPT, Cell, Column, Section, render, write_page
from bestrq.report.run_curves import (
    Curves,
    Floats,
    Line,
    RunRecord,
    best_value,
    curves_of,
    differing_settings,
    last_values,
    restarts_of,
)
from bestrq.report.text import DASH

CURVES_SCRIPT = (Path(__file__).parent / "curves.js").read_text(encoding="ascii")
DASHES = ("", "6 3", "2 2.5", "7 2 2 2", "11 3", "4 2 1 2 1 2")
"""stroke-dasharray of lines; with six colours, 36 runs differ"""
FIRST = ("loss", "accuracy", "wer", "cer")
"""parts of the names of metrics that are drawn first"""
BOOKKEEPING = ("audio_hours", "run_seconds", "starts", "eta_seconds")
"""metrics without a column of last values"""
CLOSED = ("norms", "checkpoint")
"""kinds of lines without columns, whose charts are folded"""


def write_curves(path: Path, records: Sequence[RunRecord], max_points: int, title: str) -> None:
    """Write the page.

    Args:
        max_points: points of a curve; lines of a longer record are averaged in groups.
    """
    curves = [curves_of(record, max_points) for record in records]
    positions, figures = charts(records, curves)
    runs = [_run(place, record) for place, record in enumerate(records)]
    data = {"runs": runs, "positions": positions, "charts": figures}
    columns, rows = table(records)
    sections = [
        Section("Curves", render("curves.html", data=data, max_points=max_points)),
        Section("Last values and settings", render("last_values.html", columns=columns, rows=rows)),
    ]
    finished = sum(record.state == "finished" for record in records)
    cards = {"runs": str(len(records)), "finished": str(finished)}
    if hours := sum(record.totals[-1][1] for record in records if record.totals):
        cards["hours of audio heard"] = f"{hours:,.1f}"
    if problems := [f"{record.name}: {problem}" for record in records for problem in record.problems]:
        items = ELEMENTS.table([Column("file that could not be read", "wrap")], [[problem] for problem in problems])
        sections.append(Section("Problems", items))
    lead = "Curves of metrics.jsonl. Dots: restarts. Last values, and the settings in which the runs differ, are below."
    write_page(path, title, lead, cards, sections, SCRIPT + CURVES_SCRIPT)


def _run(place: int, record: RunRecord) -> dict[str, Any]:
    restarts = np.array(restarts_of(record), dtype=np.float64).reshape(-1, 3)
    return {
        "name": record.name,
        "script": record.script,
        "colour": COLOURS[place % len(COLOURS)],
        "dash": DASHES[(place // len(COLOURS)) % len(DASHES)],
        "restarts": {axis: _values(restarts[:, i]) for i, axis in enumerate(("step", "hours", "seconds"))},
    }


def charts(
    records: Sequence[RunRecord], curves: Sequence[dict[str, Curves]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Positions of points on each axis, and charts, one per metric with the lines of the runs that have it.

    Losses of different kinds of runs are in different charts, as they are not comparable.
    """
    positions: list[dict[str, Any]] = []
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    several = len({record.script for record in records}) > 1
    for place, (record, kinds) in enumerate(zip(records, curves, strict=True)):
        for kind, curve in kinds.items():
            axes = {"step": curve.step, "hours": curve.hours, "seconds": curve.seconds}
            positions.append({axis: _values(x) for axis, x in axes.items() if x is not None})
            for name, line in curve.lines.items():
                script = record.script if several and "loss" in name else ""
                title = f"{kind}/{name}" + (f" ({script})" if script else "")
                chart = {"title": title, "kind": kind, "open": kind not in CLOSED, "lines": []}
                lines = found.setdefault((kind, name, script), chart)["lines"]
                lines.append({"run": place, "positions": len(positions) - 1} | _line(line))
    return positions, sorted(found.values(), key=_order)


def _order(chart: dict[str, Any]) -> tuple[Any, ...]:
    kind, title = chart["kind"], chart["title"]
    kinds = ("train", "dev", "dev_average", "probe")
    name = title.removeprefix(f"{kind}/")
    rank = next((i for i, part in enumerate(FIRST) if part in name), len(FIRST))
    place = kinds.index(kind) if kind in kinds else len(kinds)
    return not chart["open"], place, kind, rank, not name.startswith(FIRST), title


def _line(line: Line) -> dict[str, Any]:
    values = {"mean": _values(line.mean)}
    if not np.array_equal(line.low, line.high, equal_nan=True):
        values |= {"low": _values(line.low), "high": _values(line.high)}
    return values


def _values(numbers: Floats) -> list[float | None]:
    """Numbers with six significant digits (integers in full) for JSON; None for NaN."""
    return [
        None if math.isnan(x) else int(x) if x.is_integer() and abs(x) < 2**53 else float(f"{x:.6g}")
        for x in numbers.tolist()
    ]


def table(records: Sequence[RunRecord]) -> tuple[list[Column], list[list[Any]]]:
    """Columns and rows of the table: state, settings in which the runs differ, last values; one row per run."""
    last = [
        {kind: last_values(record, kind) for kind in dict.fromkeys(_kinds(record)) if kind not in CLOSED}
        for record in records
    ]
    metrics = list(dict.fromkeys((kind, name) for kinds in last for kind, values in kinds.items() for name in values))
    metrics = [(kind, name) for kind, name in metrics if name not in BOOKKEEPING]
    metrics.sort(key=lambda pair: _order({"kind": pair[0], "title": "/".join(pair), "open": True}))
    settings = differing_settings([record.settings for record in records])
    columns = [Column("run", "left"), Column("kind", "left"), Column("state", "left"), Column("starts")]
    columns += [Column("hours of audio"), Column("run time, h")]
    columns += [Column(name, "left") for name in settings]
    columns += [Column(f"{kind}/{name}") for kind, name in metrics]
    rows = []
    for place, record in enumerate(records):
        total = record.totals[-1] if len(record.totals) > 1 else None
        row: list[Any] = [record.name, record.script or DASH, record.state, Cell(str(record.starts), record.starts)]
        row.append(Cell(f"{total[1]:,.2f}", total[1]) if total else Cell(DASH, None))
        row.append(Cell(f"{total[2] / 3600:,.2f}", total[2]) if total else Cell(DASH, None))
        row += [DASH if values[place] is None else values[place] for values in settings.values()]
        row += [_last_cell(record, kind, name, last[place].get(kind, {}).get(name)) for kind, name in metrics]
        rows.append(row)
    return columns, rows


def _kinds(record: RunRecord) -> list[str]:
    return [row["kind"] for row in record.rows if isinstance(row.get("kind"), str)]


def _last_cell(record: RunRecord, kind: str, name: str, last: tuple[int, float] | None) -> Cell:
    """Last value; for validations also the best one, if it is another."""
    if last is None:
        return Cell(DASH, None)
    text = f"{last[1]:.5g}"
    if kind != "train" and any(part in name for part in FIRST):
        step, best = best_value(record, kind, name)
        if step != last[0]:
            text += f" (best {best:.5g} at {step})"
    return Cell(text, last[1])
