"""Reading of JSON files that are no files, too large, or no JSON."""

import os
from pathlib import Path

import pytest

from common import files
from common.errors import UserError
from common.files import read_json


def test_a_pipe_a_device_and_a_folder_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            read_json(tmp_path / name)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    (tmp_path / "large.json").write_bytes(b" " * (1 << 20) + b"1")
    with pytest.raises(UserError, match=r"large\.json: not a regular file of at most 1 MiB"):
        read_json(tmp_path / "large.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"NULL"])
def test_other_content_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.json: not JSON"):
        read_json(tmp_path / "bad.json")
