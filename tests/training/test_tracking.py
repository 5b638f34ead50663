"""Experiment trackers: the calls, one warning for any failure, and no influence on the run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from bestrq.training import tracking
from bestrq.training.meters import MetricsLog
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder, TrackingSettings
from common.config import save_yaml
from common.errors import UserError

FAKE = """
import json, os, time
CALLS = os.path.join(os.path.dirname(__file__), "calls.jsonl")
FAILS = {fails!r}

def _note(call, /, **values):
    with open(CALLS, "a") as stream:
        stream.write(json.dumps([call, values]) + "\\n")
    if call == FAILS:
        raise RuntimeError("the server is down")
    if FAILS == "hang in " + call:
        time.sleep(60)

def init(**values):
    _note("init", **values)
    return Run()

class Run:
    def log(self, data, step=None):
        _note("log", data=data, step=step)
    def finish(self):
        _note("finish")
"""


def make_tracker(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> Path:
    """Package with the API of a tracker, which notes its calls in the returned file."""
    package = folder / f"fake-{name}"
    package.mkdir()
    (package / f"{name}.py").write_text(FAKE.format(fails=fails))
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(tracking.sys.modules, name, raising=False)
    return package / "calls.jsonl"


def calls_in(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(name, values) for name, values in map(json.loads, path.read_text().splitlines())]


def log_steps(
    folder: RunFolder, name: Literal["wandb", "trackio"], steps: range, world: World | None = None, **settings: Any
) -> None:
    folder.path.mkdir(exist_ok=True)
    save_yaml({"run": {"steps": 5}}, folder.config)
    log = MetricsLog(folder, steps[0] - 1, world or World(), TrackingSettings(name, **settings))
    for step in steps:
        log.write(step, {"loss": step / 2, "spike": True, "usage": [1.0], "none": None})
    log.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_are_sent_by_step_and_every_start_is_a_run_of_one_group(
    name: Literal["wandb", "trackio"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = make_tracker(tmp_path, name, monkeypatch)
    folder = RunFolder(tmp_path / "run")
    log_steps(folder, name, range(1, 4), project="speech")
    log_steps(folder, name, range(3, 5))  # resumed from step 2
    names = [call for call, _ in calls_in(calls)]
    assert names == ["init", "log", "log", "log", "finish", "init", "log", "log", "finish"]
    first, second = (values for call, values in calls_in(calls) if call == "init")
    assert first["project"] == "speech" and first["config"] == {"run": {"steps": 5}}
    assert first["group"] == second["group"] == json.loads((folder.path / "tracking.json").read_text())["group"]
    assert first["name"].endswith("from step 0") and second["name"].endswith("from step 2")
    logged = [values for call, values in calls_in(calls) if call == "log"]
    assert logged == [{"data": {"train/loss": step / 2}, "step": step} for step in (1, 2, 3, 3, 4)]
    if name == "wandb":
        assert first["mode"] == "offline" and first["settings"]["console"] == "off"
        log_steps(folder, name, range(5, 6), online=True)
        assert [values["mode"] for call, values in calls_in(calls) if call == "init"][-1] == "online"


def test_other_ranks_do_not_call_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = make_tracker(tmp_path, "trackio", monkeypatch)
    log_steps(RunFolder(tmp_path / "run"), "trackio", range(1, 3), World(rank=1))
    assert not calls.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_package_is_an_error_on_all_ranks(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.name is 'wandb', .*pip install -r requirements-tracking\.txt"):
        MetricsLog(RunFolder(tmp_path), 0, World(rank=rank), TrackingSettings("wandb"))


@pytest.mark.parametrize("fails", ["init", "log", "finish", "hang in log", "hang in finish"])
def test_a_tracker_that_fails_or_hangs_costs_one_warning(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tracker(tmp_path, "wandb", monkeypatch, fails)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.5)
    folder, start = RunFolder(tmp_path / "run"), time.monotonic()
    log_steps(folder, "wandb", range(1, 6))
    warnings = capsys.readouterr().err.splitlines()
    reason = "it has not finished within 0.5 s" if "hang" in fails else "RuntimeError: the server is down"
    assert warnings == [f"warning: the tracker wandb fails ({reason}); the run continues without it"]
    assert len(folder.metrics.read_text().splitlines()) == 5 and time.monotonic() - start < 20


def test_a_slow_tracker_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tracker(tmp_path, "wandb", monkeypatch, "hang in log")
    monkeypatch.setattr(tracking, "MAX_WAITING", 3)
    log_steps(RunFolder(tmp_path / "run"), "wandb", range(1, 9))
    assert capsys.readouterr().err.count("3 lines wait for it") == 1
