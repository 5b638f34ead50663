"""Recordings that cannot be used: what is kept of them, on the disk and on the screen.

DIR/skipped.jsonl            {"id": ..., "reason": ...} a line; not there when nothing was skipped
DIR/skipped-NNNNN.jsonl      of a part, until the parts are merged
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data.index import replace_file

SKIPPED_FILE = "skipped.jsonl"
_REASONS_SHOWN = 10


@dataclass(frozen=True)
class Skipped:
    """A recording that cannot be used."""

    id: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its numbers and the file's name (before the last colon), so the same for many."""
        return re.sub(r"\d+", "N", re.sub(r"^\S.*?: (?=\S)", "", self.reason))


def skipped_path(folder: Path, part: int, parts: int) -> Path:
    """Where a part's list belongs."""
    return folder / (SKIPPED_FILE if parts == 1 else f"skipped-{part:05d}.jsonl")


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """Write the list; no file when nothing was skipped."""
    lines = [json.dumps(asdict(item), ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for item in skipped]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with replace_file(path) as file:
        file.writelines(lines)


def merge_skipped(folder: Path) -> None:
    """Make one list of those of all parts, in their order. May be killed at any time, and called again."""
    parts = sorted(folder.glob("skipped-*.jsonl"))
    # The list has its name only when it is whole: from then on the parts are leftovers.
    if parts and not (folder / SKIPPED_FILE).is_file():
        # Where a part has gone, another process is merging too, and has the whole list already.
        with suppress(FileNotFoundError), replace_file(folder / SKIPPED_FILE) as file:
            for part in parts:
                file.write(part.read_bytes())
    for part in parts:
        part.unlink(missing_ok=True)


def summary(skipped: Sequence[Skipped], path: Path) -> str:
    """The reasons, commonest first, each with a count and an example."""
    groups = Counter(item.kind for item in skipped)
    examples = {item.kind: item for item in reversed(skipped)}
    lines = [f"prepare: skipped {len(skipped)} recordings, listed in {path}"]
    for kind, count in groups.most_common(_REASONS_SHOWN):
        lines.append(f"  {count} like {examples[kind].id}: {examples[kind].reason}")
    return "\n".join(lines)
