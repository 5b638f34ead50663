"""What a long preparation shows, and how it is stopped."""

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
    """Recordings, audio-hours, speed, time left, skipped by reason, warnings: a bar on a terminal, elsewhere lines."""

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
        print(f"prepare: {self.done}/{self.total} recordings, {self}", flush=True)

    def __str__(self) -> str:
        passed = max(time.monotonic() - self.started, 1e-3)
        said = [f"{self.seconds / 3600:.2f} audio-hours", f"{self.seconds / passed:.0f} x real time"]
        if 0 < self.done < self.total:
            left = timedelta(seconds=round(passed * (self.total - self.done) / self.done))
            said.append(f"{left} left")
        if self.skipped:
            reasons = [f"{count} {_shortened(reason)}" for reason, count in self.skipped.most_common(_REASONS_SHOWN)]
            more = len(self.skipped) - len(reasons)
            reasons += [f"{more} other reasons"] if more > 0 else []
            said.append(f"{self.skipped.total()} skipped ({'; '.join(reasons)})")
        if self.warnings:
            said.append(f"{self.warnings} warnings")
        return ", ".join(said)

    def update(self, seconds: float) -> None:
        """One more recording, of so many seconds."""
        self.seconds += seconds
        self._one_more()

    def skip(self, reason: str) -> None:
        """One more recording, which cannot be used."""
        self.skipped[reason] += 1
        self._one_more()

    def _one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.set_postfix_str(str(self), refresh=False)
            self.bar.update()
        elif now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(f"prepare: {self.done}/{self.total} recordings, {self}", flush=True)


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _REASON_LENGTH else reason[: _REASON_LENGTH - 3] + "..."
