"""Experiment trackers behind `MetricsLog`: Weights & Biases and trackio, which have the same calls.

A tracker is a view: metrics.jsonl is the record. It is called on rank 0 only, from a thread, so that it can neither
stall nor end a run: its first failure is a warning, after which the run trains on without it.

Every start of a run is a run of the tracker, named after the run folder and the resumed step, and all starts of a
run folder are a group. Trackers do not support lines that are removed, as those after the resumed step are.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder, TrackingSettings
from common.config import load_yaml
from common.errors import UserError
from common.files import read_json_object, write_json

MAX_WAITING = 10_000
"""lines that wait for a slow tracker; further ones are not sent"""
CLOSE_SECONDS = 60.0
"""longest wait for a tracker at the end of a run"""


def open_tracker(settings: TrackingSettings, folder: RunFolder, resume_step: int, world: World) -> Tracker | None:
    """Tracker of a run, on rank 0; None on the other ranks, and if it cannot be started.

    Raises UserError, on all ranks, if the tracker is not installed.
    """
    if importlib.util.find_spec(settings.name) is None:
        raise UserError(
            f"tracking.name is {settings.name!r}, which is not installed: pip install -r requirements-tracking.txt, or "
            "give 'none'"
        )
    if not world.is_main:
        return None
    try:
        return Tracker(settings.name, start_run(settings, folder, resume_step))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code, which may raise anything; reported
        warn(settings.name, error)
        return None


def start_run(settings: TrackingSettings, folder: RunFolder, resume_step: int) -> Any:
    """Run of the tracker, with the settings of config.yaml; its object has `log(values, step=...)` and `finish()`."""
    module = importlib.import_module(settings.name)
    group = group_of(folder.path)
    name = f"{group} from step {resume_step}"
    shared = {"project": settings.project, "name": name, "group": group, "config": load_yaml(folder.config)}
    if settings.name == "trackio":
        return module.init(**shared, embed=False, auto_log_gpu=False, auto_log_cpu=False)
    files = folder.path / "tracking"
    files.mkdir(exist_ok=True)
    # Neither the console nor the source, which may hold anything, is sent.
    quiet = {"console": "off", "disable_git": True, "save_code": False, "silent": True}
    return module.init(**shared, dir=str(files), mode="online" if settings.online else "offline", settings=quiet)


def group_of(folder: Path) -> str:
    """Name of the group of a run folder: its path and a random part, kept in tracking.json, so that it may move."""
    path = folder / "tracking.json"
    try:
        return str(read_json_object(path)["group"])
    except (UserError, KeyError):
        words = re.sub(r"[^\w.-]+", "-", os.path.normpath(folder)).strip("-.")
        group = f"{words[-60:]}-{secrets.token_hex(3)}"
        write_json(path, {"group": group})
        return group


class Tracker:
    """Run of a tracker, called from a thread.

    Args:
        name: of the tracker, for warnings.
        run: its object, with `log` and `finish`.
    """

    def __init__(self, name: str, run: Any) -> None:
        self._name, self._run = name, run
        self._calls: queue.Queue[Callable[[], Any] | None] = queue.Queue(MAX_WAITING)
        self._failed = False
        self._thread: threading.Thread | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers by name."""
        if self._failed or not values:
            return
        numbers = dict(values)
        self._put(lambda: self._run.log(numbers, step=step))

    def close(self) -> None:
        """Finish the run of the tracker, within `CLOSE_SECONDS`."""
        if self._failed:
            return
        self._put(self._run.finish)
        self._put(None)
        assert self._thread is not None
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"it has not finished within {CLOSE_SECONDS:g} s")

    def _put(self, call: Callable[[], Any] | None) -> None:
        if self._thread is None:  # at the first line: the loader has forked its workers by then
            self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"{MAX_WAITING} lines wait for it")

    def _work(self) -> None:
        while not self._failed and (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - foreign code, which may raise anything; reported
                self._fail(error)

    def _fail(self, reason: object) -> None:
        if not self._failed:
            self._failed = True
            warn(self._name, reason)


def warn(name: str, reason: object) -> None:
    """Report on stderr that a tracker is not used any more."""
    cause = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else str(reason)
    print(f"warning: the tracker {name} fails ({cause}); the run continues without it", file=sys.stderr, flush=True)
