"""Recordings that cannot be used, or that may not be what they should be: the lists on the disk and on the screen.

DIR/skipped.jsonl            {"id": ..., "reason": ...} a line, of recordings left out; not there when there are none
DIR/warnings.jsonl           the same of recordings that are in the dataset
DIR/skipped-NNNNN.jsonl      of a part, until the parts are merged; so, too, DIR/warnings-NNNNN.jsonl
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data.index import replace_file

_List = Literal["skipped", "warnings"]
_REASONS_SHOWN = 10


@dataclass(frozen=True)
class Skipped:
    """A recording and why it is listed."""

    id: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its numbers and the file's name (before the last colon), so the same for many."""
        return re.sub(r"\d+", "N", re.sub(r"^\S.*?: (?=\S)", "", self.reason))


def list_path(folder: Path, name: _List, part: int, parts: int) -> Path:
    """Where a part's list belongs."""
    return folder / (f"{name}.jsonl" if parts == 1 else f"{name}-{part:05d}.jsonl")


def write_list(path: Path, items: Iterable[Skipped]) -> None:
    """Write the list; no file when it is empty."""
    lines = [json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n" for item in items]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with replace_file(path) as file:
        file.writelines(lines)


def read_list(path: Path, ids: Container[str]) -> list[Skipped]:
    """Those of the list that have one of these ids; none where there is no list."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [item for item in (Skipped(**json.loads(line)) for line in lines) if item.id in ids]


def merge_lists(folder: Path) -> None:
    """Make one list of those of all parts, in their order. May be killed at any time, and called again."""
    for name in ("skipped", "warnings"):
        whole, parts = folder / f"{name}.jsonl", sorted(folder.glob(f"{name}-*.jsonl"))
        # The list has its name only when it is whole: from then on the parts are leftovers.
        if parts and not whole.is_file():
            # Where a part has gone, another process is merging too, and has the whole list already.
            with suppress(FileNotFoundError), replace_file(whole) as file:
                for part in parts:
                    file.write(part.read_bytes())
        for part in parts:
            part.unlink(missing_ok=True)


def summary(what: str, items: Sequence[Skipped], path: Path) -> str:
    """The reasons, commonest first, each with a count and an example."""
    groups = Counter(item.kind for item in items)
    examples = {item.kind: item for item in reversed(items)}
    lines = [f"prepare: {what}, listed in {path}"]
    for kind, count in groups.most_common(_REASONS_SHOWN):
        lines.append(f"  {count} like {examples[kind].id}: {examples[kind].reason}")
    return "\n".join(lines)
