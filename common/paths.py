"""Different spellings of one path."""

from __future__ import annotations

import os


def canonical_path(path: str) -> str:
    """Absolute path without links, `~` and trailing slash. URLs and "" are returned unchanged."""
    return path if not path or "://" in path else os.path.realpath(os.path.expanduser(path))
