"""Death of a process at an operation on files, for tests of crashes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

KILLED = 77
"""exit status of a process that died"""
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
"""audit events of operations that change files, besides opening one for writing"""


class FileOperations:
    """Counter of the operations in a folder that change files; the process dies before number `fatal`, from 0."""

    def __init__(self, folder: Path, fatal: int) -> None:
        self.folder, self.fatal, self.count = str(folder), fatal, 0

    def watch(self) -> None:
        """Count all operations of this process from now on; cannot be undone."""
        sys.addaudithook(self._on_event)

    def tick(self) -> None:
        """Count one operation."""
        if self.count == self.fatal:
            os._exit(KILLED)
        self.count += 1

    def _on_event(self, event: str, details: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and str(details[0]).startswith(self.folder):
            self.tick()
