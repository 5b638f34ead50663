"""End of a process with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def stop_with_parent(parent: int) -> bool:
    """Let the kernel send SIGTERM to this process when its parent dies, SIGKILL included; Linux only.

    Args:
        parent: process id of the parent.

    Returns:
        False if it is dead already: then no signal will come.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    return os.getppid() == parent
