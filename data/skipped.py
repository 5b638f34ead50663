"""Recordings that cannot be used, and those used without something: what is kept of both, on the disk and the screen.

DIR/skipped.jsonl            {"id": ..., "reason": ...} a line; not there when nothing was skipped
DIR/remarks.jsonl            the same for recordings that are in the dataset, but without their word times, say
DIR/skipped-NNNNN.jsonl, DIR/remarks-NNNNN.jsonl    of a part, until the parts are merged
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.index import replace_file
from data.names import escaped

SKIPPED, REMARKS = "skipped", "remarks"
SKIPPED_FILE = f"{SKIPPED}.jsonl"
NO_WORD_TIMES = "kept without word times"
"""Begins the remark on a recording whose word times cannot be used."""
_REASONS_SHOWN = 10


@dataclass(frozen=True)
class Skipped:
    """A recording that cannot be used; as a remark, what it is used without."""

    id: str
    reason: str
    listed: bool = False
    """Seen when the corpus was listed, so none of its recordings: it does not count in max_skipped_share."""

    @property
    def kind(self) -> str:
        """The reason without its numbers and the file's name (before the last colon), so the same for many."""
        return re.sub(r"\d+", "N", re.sub(rf"^(?:{NO_WORD_TIMES}: )?\S.*?: (?=\S)", "", self.reason))


def skipped_path(folder: Path, part: int, parts: int, name: str = SKIPPED) -> Path:
    """Where a part's list belongs. `name`: SKIPPED or REMARKS, here and below."""
    return folder / (f"{name}.jsonl" if parts == 1 else f"{name}-{part:05d}.jsonl")


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """Write the list; no file when nothing was skipped."""
    lines = [_line(item) for item in skipped]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with replace_file(path) as file:
        file.writelines(lines)


def _line(item: Skipped) -> bytes:
    fields = {"id": escaped(item.id), "reason": escaped(item.reason)}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


class Remarks:
    """The remarks of a part. Each is on the disk before its recording may be, so that a kill loses none.

    Args:
        path: of the list; what it holds of the recordings in `done`, by a preparation that was stopped, is kept.
    """

    def __init__(self, path: Path, done: Container[str]) -> None:
        self.path = path
        self.items = [item for item in read_skipped(path) if item.id in done]
        write_skipped(path, self.items)

    def add(self, id: str, remarks: Iterable[str]) -> None:
        """Raises DataError where the list cannot be written."""
        new = [Skipped(id, remark) for remark in remarks]
        if not new:
            return
        try:
            with open(self.path, "ab") as file:
                file.writelines(map(_line, new))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error}); free some space and run again") from error
        self.items += new


def read_skipped(path: Path) -> list[Skipped]:
    """A list that is there, without a line that was cut off; empty where there is none."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            fields = json.loads(line)
            found.append(Skipped(fields["id"], fields["reason"]))
    return found


def merge_skipped(folder: Path, name: str = SKIPPED) -> None:
    """Make one list of those of all parts, in their order. May be killed at any time, and called again."""
    parts = sorted(folder.glob(f"{name}-*.jsonl"))
    whole = folder / f"{name}.jsonl"
    # The list has its name only when it is whole: from then on the parts are leftovers.
    if parts and not whole.is_file():
        # Where a part has gone, another process is merging too, and has the whole list already.
        with suppress(FileNotFoundError), replace_file(whole) as file:
            for part in parts:
                file.write(part.read_bytes())
    for part in parts:
        part.unlink(missing_ok=True)


def summary(items: Sequence[Skipped], path: Path, said: str = "skipped {} recordings") -> str:
    """The reasons, commonest first, each with a count and an example. `said` of how many."""
    groups = Counter(item.kind for item in items)
    examples = {item.kind: item for item in reversed(items)}
    lines = [f"prepare: {said.format(len(items))}, listed in {path}"]
    for kind, count in groups.most_common(_REASONS_SHOWN):
        lines.append(f"  {count} like {escaped(examples[kind].id)}: {escaped(examples[kind].reason)}")
    return "\n".join(lines)
