"""Stopping between two updates: SIGTERM, Ctrl-C, or a file named STOP in the run folder.

The script asks `agreed` after every update; on yes it saves, calls `leave_requeue_marker` and ends with status 0. The
batch script, which saw the marker, requeues the job (launch/*.sbatch).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from bestrq.training.process import World
from common.files import write_file

STOP = "STOP"
REQUEUE = "REQUEUE"


class StopRequest:
    """Watches for a wish to stop. Signals only set a flag; a second Ctrl-C exits at once with status 130."""

    def __init__(self, run_folder: Path) -> None:
        """Install the handlers (main thread only). A REQUEUE marker of an earlier start is removed."""
        self.run_folder = Path(run_folder)
        self.requested = False
        self.reason = ""
        self._interrupts = 0
        (self.run_folder / REQUEUE).unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(130)
            # Not print: a handler may interrupt a print that holds the stream's lock.
            os.write(2, b"stopping after this update; Ctrl-C again stops now\n")

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop. All ranks must ask, once an update; all get the same answer.

        Rank 0 alone looks for the file, so that a shared file system answers one question an update, not one a rank.
        """
        if world.is_main and not self.requested and (self.run_folder / STOP).exists():
            self.requested, self.reason = True, f"the file {STOP}"
        return world.any(self.requested)

    def leave_requeue_marker(self, world: World) -> None:
        """After the save: rank 0 writes REQUEUE and removes STOP, so that the continued run does not stop again."""
        if world.is_main:
            write_file(self.run_folder / REQUEUE, (self.reason or "another rank was asked to stop") + "\n")
            (self.run_folder / STOP).unlink(missing_ok=True)
        world.barrier()
