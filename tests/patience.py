"""Timeouts of tests, so long that only a hang reaches them."""

import time
from collections.abc import Callable

PATIENCE = 1200.0
"""seconds; far more than a loaded machine needs"""


def wait_until(condition: Callable[[], object], what: Callable[[], str] = lambda: "", pause: float = 0.01) -> None:
    """Return once the condition holds. Raises AssertionError with `what()` when it does not within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(pause)
