"""Lists of skipped recordings, and of warnings about recordings that are kept.

DIR/skipped.jsonl            {"id": ..., "reason": ...} per line, for skipped recordings; no file if none was skipped
DIR/warnings.jsonl           the same for recordings in the dataset, for example those with unusable word times
DIR/skipped-NNNNN.jsonl      list of a part, until the parts are merged; likewise DIR/warnings-NNNNN.jsonl
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.files import replace_file
from common.json_lines import read_json_lines
from data.names import escaped

_List = Literal["skipped", "warnings"]
NO_WORD_TIMES = "kept without word times"
"""Prefix of the warning about unusable word times."""
_REASONS_SHOWN = 10


@dataclass(frozen=True)
class Skipped:
    """Entry of a list: a recording with the reason."""

    id: str
    reason: str
    listed: bool = False
    """Unreadable row or file found when the corpus was listed: not counted in max_skipped_share."""

    @property
    def kind(self) -> str:
        """Reason without numbers and the file name (before the last colon), to group similar entries."""
        return re.sub(r"\d+", "N", re.sub(rf"^(?:{NO_WORD_TIMES}: )?\S.*?: (?=\S)", "", self.reason))


def list_path(folder: Path, name: _List, part: int, parts: int) -> Path:
    """Path of the list of a part."""
    return folder / (f"{name}.jsonl" if parts == 1 else f"{name}-{part:05d}.jsonl")


def write_list(path: Path, items: Iterable[Skipped]) -> None:
    """Write a list; an empty one removes the file."""
    lines = [_line(item) for item in items]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with replace_file(path) as file:
        file.writelines(lines)


def _line(item: Skipped) -> bytes:
    fields = {"id": escaped(item.id), "reason": escaped(item.reason)}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


class Warnings:
    """Warnings of a part. Each is written before its recording, so that a killed process loses none.

    Args:
        path: of the list; its existing warnings about recordings in `done` are kept.
    """

    def __init__(self, path: Path, done: Container[str]) -> None:
        self.path = path
        self.items = read_list(path, done)
        write_list(path, self.items)

    def add(self, id: str, reasons: Iterable[str]) -> None:
        """Append to the list. Raises UserError if it cannot be written."""
        new = [Skipped(id, reason) for reason in reasons]
        if not new:
            return
        try:
            with open(self.path, "ab") as file:
                file.writelines(map(_line, new))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error}); free some space and run again") from error
        self.items += new


def read_list(path: Path, ids: Container[str]) -> list[Skipped]:
    """Entries of a list with one of these ids, without truncated lines; empty if there is no list."""
    items = []
    for fields in read_json_lines(path) if path.is_file() else ():
        id, reason = fields.get("id"), fields.get("reason")
        if isinstance(id, str) and isinstance(reason, str) and id in ids:
            items.append(Skipped(id, reason))
    return items


def merge_lists(folder: Path) -> None:
    """Merge the lists of all parts, in order. May be interrupted at any time and called again."""
    for name in ("skipped", "warnings"):
        merged, parts = folder / f"{name}.jsonl", sorted(folder.glob(f"{name}-*.jsonl"))
        # An existing merged list is complete, so the lists of the parts are leftovers.
        if parts and not merged.is_file():
            # If a part is missing, another process has merged the lists already.
            with suppress(FileNotFoundError), replace_file(merged) as file:
                for part in parts:
                    file.write(part.read_bytes())
        for part in parts:
            part.unlink(missing_ok=True)


def summary(title: str, items: Sequence[Skipped], path: Path) -> str:
    """Text with the reasons, most frequent first, each with a count and an example."""
    groups = Counter(item.kind for item in items)
    examples = {item.kind: item for item in reversed(items)}
    lines = [f"prepare: {title}, listed in {path}"]
    for kind, count in groups.most_common(_REASONS_SHOWN):
        lines.append(f"  {count} like {escaped(examples[kind].id)}: {escaped(examples[kind].reason)}")
    return "\n".join(lines)
