"""Metrics, rates, console lines and run folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bestrq.training import meters
from bestrq.training.console_columns import duration
from bestrq.training.flops import peak_flops
from bestrq.training.memory import memory_gib
from bestrq.training.meters import IntervalSums, MetricsLog, Throughput, console_line
from bestrq.training.metrics_file import read_metrics, truncate_metrics
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder
from common.config import load_yaml
from common.errors import UserError
from tests.gloo import run_distributed


def log_steps(folder: RunFolder, resume: int, steps: range, offset: float) -> None:
    log = MetricsLog(folder, resume, World())
    for step in steps:
        log.write(step, {"loss": step + offset, "bad": math.nan})
    log.write(steps[-1], {"cer": 0.5}, kind="dev")
    log.close()


def test_a_resumed_run_forgets_what_lies_beyond_its_step_in_the_record_and_in_tensorboard(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log_steps(folder, 0, range(1, 6), 0.0)
    with open(folder.metrics, "a") as stream:
        stream.write('{"step": 6, "lo')  # the kill came in the middle of a line
    log_steps(folder, 3, range(4, 5), 100.0)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    train = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    assert train == {1: 1.0, 2: 2.0, 3: 3.0, 4: 104.0} and len(rows) == 5
    assert all(row["bad"] is None for row in rows if row["kind"] == "train")
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == train


def test_a_torn_line_in_a_record_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n\n[3]\n{"step": 2}\n{"step": 9}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 9]
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert read_metrics(tmp_path / "none") == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = MetricsLog(folder, 0, World())
    folder.metrics.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*No space left on device"):
        log.write(1, {"loss": 1.0})
    log.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(RunFolder(tmp_path / "run"), 0, World(rank=1))
    log.write(1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def interval_sums(world: World) -> list[dict[str, float]]:
    """Totals of two intervals: counters on the device and on the host, a rank without any, and an empty interval."""
    sums = IntervalSums(("loss", "frames", "unused"), world.device)
    for number in range(3 if world.is_main else 0):
        sums.add(loss=torch.tensor(0.1), frames=2**53 + number)
        sums.add(loss=torch.tensor(1.0, dtype=torch.float64))
    return [sums.totals(world), sums.totals(world)]


def test_interval_sums_are_float64_over_all_ranks_and_restart() -> None:
    expected = {"loss": 3 * float(torch.tensor(0.1)) + 3.0, "frames": float(3 * 2**53 + 4), "unused": 0.0}
    for totals, empty in [interval_sums(World()), *run_distributed(interval_sums, 2)]:
        assert totals == pytest.approx(expected, rel=1e-15) and list(totals) == list(expected)
        assert empty == dict.fromkeys(expected, 0.0)


def test_interval_sums_of_a_long_interval_keep_few_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "MAX_KEPT", 4)
    sums = IntervalSums(("loss", "correct"), torch.device("cpu"))
    for number in range(11):
        sums.add(loss=torch.tensor(0.1), correct=torch.tensor(2**53 // 16 + number))
        assert max(map(len, sums._tensors.values())) < 4
    expected = {"loss": 11 * float(torch.tensor(0.1)), "correct": float(11 * 2**53 // 16 + 55)}
    assert sums.totals(World()) == pytest.approx(expected, rel=1e-15)


def test_time_of_a_pause_counts_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    throughput = Throughput(World(), 20, torch.nn.Identity())
    with throughput.paused():
        now[0] += 7.0
    now[0] += 2.0
    throughput.count(audio_seconds=30.0)
    figures = throughput.interval(step=1)
    assert figures["audio_seconds_per_second"] == pytest.approx(15.0) and figures["step_seconds"] == pytest.approx(2.0)


def test_throughput_figures_follow_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    throughput = Throughput(World(), 20, torch.nn.Identity(), 1e9)
    for _ in range(4):
        with throughput.waiting():
            now[0] += 0.5
        now[0] += 1.5
        throughput.count(audio_seconds=30.0, flops=1e9)
    figures = throughput.interval(step=10)
    assert figures["audio_seconds_per_second"] == pytest.approx(15.0)
    assert figures["step_seconds"] == pytest.approx(2.0) and figures["eta_seconds"] == pytest.approx(20.0)
    assert figures["data_wait"] == pytest.approx(0.25) and figures["mfu"] == pytest.approx(0.5)
    now[0] += 1.0
    throughput.count(audio_seconds=30.0)
    later = throughput.interval(step=11)
    assert later["audio_seconds_per_second"] == pytest.approx(30.0) and "mfu" not in later


def test_memory_and_the_measured_peak_are_plausible() -> None:
    assert 0.01 < memory_gib(World()) < 1000
    peak = peak_flops(World(), "float32")
    assert peak is not None and 1e8 < peak < 1e15


def test_the_console_line_has_every_figure_and_lines_are_aligned() -> None:
    small = {"loss": 7.1, "accuracy": 0.03, "learning_rate": 1e-4, "grad_norm": 1.5, "audio_seconds_per_second": 130.0,
             "mfu": 0.413, "memory_gib": 1.2, "data_wait": 0.004, "eta_seconds": 59.0, "other": 3.0}  # fmt: skip
    large = {"loss": 12.3456, "accuracy": 0.999, "learning_rate": 1e-3, "grad_norm": 123.4,
             "audio_seconds_per_second": 80.0 * 3600, "mfu": 0.05, "memory_gib": 71.0, "data_wait": 0.5,
             "eta_seconds": 200000.0}  # fmt: skip
    line = console_line(10, 10000, small)
    for part in ("step    10/10000", "loss   7.1000", "acc  3.00%", "lr 1.00e-04", "grad      1.5", "RTFx     130.0",
                 "MFU  41.3%", "mem   1.2 GiB", "wait  0.4%", "ETA    59s"):  # fmt: skip
        assert part in line
    assert "RTFx 288,000.0" in console_line(10000, 10000, large)
    assert len(console_line(10000, 10000, large)) == len(line)


@pytest.mark.parametrize(("seconds", "text"), [(9.9, "9s"), (249, "4m09s"), (11220, "3h07m"), (183600, "2d03h")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@dataclass
class Part:
    width: int = 3
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    steps: int = 10
    workers: int = 2


def test_a_run_folder_records_every_start_and_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SECRET_TOKEN", "do-not-write-me")
    run = RunFolder(tmp_path / "run")
    for _ in range(2):
        run.start(Whole(), World(), fingerprints={"training": "abc"})
    starts = json.loads(run.record.read_text())["starts"]
    assert len(starts) == 2 and starts[1]["slurm"]["SLURM_JOB_ID"] == "17"
    assert starts[0]["fingerprints"] == {"training": "abc"} and starts[0]["world_size"] == 1
    assert starts[0]["versions"]["torch"] == torch.__version__.split("+")[0] and starts[0]["argv"]
    assert "do-not-write-me" not in "".join(path.read_text() for path in run.path.iterdir())
    assert load_yaml(run.config) == {
        "part": {"width": 3, "rate": 0.001, "betas": [0.9, 0.98]}, "steps": 10, "workers": 2}  # fmt: skip


def test_a_run_continues_only_with_what_it_began_with_but_for_the_free_fields(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.start(Whole(), World(), fingerprints={"training": "abc"})
    run.start(Whole(Part(width=4)), World(), fingerprints={"training": "x"})  # nothing was trained yet
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    run.start(Whole(Part(width=4), workers=8), World(), free=["workers"], fingerprints={"training": "x"})
    with pytest.raises(UserError, match=r"part\.width was 4, is 5"):
        run.start(Whole(Part(width=5), workers=8), World(), free=["workers"])
    with pytest.raises(UserError, match="started with training x, and now it is y"):
        run.start(Whole(Part(width=4), workers=8), World(), fingerprints={"training": "y"})
    run.start(Whole(Part(width=6, rate=0.5), workers=8), World(), free=["part"])  # a section may be free as a whole
    run.config.unlink()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        run.start(Whole(), World())
