"""Watchdog: limits of steps and of long periods, pauses of the whole process, reports."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bestrq.training import watchdog as module
from bestrq.training.optimizer import GuardSettings
from bestrq.training.process import World
from bestrq.training.watchdog import STATUS, Watchdog
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

START = """
import sys, time
from pathlib import Path
from bestrq.training.optimizer import GuardSettings
from bestrq.training.process import World
from bestrq.training.watchdog import Watchdog
watchdog = Watchdog(GuardSettings(step_minutes=0.01, first_step_minutes=60), Path(sys.argv[1]), World(2, 0, 4))
"""


def test_a_hung_step_ends_the_process_with_its_samples_and_stacks(tmp_path: Path) -> None:
    code = f"{START}watchdog.step(6, [])\nwatchdog.step(7, ['a', 'b'])\n"
    code += "def waits_for_ever():\n    time.sleep(10000)\nwaits_for_ever()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == STATUS
    [report] = (tmp_path / "hangs").iterdir()
    assert "[rank 2] no progress" in done.stderr and str(report) in done.stderr
    text = report.read_text()
    assert text.startswith("rank 2 of 4") and "in step 7" in text and "samples: a, b\n" in text
    assert "waits_for_ever" in text and "rank-002" in report.name


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set instead of the end of the process."""
    event = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self: (event.set(), self.close()))
    return event


def test_the_first_step_and_long_periods_have_their_own_limit(tmp_path: Path, ended: threading.Event) -> None:
    watchdog = Watchdog(GuardSettings(step_minutes=0.001, first_step_minutes=60), tmp_path, World())
    assert not ended.wait(2.5)
    watchdog.step(1, [])
    assert not ended.wait(2.5)
    watchdog.step(2, [])
    watchdog.long()
    assert not ended.wait(2.5)
    watchdog.step(3, [])
    assert ended.wait(PATIENCE)


def test_steps_may_take_ten_times_the_longest_so_far(tmp_path: Path, ended: threading.Event) -> None:
    watchdog = Watchdog(GuardSettings(step_minutes=0.001, first_step_minutes=60), tmp_path, World())
    watchdog.step(1, [])
    watchdog._waited = 100.0  # of step 1, which does not count
    watchdog.step(2, [])
    watchdog._waited = 0.3  # of step 2
    watchdog.step(3, [])
    assert not ended.wait(2.0)
    assert ended.wait(PATIENCE)


def test_a_pause_of_the_whole_process_does_not_count(
    tmp_path: Path, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 1000.0, 2000.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times, 2000.0))
    watchdog = Watchdog(GuardSettings(step_minutes=0.5), tmp_path, World())
    watchdog.step(1, [])
    watchdog.step(2, [])
    assert not ended.wait(4.0) and 0 < watchdog._waited <= 10
    watchdog.close()


def test_a_script_that_raised_is_no_longer_watched(tmp_path: Path, ended: threading.Event) -> None:
    def train() -> None:
        watchdog = Watchdog(GuardSettings(step_minutes=0.001), tmp_path, World())
        watchdog.step(1, [])
        watchdog.step(2, [])
        raise ValueError

    with pytest.raises(ValueError):
        train()
    assert not ended.wait(3.0)
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_no_limit_without_step_minutes(tmp_path: Path) -> None:
    before = threading.active_count()
    Watchdog(GuardSettings(step_minutes=0), tmp_path, World())
    assert threading.active_count() == before


def test_a_failed_allocation_leaves_samples_and_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    watchdog = Watchdog(GuardSettings(), tmp_path, World())
    watchdog.step(3, ["long-one"])
    watchdog._on_out_of_memory(0, 1000, 2000, 10)
    watchdog.close()
    pickle, report = sorted((tmp_path / "out-of-memory").iterdir())
    assert "samples: long-one" in report.read_text() and pickle.read_bytes() == b"snapshot"
    assert "out of memory on GPU 0 in step 3" in capsys.readouterr().err
