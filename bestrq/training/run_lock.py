"""Lock of a run folder: one run at a time trains in it."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import platform
import sys
import time
from pathlib import Path

from common.errors import UserError

LOCK = "run.lock"
PATIENCE = 3.0
"""seconds to wait for a process that has been killed and is ending"""
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""errors of file systems without locks"""


class RunLock:
    """Exclusive lock on the file `run.lock`, which names the holder.

    A POSIX record lock: the kernel releases it when the process dies, file servers (NFS) know it, and child processes,
    such as loader workers, do not inherit it. On a file system without locks a warning is printed.

    Raises:
        UserError: another process, possibly on another machine, has the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # closing it would release the lock
        end = time.monotonic() + PATIENCE
        while not self._acquire(folder):
            if time.monotonic() > end:
                holder = self._holder()
                self.release()
                raise UserError(
                    f"the run folder {folder} is in use by {holder}: wait for it or stop it (touch {folder}/STOP), or "
                    "choose another run.folder"
                )
            time.sleep(0.1)
        os.ftruncate(self._descriptor, 0)
        content = {
            "host": platform.node(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        os.pwrite(self._descriptor, json.dumps(content).encode() + b"\n", 0)

    def release(self) -> None:
        os.close(self._descriptor)

    def _acquire(self, folder: Path) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(f"{folder}: the file system has no locks ({error}): do not start a second run", file=sys.stderr)
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _holder(self) -> str:
        """Description of the holder by the content of the file, which may be missing."""
        try:
            value = json.loads(os.pread(self._descriptor, 1000, 0))
            job = f", SLURM job {value['slurm_job']}" if value["slurm_job"] else ""
            return f"process {value['pid']} on {value['host']}{job}, since {value['since']}"
        except (ValueError, KeyError, TypeError, RecursionError):
            return "another process"
