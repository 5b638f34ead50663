"""Search of folders: clutter is ignored, linked folders are followed once."""

import os
from pathlib import Path

import pytest
from corpora_speech import FEATURES, encoded, put

from common.errors import UserError
from data.audio.files import find_audio, list_audio
from data.audio.folders import files_below
from data.corpora.base import Unreadable
from data.corpora.folder import FolderSettings, sources
from data.corpora.text_files import listed_names
from data.format.dataset import open_dataset
from data.prepare.prepare import main
from pipelines.evaluation_settings import stm_files

LEFT_BEHIND = [
    "._a.wav", ".DS_Store", "Thumbs.db", "sub/._b.wav", "sub/Thumbs.db", ".cache/huggingface/x.wav",
    ".ipynb_checkpoints/a-checkpoint.wav", "__MACOSX/a.wav", "__MACOSX/._a.wav", ".git/x.flac", "sub/.hidden/y.wav",
    "@eaDir/a.wav", ".Trash-0/files/z.wav",
]  # fmt: skip


def names(root: Path) -> list[str]:
    found = files_below(root)
    assert found.files == sorted(found.files)
    return [path.relative_to(root).as_posix() for path in found.files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recordings with transcripts in a folder that is itself hidden."""
    folder = tmp_path / ".data/speech"
    for name in ("a", "sub/b"):
        put(folder / f"{name}.wav", encoded("guten tag", "wav", "de"))
        put(folder / f"{name}.txt", "guten tag")
    return folder


def listed(folder: Path, **more: object) -> dict[str, str]:
    """Reason by id of every unreadable file, '' for a recording."""
    found = sources(FolderSettings(folder=str(folder), **more))  # type: ignore[arg-type]
    return {source.id: source.reason if isinstance(source, Unreadable) else "" for source in found}


def test_clutter_is_ignored_at_any_depth(folder: Path) -> None:
    for name in LEFT_BEHIND:
        put(folder / name, b"no audio")
    put(folder / "talk.stm", "a 1 s 0 1 x\n")
    put(folder / "._talk.stm", b"\x00\x05\x16\x07")
    assert names(folder) == ["a.txt", "a.wav", "sub/b.txt", "sub/b.wav", "talk.stm"]
    assert listed(folder) == {"a": "", "sub/b": ""}
    assert [file.name for file in list_audio(str(folder), "")] == ["a", "sub/b"]
    assert find_audio(str(folder), ["a", "b"]) == {"a": folder / "a.wav", "b": folder / "sub/b.wav"}
    with pytest.raises(UserError, match="no audio file is named"):
        find_audio(str(folder), ["._a", "x", "z"])
    assert listed_names(folder) == {"a.txt", "a.wav", "sub", "talk.stm"}
    assert stm_files(str(folder)) == [folder / "talk.stm"]
    assert [file.path for file in list_audio(str(folder / "._a.wav"), "")] == [folder / "._a.wav"]  # named by the user


def test_linked_folders_are_followed_once_and_circles_end(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk2"
    put(elsewhere / "deep/c.wav", encoded("guten tag", "wav", "de"))
    put(elsewhere / "deep/c.txt", "guten tag")
    (folder / "more").symlink_to(elsewhere)
    (elsewhere / "deep/back").symlink_to(elsewhere)  # a circle
    (elsewhere / "home").symlink_to(folder)
    (folder / "again").symlink_to(folder / "sub")  # read under its own name, although `again` comes first
    (folder / "up").symlink_to(tmp_path)
    (folder / "self").symlink_to(".")
    assert names(folder) == ["a.txt", "a.wav", "more/deep/c.txt", "more/deep/c.wav", "sub/b.txt", "sub/b.wav"]
    found = listed(folder)
    assert [id for id, reason in found.items() if not reason] == ["a", "more/deep/c", "sub/b"]
    assert f"a link to a folder that is read as {folder}/sub" in found["again"]
    assert "a link to a folder that contains" in found["up"]
    assert [file.name for file in list_audio(str(folder), "")] == ["a", "more/deep/c", "sub/b"]
    assert set(find_audio(str(folder), ["a", "b", "c"])) == {"a", "b", "c"}


def test_a_folder_reached_by_two_links_is_read_under_the_first(tmp_path: Path) -> None:
    put(tmp_path / "disk/x/c.wav", b"")
    root = tmp_path / "root"
    root.mkdir()
    for name in ("one", "two"):
        (root / name).symlink_to(tmp_path / "disk")
    (root / "zero").symlink_to(tmp_path / "disk/x")
    assert names(root) == ["one/x/c.wav"]
    assert set(files_below(root).unread) == {root / "two", root / "zero"}


def test_broken_links_and_unreadable_folders_are_reported_and_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (folder / "disk").symlink_to(tmp_path / "unmounted")
    (folder / "ring.wav").symlink_to("ring.wav")
    (folder / "locked").mkdir()
    scandir = os.scandir

    def closed(path: os.PathLike[str]) -> object:  # permissions have no effect on root, who may run the tests
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    found = listed(folder)
    assert [id for id, reason in found.items() if not reason] == ["a", "sub/b"]
    assert "a broken link" in found["gone.wav"] and "a broken link" in found["disk"]
    assert "ring.wav" in found and "cannot be listed (Permission denied)" in found["locked"]
    files = {file.name: file for file in list_audio(str(folder), "")}
    assert set(files) == {"a", "gone", "ring", "sub/b"} and files["gone"].seconds == 0  # fails when decoded
    errors = capsys.readouterr().err
    assert "disk: a broken link" in errors and "locked: a folder that cannot be listed" in errors
    assert find_audio(str(folder), ["a", "gone"]) == {"a": folder / "a.wav"}
    out = tmp_path / "out"
    assert main(["folder", f"--folder={folder}", f"--out={out}", "--workers=1"]) == 0
    assert len(open_dataset(out)) == 2 and "gone.wav" in (out / "skipped.jsonl").read_text()
    assert "skipped 4 recordings" in capsys.readouterr().out


def test_a_linked_file_keeps_the_name_of_the_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".pool").mkdir()
    (folder / "a.wav").rename(tmp_path / ".pool/0001")
    (folder / "a.wav").symlink_to(tmp_path / ".pool/0001")  # as the hub's cache does
    assert listed(folder) == {"a": "", "sub/b": ""}
    assert len(sources(FolderSettings(folder=str(folder)))[0].load(FEATURES).recording.text or "") == 9
