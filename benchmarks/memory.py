"""Memory and processor time of a process and its children, as Linux counts them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path


def family() -> list[int]:
    """Process ids of this process and of its multiprocessing children."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def memory(pids: Sequence[int], field: str) -> int:
    """Sum over processes of a field of /proc/PID/smaps_rollup, in bytes.

    Pss counts shared pages once in total; Pss_Anon excludes the pages of files.
    """
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
    return total


def processor_seconds(pids: Sequence[int]) -> float:
    """User and system time of the processes in seconds, from /proc/PID/stat."""
    fields = (Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split() for pid in pids)
    return sum(int(stat[11]) + int(stat[12]) for stat in fields) / os.sysconf("SC_CLK_TCK")
