"""Writing of checkpoints and exports in a thread, while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from bestrq.training.process import World
from common.errors import UserError

LONGEST = 3600.0
"""seconds that rank 0 waits for the files of other ranks, unless they have ended their writing before"""
VISIBLE = 120.0
"""seconds until a file that a rank has written is visible on every machine (caches of network file systems)"""


class BackgroundWriter:
    """Writes in a thread, in the order of their submission, while training goes on; most are those of rank 0.

    The writes of at most one step are under way, so that there is memory for them and a failure is noticed. All ranks
    must call `begin`, `wait` and `close`.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.others_until = 0.0
        """time.monotonic() until which rank 0 waits for files of other ranks"""
        self._thread = ThreadPoolExecutor(1, "writer")
        self._writes: list[Future[None]] = []
        self._step: int | None = None

    def begin(self, step: int) -> None:
        """Wait for the writes of an earlier step, before copies are made for those of `step`. Raises like `wait`."""
        if step != self._step:
            self.wait()
            self._step = step
        self.others_until = time.monotonic() + LONGEST

    def submit(self, write: Callable[..., object], *arguments: Any, **named: Any) -> None:
        """Add a write of rank 0; it is left out if one before it fails. Does nothing on other ranks."""
        if self.world.is_main:
            self.submit_here(write, *arguments, **named)

    def submit_here(self, write: Callable[..., object], *arguments: Any, **named: Any) -> None:
        """Add a write of this rank; it is left out if one before it fails."""

        def run(before: list[Future[None]]) -> None:
            if not any(future.exception() for future in before):
                write(*arguments, **named)

        self._writes.append(self._thread.submit(run, list(self._writes)))

    def wait(self) -> None:
        """Wait for all writes. Raises UserError on all ranks if one failed because of the disk."""
        # Rank 0 may be waiting for files of the others. This collective fails at once if one of them has died, and
        # after it no more files come.
        problems = self.world.gather(None if self.world.is_main else self._problem())
        failed = [problem for problem in problems if problem is not None]
        self.others_until = time.monotonic() + (0.0 if failed else VISIBLE)
        if self.world.is_main and (problem := self._problem()) is not None:
            failed.append(problem)
        if (problem := self.world.broadcast(failed[0] if failed else None)) is not None:
            raise UserError(problem)

    def _problem(self) -> str | None:
        writes, self._writes = self._writes, []
        try:
            for write in writes:
                write.result()
        except UserError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Wait for all writes and end the thread. Raises like `wait`."""
        self.wait()
        self._thread.shutdown()
