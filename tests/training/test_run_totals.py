"""Cumulative audio hours, run time and starts: they continue after a restart and are those of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bestrq.training import meters, metrics_file
from bestrq.training.meters import MetricsLog, Throughput
from bestrq.training.metrics_file import Totals, finite_number, read_metrics, totals_of
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder
from tests.gloo import run_distributed

TOTALS = ("audio_hours", "run_seconds", "starts")


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (meters, metrics_file):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


def train(folder: RunFolder, resume: int, last: int, clock: Clock, checkpoints: tuple[int, ...] = ()) -> None:
    """Steps of `step` times 36 s of audio and 10 s, with a line every 4 steps."""
    metrics = MetricsLog(folder, resume, World())
    throughput = Throughput(World(), 100, torch.nn.Identity(), before=metrics.before)
    for step in range(resume + 1, last + 1):
        clock.now += 10
        throughput.count(step * 36.0)
        if step % 4 == 0:
            metrics.write(step, {"loss": 1.0, **throughput.interval(step)})
        if step in checkpoints:
            throughput.record(step, metrics)
    metrics.close()


def totals(folder: RunFolder) -> dict[int, tuple[float, float, int]]:
    rows = read_metrics(folder.metrics)
    assert [row["kind"] for row in rows if set(TOTALS) & row.keys()] == [row["kind"] for row in rows]
    return {row["step"]: tuple(row[name] for name in TOTALS) for row in rows}  # type: ignore[misc]


def test_totals_continue_from_a_checkpoint_between_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 9, resumed from step 6: the repeated steps and the time between the starts do not count."""
    clock = Clock(monkeypatch)
    train(RunFolder(tmp_path / "through"), 0, 12, clock)
    folder = RunFolder(tmp_path / "killed")
    train(folder, 0, 9, clock, checkpoints=(6,))
    clock.now += 5000
    train(folder, 6, 12, clock, checkpoints=(8,))
    hours = {step: step * (step + 1) / 200 for step in (4, 6, 8, 12)}
    assert totals(RunFolder(tmp_path / "through")) == {
        step: (pytest.approx(hours[step], rel=1e-12), step * 10, 1) for step in (4, 8, 12)
    }
    assert totals(folder) == {
        step: (pytest.approx(hours[step], rel=1e-12), step * 10, 1 if step <= 6 else 2) for step in (4, 6, 8, 12)
    }
    kinds = {row["step"]: row["kind"] for row in read_metrics(folder.metrics)}
    assert kinds == {4: "train", 6: "checkpoint", 8: "train", 12: "train"}  # step 8 has a line already


def test_a_checkpoint_that_is_saved_twice_has_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, folder = Clock(monkeypatch), RunFolder(tmp_path)
    train(folder, 0, 6, clock, checkpoints=(6,))
    metrics = MetricsLog(folder, 6, World())
    throughput = Throughput(World(), 100, torch.nn.Identity(), before=metrics.before)
    throughput.record(6, metrics)  # stopped before the first step of this start
    metrics.close()
    assert [row["step"] for row in read_metrics(folder.metrics)] == [4, 6]


def test_an_old_file_is_continued_from_its_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, folder = Clock(monkeypatch), RunFolder(tmp_path)
    rates = {"audio_seconds_per_second": 36.0, "step_seconds": 2.0}
    rows = [{"step": step, "kind": "train", **rates} for step in (10, 20)] + [{"step": 20, "kind": "dev", **rates}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(folder, 20, 24, clock)
    last = read_metrics(folder.metrics)[-1]
    assert last["audio_hours"] == pytest.approx(0.4 + (21 + 22 + 23 + 24) / 100)
    assert (last["run_seconds"], last["starts"]) == (80, 1)


def test_totals_never_decrease_whatever_a_file_holds() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 4, "audio_hours": 2.0, "run_seconds": 10.0, "starts": 1},
        {"step": 2, "audio_hours": 9.0, "run_seconds": 90.0, "starts": 1},
        {"step": 6, "audio_hours": 1.0, "run_seconds": -5, "starts": 1},
        {"step": 8, "audio_hours": True, "run_seconds": 99.0},
        {"step": 9, "audio_hours": 10**400, "run_seconds": 99.0},
        {"step": 10, "kind": "train", "audio_seconds_per_second": "x", "step_seconds": 1},
        {"step": 11, "kind": "dev", "audio_seconds_per_second": 9.0, "step_seconds": 1.0},
        {"step": 12, "audio_hours": 3.0, "run_seconds": 12.0},
    ]
    assert totals_of(rows) == [Totals(), Totals(4, 2.0, 10.0, 1), Totals(6, 2.0, 10.0, 1), Totals(12, 3.0, 12.0, 1)]
    assert [finite_number(value) for value in (1, 2.5, True, None, "1", float("nan"), 10**400)] == [1, 2.5] + [None] * 5


def ranks_total(world: World) -> dict[str, float]:
    before = Totals(4, 10.0, 100.0, 3) if world.is_main else None
    throughput = Throughput(world, 100, torch.nn.Identity(), before=before)
    throughput.count(36.0 * (1 + world.rank))
    return throughput.interval(5)


def test_totals_are_those_of_all_ranks() -> None:
    for figures in run_distributed(ranks_total, 2):
        assert figures["audio_hours"] == pytest.approx(10.03, rel=1e-12) and figures["starts"] == 4
        assert 100 <= figures["run_seconds"] < 200  # not the sum of two clocks
