"""Results of recordings on disk, as they are computed by several processes: for commands that continue after a stop."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError
from common.files import parse_json
from common.json_checks import Check, count, fields
from common.json_lines import regular_lines


class RecordingLog:
    """Results that all ranks have logged in this and earlier runs, by recording number; they stay on disk.

    Args:
        folder: of the logs, `PREFIX-RANK.jsonl`, with one JSON object per line that has the field `number`.
        prefix: of the logs to read, such as the start of a key of the settings.
        num_recordings: of the dataset.
        check: of a result. Other lines are not results: an interrupted process may have left an incomplete one.
    """

    def __init__(self, folder: Path, prefix: str, num_recordings: int, check: Check) -> None:
        self._paths = sorted(folder.glob(f"{prefix}-*.jsonl"))
        self._place = np.full((num_recordings, 2), -1, np.int64)  # file, byte
        for number, path in enumerate(self._paths):
            offset = 0
            for line in regular_lines(path):
                with suppress(UserError):
                    result = parse_json(line, path)
                    fields({"number": count})(result, str(path))
                    check(result, str(path))
                    if result["number"] < num_recordings:
                        self._place[result["number"]] = number, offset
                offset += len(line)

    def has(self, recording: int) -> bool:
        return bool(self._place[recording, 0] >= 0)

    def __getitem__(self, recording: int) -> dict[str, Any]:
        """Last result of a recording. Raises KeyError if there is none."""
        number, offset = self._place[recording].tolist()
        if number < 0:
            raise KeyError(recording)
        with open(self._paths[number], "rb") as file:
            file.seek(offset)
            result: dict[str, Any] = parse_json(file.readline(), self._paths[number])
        return result


def open_log(path: Path) -> BinaryIO:
    """Open an unbuffered log file for appending, and terminate an incomplete last line."""
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 - the caller closes it
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file
