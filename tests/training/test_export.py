"""Exports: reading returns the written content, and damage is an error that names the file."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bestrq.training import export as export_module
from bestrq.training.export import write_export
from bestrq.training.export_reading import read_export
from common.errors import UserError
from tests.paths import REPOSITORY
from tests.patience import wait_until


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    shared = torch.full((3, 2), value)
    half = torch.ones(2, dtype=torch.bfloat16)
    return {"a": shared, "b": shared.t(), "same": shared, "half": half, "count": torch.tensor(7)}


def test_an_export_reads_back_bit_for_bit_with_its_files(tmp_path: Path) -> None:
    write_export(tmp_path / "runs" / "export", tensors(), {"dim": 3}, "# Card\n", {"tokenizer.json": b"{}"})
    export = read_export(tmp_path / "runs" / "export")
    assert export.tensors.keys() == tensors().keys() and export.config == {"dim": 3}
    assert all(torch.equal(export.tensors[name], tensor) for name, tensor in tensors().items())
    assert export.file("tokenizer.json") == b"{}" and export.file("README.md") == b"# Card\n"
    with pytest.raises(UserError, match=r"words\.txt"):
        export.file("words.txt")


def test_an_export_is_read_from_within_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_export(tmp_path / "runs/export", tensors(), {"kind": "test"}, "card")
    monkeypatch.chdir(tmp_path / "runs/export")
    for folder in (".", "./", "", "../export", "../../runs/./export/"):
        assert read_export(folder).config == {"kind": "test"}


def test_a_new_export_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_export(tmp_path / "export", tensors(1.0), {}, "old", {"old.txt": b""})
    write_export(tmp_path / "export", tensors(2.0), {}, "new")
    assert float(read_export(tmp_path / "export").tensors["a"][0, 0]) == 2.0
    assert sorted(os.listdir(tmp_path)) == ["export"]
    assert sorted(os.listdir(tmp_path / "export")) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_replacement_leaves_the_old_export_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write_export(tmp_path / "export", tensors(1.0), {}, "old")
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(export_module.os, "rename", rename)
    with pytest.raises(UserError, match="No space left"):
        write_export(tmp_path / "export", tensors(2.0), {}, "new")
    monkeypatch.undo()
    assert float(read_export(tmp_path / "export").tensors["a"][0, 0]) == 1.0
    assert os.listdir(tmp_path) == ["export"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Readers change nothing; the next export does."""
    write_export(tmp_path / "export", tensors(1.0), {}, "old", {"tokenizer.json": b"{}"})
    os.rename(tmp_path / "export", tmp_path / ".old-export")
    export = read_export(tmp_path / "export")
    assert float(export.tensors["a"][0, 0]) == 1.0 and export.file("tokenizer.json") == b"{}"
    assert os.listdir(tmp_path) == [".old-export"]
    write_export(tmp_path / "export", tensors(2.0), {}, "new")
    assert os.listdir(tmp_path) == ["export"]


def test_readers_get_one_version_of_an_export_that_is_being_replaced(tmp_path: Path) -> None:
    """Weights and config with the same number, and no error on either side."""
    code = (
        "import sys, torch\nfrom bestrq.training.export import write_export\n"
        "for number in range(1000000):\n"
        "    write_export(sys.argv[1], {'a': torch.full((4,), float(number))}, {'number': number}, 'card')\n"
    )
    folder = tmp_path / "export"
    writer = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, stderr=subprocess.PIPE)
    try:
        wait_until(folder.exists)
        numbers = []
        while len(set(numbers)) < 50:
            assert writer.poll() is None, writer.stderr and writer.stderr.read()
            export = read_export(folder)
            assert bool((export.tensors["a"] == export.config["number"]).all())
            numbers.append(export.config["number"])
    finally:
        writer.kill()
        writer.wait()
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_is_noticed(name: str, tmp_path: Path) -> None:
    write_export(tmp_path / "export", tensors(), {}, "card", {"tokenizer.json": b"{}"})
    path = tmp_path / "export" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*checksum.*export again"):
        read_export(tmp_path / "export")


def test_an_export_of_an_earlier_version_has_no_checksums_and_its_settings_may_be_edited(tmp_path: Path) -> None:
    write_export(tmp_path / "export", tensors(), {"dim": 3}, "card")
    path = tmp_path / "export" / "config.json"
    assert json.loads(path.read_text())["checksums"].keys() == {"model.safetensors"}
    path.write_text('{"dim": 4}')
    assert read_export(tmp_path / "export").config == {"dim": 4}


@pytest.mark.parametrize("checksums", [{"none": 1}, {"../secret": 1}, [1]])
def test_wrong_checksums_are_refused(checksums: object, tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    write_export(tmp_path / "export", tensors(), {}, "card")
    (tmp_path / "export" / "config.json").write_text(json.dumps({"checksums": checksums}))
    with pytest.raises(UserError, match=r"config\.json"):
        read_export(tmp_path / "export")


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    write_export(tmp_path / "export", {**tensors(), "bad": torch.tensor([1.0, math.nan])}, {}, "card")
    with pytest.raises(UserError, match=r"model\.safetensors: bad has non-finite weights"):
        read_export(tmp_path / "export")


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.sentinel,))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["remove", "cut", "pickle"])
def test_a_missing_or_damaged_file_is_named_and_a_pickle_does_not_run(tmp_path: Path, file: str, damage: str) -> None:
    write_export(tmp_path / "export", tensors(), {"dim": 3}, "card")
    path = tmp_path / "export" / file
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4] if damage == "cut" else pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        read_export(tmp_path / "export")
    assert not (tmp_path / "ran").exists()


def test_no_export_and_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no export at"):
        read_export(tmp_path / "none")
    for name in ("../x", "/x", "a/b", "", "..", "config.json"):
        with pytest.raises(UserError, match="plain name"):
            write_export(tmp_path / "export", tensors(), {}, "card", {name: b""})
    assert list(tmp_path.iterdir()) == []
