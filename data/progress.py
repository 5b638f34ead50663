"""What a long preparation shows, and how it is stopped."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Interrupts:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt: once, and never in the middle of a write to the dataset."""

    def __init__(self) -> None:
        self.holding = self.raised = self.pending = False

    def __enter__(self) -> Interrupts:
        self.handlers = {number: signal.signal(number, self._arrived) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that arrives inside of the block takes effect at its end."""
        self.holding = True
        yield
        self.holding = False
        if self.pending:
            self._arrived()

    def _arrived(self, *_: object) -> None:
        self.pending = True
        if not self.holding and not self.raised:
            self.raised = True  # a second one must not disturb the closing of the last shard
            raise KeyboardInterrupt


class Progress:
    """Recordings done, audio-hours and speed: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.seconds = 0.0
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(total=total, desc="prepare", unit=" rec", disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        print(f"prepare: {self}", flush=True)

    def __str__(self) -> str:
        speed = self.seconds / max(time.monotonic() - self.started, 1e-3)
        return f"{self.done}/{self.total} recordings, {self.seconds / 3600:.2f} audio-hours, {speed:.0f} x real time"

    def update(self, seconds: float) -> None:
        """One more recording, of so many seconds."""
        self.done += 1
        self.seconds += seconds
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.set_postfix_str(str(self).split(", ", 1)[1], refresh=False)
            self.bar.update()
        elif now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(f"prepare: {self}", flush=True)
