"""Progress display of a preparation, and its interruption by signals."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_REASONS_SHOWN = 3
_REASON_LENGTH = 40
_BAR = "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}"


class Interrupts:
    """Handler of Ctrl-C and SIGTERM: raises KeyboardInterrupt once, and never during a write to the dataset."""

    def __init__(self) -> None:
        self.holding = self.raised = self.pending = False

    def __enter__(self) -> Interrupts:
        self.handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals that arrive within the block until its end."""
        self.holding = True
        yield
        self.holding = False
        if self.pending:
            self._handle()

    def _handle(self, *_: object) -> None:
        self.pending = True
        if not self.holding and not self.raised:
            self.raised = True  # a second signal must not disturb the closing of the last shard
            raise KeyboardInterrupt


class Progress:
    """Recordings, hours of audio, speed, time left, skipped recordings by reason and warnings.

    Shown as a bar on a terminal, otherwise as lines.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.seconds = 0.0
        self.skipped: Counter[str] = Counter()
        self.warnings = 0
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total,
            desc="prepare",
            disable=not sys.stderr.isatty(),
            leave=False,
            bar_format=_BAR,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self._print_line()

    def __str__(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-3)
        items = [f"{self.seconds / 3600:.2f} audio-hours", f"{self.seconds / elapsed:.0f} x real time"]
        if 0 < self.done < self.total:
            left = timedelta(seconds=round(elapsed * (self.total - self.done) / self.done))
            items.append(f"{left} left")
        if self.skipped:
            reasons = [f"{count} {_shortened(reason)}" for reason, count in self.skipped.most_common(_REASONS_SHOWN)]
            more = len(self.skipped) - len(reasons)
            reasons += [f"{more} other reasons"] if more > 0 else []
            items.append(f"{self.skipped.total()} skipped ({'; '.join(reasons)})")
        if self.warnings:
            items.append(f"{self.warnings} warnings")
        return ", ".join(items)

    def update(self, seconds: float) -> None:
        """Count a prepared recording of this length."""
        self.seconds += seconds
        self._advance()

    def skip(self, reason: str) -> None:
        """Count a skipped recording."""
        self.skipped[reason] += 1
        self._advance()

    def _advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.set_postfix_str(str(self), refresh=False)
            self.bar.update()
        elif now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            self._print_line()

    def _print_line(self) -> None:
        print(f"prepare: {self.done}/{self.total} recordings, {self}", flush=True)


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _REASON_LENGTH else reason[: _REASON_LENGTH - 3] + "..."
