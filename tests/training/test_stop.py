"""Requests to stop by signal and by file, and the files left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bestrq.training.process import World
from bestrq.training.stop import REQUEUE, SIGNALS, STOP, StopRequest
from tests.paths import REPOSITORY


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_a_flag_and_nothing_else(number: signal.Signals, tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, World())
    assert not stop.noticed()
    os.kill(os.getpid(), number)
    assert list(tmp_path.iterdir()) == [] and stop.noticed() and stop.noticed()
    assert stop.reason == number.name


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path) -> None:
    """`nohup python pretrain.py` goes on when its terminal is closed."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(tmp_path, World())
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.noticed()


def test_a_stop_file_counts_from_when_it_is_there_and_makes_way_for_the_requeue_marker(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, World())
    assert not stop.noticed()
    (tmp_path / STOP).touch()
    assert stop.noticed()
    stop.leave_requeue_marker()
    assert [path.name for path in tmp_path.iterdir()] == [REQUEUE]
    assert "STOP" in (tmp_path / REQUEUE).read_text()


def test_only_a_rank_without_data_looks_for_the_file_beside_rank_0(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, World(rank=1, size=2))
    (tmp_path / STOP).touch()
    assert not stop.noticed()
    assert stop.noticed_while_waiting() and stop.noticed()


def test_a_new_start_removes_the_old_requeue_marker_and_runs(tmp_path: Path) -> None:
    (tmp_path / REQUEUE).touch()
    stop = StopRequest(tmp_path, World())
    assert not stop.noticed() and list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from bestrq.training.process import World\n"
        "from bestrq.training.stop import StopRequest\n"
        "stop = StopRequest(sys.argv[1], World())\n"
        "os.kill(os.getpid(), signal.SIGINT); print(stop.noticed(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)"
    )
    root = REPOSITORY
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (130, "True\n")
    assert "Ctrl-C again" in done.stderr
