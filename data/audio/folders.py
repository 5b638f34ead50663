"""Recursive search of a folder for files: audio, transcripts, word times.

Clutter is ignored: names with a leading dot (`._x.wav` of macOS, `.cache`, `.ipynb_checkpoints`, `.DS_Store`) and
those in CLUTTER. The searched folder itself may have any name.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

CLUTTER = frozenset(("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir"))


def is_clutter(name: str) -> bool:
    """True if a file or folder of this name was made by a system or tool, not by the user."""
    return name.startswith(".") or name.lower() in CLUTTER


@dataclass(frozen=True)
class FileList:
    """Result of a search for files."""

    files: list[Path] = field(default_factory=list)
    """Sorted. Those below a linked folder have the link's path."""
    unread: dict[Path, str] = field(default_factory=dict)
    """Skipped paths with the reason: broken links, pipes, folders that cannot be listed, and links to a folder that is
    read under another path or contains the searched one."""


def files_below(root: Path) -> FileList:
    """Find all files below a folder, including linked folders; each folder is read once.

    A folder below `root` has its own path in the result, any other folder the path of the first link to it.
    """
    result = FileList()
    seen: dict[tuple[int, int], Path] = {}
    above = {_identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    links: deque[Path] = deque()
    _walk(root, result, seen, links)
    while links:
        link = links.popleft()
        try:
            identity = _identity(link)
        except OSError as error:
            result.unread[link] = f"cannot be followed ({error.strerror or error})"
            continue
        if identity in seen:
            result.unread[link] = f"a link to a folder that is read as {seen[identity]}"
        elif identity in above:
            result.unread[link] = f"a link to a folder that contains {root}"
        else:
            _walk(link, result, seen, links)
    result.files.sort()
    return result


def _walk(top: Path, result: FileList, seen: dict[tuple[int, int], Path], links: deque[Path]) -> None:
    """Add the files below a folder to `result`, and its linked folders to `links`."""
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            identity = _identity(folder)
            if identity in seen:  # already reached through another link
                continue
            seen[identity] = folder
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            result.unread[folder] = f"a folder that cannot be listed ({error.strerror or error})"
            continue
        for entry in entries:
            path = folder / entry.name
            if is_clutter(entry.name):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_dir():
                    links.append(path)
                elif entry.is_file():
                    result.files.append(path)
                elif entry.is_symlink() and not path.exists():
                    result.unread[path] = f"a broken link ({os.readlink(path)})"
                else:
                    result.unread[path] = "not a regular file"
            except OSError as error:  # circular links
                result.unread[path] = f"cannot be followed ({error.strerror or error})"


def _identity(folder: Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino
