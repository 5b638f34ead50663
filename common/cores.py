"""Number of CPU cores."""

import os


def available_cores() -> int:
    """CPU cores that this process may use; all cores on systems without CPU affinity, such as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
