"""Timeouts of tests, long enough that only a hang exceeds them."""

import time
from collections.abc import Callable

PATIENCE = 600.0
"""seconds; far above the time on a loaded machine"""


def wait_until(condition: Callable[[], object], message: Callable[[], str] = lambda: "", pause: float = 0.01) -> None:
    """Return when the condition holds. Raises AssertionError with `message()` if it does not within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(pause)
