"""One run trains in a run folder; leftovers of killed processes are removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bestrq.training import run_lock
from bestrq.training.checkpoint import latest_checkpoint
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder, RunSettings
from bestrq.training.run_lock import LOCK, RunLock
from common.errors import UserError
from common.files import new_folder, remove_leftovers, temporary_name
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

HOLD = """
import sys, time
from pathlib import Path
from bestrq.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(1000)
"""


@dataclass
class Settings:
    run: RunSettings = field(default_factory=RunSettings)


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "SLURM_JOB_ID": "4711"},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_is_refused_with_the_holders_name_and_starts_after_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = hold(tmp_path)
    try:
        monkeypatch.setattr(run_lock, "PATIENCE", 0.2)
        expected = rf"in use by process {holder.pid} on .*, SLURM job 4711, since 20.*run\.folder"
        with pytest.raises(UserError, match=expected):
            RunFolder(tmp_path).start(Settings(), World())
        assert [path.name for path in tmp_path.iterdir()] == [LOCK], "nothing was written"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(PATIENCE)
    RunFolder(tmp_path).start(Settings(), World())
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_run_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({holder.pid}, 9)"])
    RunLock(tmp_path)
    assert holder.wait(PATIENCE) == -signal.SIGKILL and killer.wait(PATIENCE) == 0


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    RunLock(tmp_path)
    assert "has no locks" in capsys.readouterr().err


def test_leftovers_of_dead_writers_are_removed_at_the_start(tmp_path: Path) -> None:
    """Under any name of process: in a container it is the same at every start."""
    other = temporary_name(tmp_path / "other" / "step-00000001")  # of a run in the folder of this one, perhaps alive
    other.mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "pictures", tmp_path / "checkpoints"):
        folder.mkdir(exist_ok=True)
        temporary_name(folder / "step-00000001").mkdir()
        temporary_name(folder / "model.png").write_text("half")
    (tmp_path / ".tmp-notes").write_text("mine")
    run = RunFolder(tmp_path)
    run.start(Settings(), World())
    assert latest_checkpoint(run.checkpoints, World()) is None
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    kept = ["other", str(other.relative_to(tmp_path))]
    assert left == [".tmp-notes", "checkpoints", "config.yaml", *kept, "pictures", "run.json", LOCK]


def test_links_among_leftovers_are_not_followed(tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    other.mkdir()
    (other / "file").write_text("kept")
    run.mkdir()
    temporary_name(run / "x").symlink_to(other)
    remove_leftovers(run)
    assert list(run.iterdir()) == [] and (other / "file").read_text() == "kept"


def test_a_new_folder_is_complete_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "made") as folder:
        (folder / "first").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "made") as folder:
        (folder / "first").write_text("1")
        assert not (tmp_path / "made").exists()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["made", "made/first"]


def test_another_process_continues_after_the_end_of_a_run(tmp_path: Path) -> None:
    """A notebook may train several times."""
    run = RunFolder(tmp_path)
    run.start(Settings(), World())
    run.close()
    run.close()
    holder = hold(tmp_path)
    holder.kill()
    holder.wait(PATIENCE)
