"""Writing of checkpoints and exports in a thread, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from bestrq.training.process import World
from common.errors import UserError


class BackgroundWriter:
    """Writes of rank 0, in a thread and in the order of their submission, while training goes on.

    The writes of at most one step are under way, so that there is memory for them and a failure is noticed. All ranks
    must call `begin`, `wait` and `close`.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._thread = ThreadPoolExecutor(1, "writer")
        self._writes: list[Future[None]] = []
        self._step: int | None = None

    def begin(self, step: int) -> None:
        """Wait for the writes of an earlier step, before copies are made for those of `step`. Raises like `wait`."""
        if step != self._step:
            self.wait()
            self._step = step

    def submit(self, write: Callable[..., object], *arguments: Any, **named: Any) -> None:
        """Add a write; it is left out if one before it fails. Does nothing on other ranks than 0."""

        def run(before: list[Future[None]]) -> None:
            if not any(future.exception() for future in before):
                write(*arguments, **named)

        if self.world.is_main:
            self._writes.append(self._thread.submit(run, list(self._writes)))

    def wait(self) -> None:
        """Wait for all writes. Raises UserError on all ranks if one failed because of the disk."""
        problem, writes, self._writes = None, self._writes, []
        try:
            for write in writes:
                write.result()
        except UserError as error:
            problem = str(error)
        if (problem := self.world.broadcast(problem)) is not None:
            raise UserError(problem)

    def close(self) -> None:
        """Wait for all writes and end the thread. Raises like `wait`."""
        self.wait()
        self._thread.shutdown()
