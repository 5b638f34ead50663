"""Requests to stop a run between two optimizer steps: signals, Ctrl-C included, or a file named STOP in the run folder.

The training loop adds up `noticed` over all ranks at the start of every step, so that all of them stop before the same
step; a rank whose loader has no data asks `noticed_while_waiting`. At a stop, the script saves a checkpoint, calls
`leave_requeue_marker` and exits with status 0; the batch script then finds the marker and requeues the job
(launch/*.sbatch).
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

    def __init__(self, run_folder: Path, world: World) -> None:
        """Install the handlers (main thread only) and remove the REQUEUE marker of an earlier start."""
        self.run_folder, self.world = Path(run_folder), world
        self.requested = False
        self.reason = ""
        self._interrupts = 0
        self._file = str(self.run_folder / STOP)  # once: a path object takes longer than the look
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

    def noticed(self) -> bool:
        """Whether this rank has a request to stop.

        Only rank 0 looks for the STOP file: one access per step to a shared file system, not one per rank.
        """
        return self._noticed(look_for_file=self.world.is_main)

    def noticed_while_waiting(self) -> bool:
        """The same on a rank without data for the next step: it looks for the file itself, as rank 0 waits for it."""
        return self._noticed(look_for_file=True)

    def _noticed(self, look_for_file: bool) -> bool:
        if look_for_file and not self.requested and os.path.exists(self._file):
            self.requested, self.reason = True, f"the file {STOP}"
        return self.requested

    def leave_requeue_marker(self) -> None:
        """Write REQUEUE and remove STOP (rank 0), after the checkpoint; otherwise the resumed run would stop again."""
        if self.world.is_main:
            write_file(self.run_folder / REQUEUE, (self.reason or "stop requested on another rank") + "\n")
            (self.run_folder / STOP).unlink(missing_ok=True)
        self.world.barrier()
