"""Requests to stop a run between two optimizer steps: signals, Ctrl-C included, or a file named STOP in the run folder.

The training loop calls `agreed` at its start, and passes `noticed` to the guard of every step, which asks all ranks. At
a stop, the script saves a checkpoint, calls `leave_requeue_marker` and exits with status 0; the batch script then
finds the marker and requeues the job (launch/*.sbatch).
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
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Signal handlers that record a request to stop. A second Ctrl-C exits at once with status 130."""

    def __init__(self, run_folder: Path) -> None:
        """Install the handlers (main thread only) and remove the REQUEUE marker of an earlier start."""
        self.run_folder = Path(run_folder)
        self.requested = False
        self.reason = ""
        self._interrupts = 0
        (self.run_folder / REQUEUE).unlink(missing_ok=True)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(130)
            # Not print: a handler may interrupt a print that holds the stream's lock.
            os.write(2, b"stopping after this step; press Ctrl-C again to exit at once\n")

    def agreed(self, world: World) -> bool:
        """Whether any rank has a request to stop; the same result on all ranks. All ranks must call it."""
        return world.any(self.noticed(world))

    def noticed(self, world: World) -> bool:
        """Whether this rank has a request to stop.

        Only rank 0 looks for the STOP file: one access per step to a shared file system, not one per rank.
        """
        if world.is_main and not self.requested and (self.run_folder / STOP).exists():
            self.requested, self.reason = True, f"the file {STOP}"
        return self.requested

    def leave_requeue_marker(self, world: World) -> None:
        """Write REQUEUE and remove STOP (rank 0), after the checkpoint; otherwise the resumed run would stop again."""
        if world.is_main:
            write_file(self.run_folder / REQUEUE, (self.reason or "stop requested on another rank") + "\n")
            (self.run_folder / STOP).unlink(missing_ok=True)
        world.barrier()
