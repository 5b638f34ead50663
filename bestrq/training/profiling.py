"""Trace of some optimizer steps by torch.profiler: a Chrome trace and a table of the operators."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from bestrq.training.process import World
from bestrq.training.run_folder import ProfileSettings
from common.files import new_folder, remove_leftovers

TRACE, OPERATORS = "trace.json", "operators.txt"
MAX_OPERATORS = 50
"""rows of the table"""


class StepProfiler:
    """Profiler of the steps `first_step` to `first_step + steps - 1`, or the part of them that this start makes.

    Each window is a folder: `profile/steps-20-22-rank-0`. A trace that cannot be made or written is a warning.

    Args:
        folder: RUN/profile.
    """

    def __init__(self, settings: ProfileSettings, folder: Path, world: World) -> None:
        self._steps = range(settings.first_step, settings.first_step + settings.steps)
        self._folder, self._world = folder, world
        self._profile: profile | None = None
        self._label: record_function | None = None
        self._traced: list[int] = []
        if world.is_main:
            remove_leftovers(folder)

    def start(self, step: int) -> None:
        """Start or end the trace; called at the start of every step."""
        self._end_label()
        if step not in self._steps:
            self.close()
            return
        try:
            if self._profile is None:
                activities = [ProfilerActivity.CPU]
                if self._world.device.type == "cuda":
                    activities.append(ProfilerActivity.CUDA)
                self._profile = profile(activities=activities)
                self._profile.start()
        except RuntimeError as error:  # another profiler is attached
            self._warn(error)
            self._profile, self._steps = None, range(0)
            return
        self._traced.append(step)
        self._label = record_function(f"optimizer step {step}")
        self._label.__enter__()

    def close(self) -> None:
        """End the trace, if there is one, and write it."""
        self._end_label()
        if self._profile is None:
            return
        ended, self._profile = self._profile, None
        first, last, self._traced = self._traced[0], self._traced[-1], []
        folder = self._folder / f"steps-{first}-{last}-rank-{self._world.rank}"
        key = "self_device_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        try:
            ended.stop()
            shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed after the trace
            with new_folder(folder) as temporary:
                ended.export_chrome_trace(str(temporary / TRACE))
                table = ended.key_averages().table(sort_by=key, row_limit=MAX_OPERATORS, max_name_column_width=80)
                (temporary / OPERATORS).write_text(table + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:
            self._warn(error)
        else:
            if self._world.is_main:
                print(f"profile of steps {first} to {last}: {folder}", flush=True)

    def _end_label(self) -> None:
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None

    def _warn(self, error: Exception) -> None:
        print(f"warning: no profile of rank {self._world.rank}: {error}", file=sys.stderr, flush=True)
