"""On-disk format: round trips, error messages for every kind of damage, and interrupted preparations."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from common.errors import UserError
from data.features import FeatureSettings
from data.format import schema
from data.format import writer as writer_module
from data.format.dataset import STD_FLOOR, Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.shards.__main__ import main
from data.shards.derive import stored_recording
from data.transcripts import Word
from tests.made_datasets import FEATURES, make_dataset, noise, verify

LENGTHS = [300, 700, 400, 250, 9000, 500, 350]  # r004 has three checksum blocks and a separate shard


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "set", LENGTHS)


def table_of(path: Path) -> pa.Table:
    with pa.ipc.open_file(path.read_bytes()) as file:
        return file.read_all()


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    tables = [table_of(dataset.path / name).to_pylist() for name in ("index.arrow", "recordings.arrow")]
    return [a | b for a, b in zip(*tables, strict=True)]


def shard_of(dataset: Dataset, name: str) -> Path:
    return dataset.path / schema.shard_name(next(row["shard"] for row in rows(dataset) if row["id"] == name))


def ids_of(dataset: Dataset) -> list[str]:
    return [dataset.id(i) for i in range(len(dataset))]


def flip_byte(dataset: Dataset, name: str, frame: int) -> None:
    row = next(row for row in rows(dataset) if row["id"] == name)
    with open(dataset.path / schema.shard_name(row["shard"]), "r+b") as file:
        file.seek(row["offset"] + 160 * frame)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def change_index(dataset: Dataset, column: str, row: int, value: object) -> None:
    """Replace a value in a column of index.arrow or recordings.arrow."""
    path = dataset.path / ("recordings.arrow" if column in ("id", "crc32", "text") else "index.arrow")
    table = table_of(path)
    values = table[column].to_pylist()
    values[row] = value
    number = table.schema.get_field_index(column)
    changed = table.set_column(number, table.schema.field(number), pa.array(values, table.schema.field(number).type))
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(changed)


def test_recordings_survive_a_round_trip(tmp_path: Path) -> None:
    words = [Word("ahoj", 0.1, 0.5), Word("sv\u011bte", 0.5, 1.0, 0.25)]
    recordings = [
        Recording("b/2", "ahoj sv\u011bte", words, "cs", "s1", "dev"),
        Recording("a \u00e9", None, None, "en", "", "train"),
        Recording("c", "", [], "en", "s2", "test", [(0.5, 1.25)]),
    ]
    with DatasetWriter(tmp_path, FEATURES) as writer:
        for number, recording in enumerate(recordings):
            writer.add(recording, noise(200 + number, number))
        writer.finish()
    dataset = open_dataset(tmp_path)
    assert [stored_recording(dataset, i) for i in range(3)] == sorted(recordings, key=lambda r: r.id)
    assert dataset.frames.tolist() == [201, 200, 202] and dataset.total_frames == 603
    assert np.array_equal(dataset.read(1), noise(200, 0).astype(np.float16))
    assert np.array_equal(dataset.read(1, 50, 60, verify=True), noise(200, 0).astype(np.float16)[50:60])
    assert dataset.features == FEATURES


def test_selection_by_split_language_and_id(dataset: Dataset) -> None:
    assert dataset.select(split="train", language="en").tolist() == list(range(7))
    assert dataset.select(ids=["r005", "r001"]).tolist() == [1, 5]
    with pytest.raises(UserError, match=r"split 'dev'; the dataset has \['train'\]"):
        dataset.select(split="dev")
    with pytest.raises(UserError, match="no recording 'unknown'"):
        dataset.select(ids=["r001", "unknown"])


def test_the_stock_library_opens_every_shard(dataset: Dataset) -> None:
    tensors: dict[str, np.ndarray] = {}
    for shard in dataset.shards():
        tensors |= safetensors.numpy.load_file(dataset.path / schema.shard_name(shard))
    assert len(dataset.shards()) > 3 and sorted(tensors) == ids_of(dataset)
    assert all(np.array_equal(tensors[dataset.id(i)], dataset.read(i)) for i in range(len(dataset)))


def test_normalised_recordings_have_zero_mean_and_unit_variance(dataset: Dataset) -> None:
    values = dataset.read_normalised(1)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-4)


def test_dataset_statistics_are_those_of_all_frames(dataset: Dataset) -> None:
    everything = np.concatenate([dataset.read_normalised(i, normalisation="dataset") for i in range(len(dataset))])
    np.testing.assert_allclose(everything.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(everything.std(0), 1, atol=1e-4)


def test_a_crop_has_the_same_values_as_the_whole_recording(dataset: Dataset) -> None:
    assert np.array_equal(dataset.read_normalised(4, 4000, 4200), dataset.read_normalised(4)[4000:4200])


def test_a_constant_bin_becomes_zero_and_not_noise(tmp_path: Path) -> None:
    values = noise(300)
    values[:, 3] = -13.8
    with DatasetWriter(tmp_path, FEATURES) as writer:
        writer.add(Recording("a"), values)
        writer.finish()
    assert np.abs(open_dataset(tmp_path).read_normalised(0)[:, 3]).max() < 1e-3


def test_a_band_that_hardly_varies_is_not_amplified_and_other_bins_keep_their_bits(tmp_path: Path) -> None:
    """Bins 60 on are those of 11 kHz audio: constant but for one click."""
    values = noise(2000) * 3.0
    values[:, 60:] = -13.8
    values[1000:1003, 60:] += 6.0
    with DatasetWriter(tmp_path, FEATURES) as writer:
        writer.add(Recording("a"), values)
        writer.finish()
    dataset = open_dataset(tmp_path)
    mean, std = dataset.mean_std(0)
    floored, before = dataset.read_normalised(0), dataset.read_normalised(0, std_floor=0.0)
    assert np.array_equal(floored[:, :60], before[:, :60]), "ordinary bins do not change"
    assert before[:, 60:].max() > 20
    expected = (dataset.read(0).astype(np.float64) - mean) / np.maximum(std, STD_FLOOR * std.astype(np.float64).mean())
    np.testing.assert_allclose(floored, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(floored[:, 60:]).max() < 12


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_reported_by_name_and_block_and_other_recordings_stay_readable(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(dataset.path)]) == 0
    flip_byte(dataset, "r004", 5000)
    flip_byte(dataset, "r001", 3)
    with pytest.raises(UserError, match=r"'r004' in .*shard-0000\d\.safetensors: the checksum of block 1"):
        dataset.read(4, 4900, 4910, verify=True)
    dataset.read(4, 0, 4096, verify=True)
    assert [line.split("'")[1] for line in verify(dataset)] == ["r001", "r004"]
    capsys.readouterr()
    assert main(["verify", str(dataset.path)]) == 1
    printed = capsys.readouterr().out
    assert "r001" in printed and "blocks [1]" in printed and "2 of 7 recordings are damaged" in printed


def test_a_truncated_shard_names_what_is_missing_and_the_rest_stays_readable(dataset: Dataset) -> None:
    path = shard_of(dataset, "r004")
    os.truncate(path, path.stat().st_size - 160)
    with pytest.raises(UserError, match=rf"'r004' in .*{path.name}: the shard is truncated"):
        dataset.read(4, 8990, 9000)
    with pytest.raises(UserError, match=rf"{path.name} are truncated: 1 recordings .*'r004'"):
        open_dataset(dataset.path)
    rest = open_dataset(dataset.path, check=False)
    assert len(verify(rest)) == 1 and len(rest.read(4, 0, 8990)) == 8990


def test_a_missing_shard_is_named_and_the_rest_stays_readable(dataset: Dataset) -> None:
    path = shard_of(dataset, "r004")
    path.unlink()
    with pytest.raises(UserError, match=f"1 shards are missing: {path.name}"):
        open_dataset(dataset.path)
    rest = open_dataset(dataset.path, check=False)
    assert [line.split("'")[1] for line in verify(rest)] == ["r004"]
    with pytest.raises(UserError, match=f"'r004' in .*{path.name}"):
        rest.read(4)


def test_non_finite_values_in_a_shard_name_the_recording(dataset: Dataset) -> None:
    row = rows(dataset)[2]
    with open(dataset.path / schema.shard_name(row["shard"]), "r+b") as file:
        file.seek(row["offset"] + 160 * 7)
        file.write(np.float16("inf").tobytes())
    with pytest.raises(UserError, match="'r002' .*NaN or infinite"):
        dataset.read_normalised(2)
    assert len(verify(dataset)) == 1


def test_a_symbolic_link_in_place_of_a_shard_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    path = shard_of(dataset, "r004")
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        open_dataset(dataset.path)
    with pytest.raises(UserError, match="'r004'"):
        open_dataset(dataset.path, check=False).read(4)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", 10**15),
        ("offset", -160),
        ("frames", 0),
        ("frames", 10**12),
        ("frames", 2**62),
        ("shard", -1),
        ("shard", 2**31 - 1),
        ("id", None),
    ],
)
def test_invalid_offsets_and_lengths_are_refused(dataset: Dataset, column: str, value: int) -> None:
    change_index(dataset, column, 0, value)
    with pytest.raises(UserError):
        open_dataset(dataset.path).id(0)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_hostile_pickle_in_a_dataset_folder_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    payload = pickle.dumps(Hostile(mark))
    names = ["dataset.json", "index.arrow", "recordings.arrow", "statistics.safetensors", "preparing.json", "data.pkl"]
    names += ["shard-00000.safetensors"]
    for number, name in enumerate(names):
        dataset = make_dataset(tmp_path / str(number), LENGTHS)
        (dataset.path / name).write_bytes(payload)
        try:
            verify(open_dataset(dataset.path, check=False))
            main(["inspect", str(dataset.path)])
            DatasetWriter(dataset.path, FEATURES)
        except UserError:
            pass
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version_is_refused(dataset: Dataset, version: object) -> None:
    fields = json.loads((dataset.path / "dataset.json").read_text()) | {"format_version": version}
    (dataset.path / "dataset.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="format_version"):
        open_dataset(dataset.path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format_version": 2}'])
def test_a_damaged_dataset_json_is_a_clear_error(dataset: Dataset, content: str) -> None:
    (dataset.path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        open_dataset(dataset.path)


def test_an_empty_or_missing_folder_is_not_a_dataset(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is not a dataset"):
            open_dataset(path)
    assert main(["verify", str(tmp_path)]) == 2


# --- interruptions ---------------------------------------------------------------------------------------------------


def fill(writer: DatasetWriter, lengths: list[int], stop_before: int | None = None) -> None:
    for number, frames in enumerate(lengths[:stop_before]):
        recording = Recording(f"r{number:03d}", text=f"text {number}", language="en", speaker=f"s{number % 3}")
        if recording.id not in writer.done_ids:
            writer.add(recording, noise(frames, number))


@pytest.mark.parametrize("stop_before", range(len(LENGTHS) + 1))
def test_an_interrupted_preparation_continues_to_the_same_dataset(
    dataset: Dataset, tmp_path: Path, stop_before: int
) -> None:
    path = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt), DatasetWriter(path, FEATURES, 200_000) as writer:
        fill(writer, LENGTHS, stop_before)
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="is incomplete"):
        open_dataset(path)
    with DatasetWriter(path, FEATURES, 200_000) as writer:
        assert len(writer.done_ids) == stop_before  # leaving the block keeps every recording
        fill(writer, LENGTHS)
        writer.finish()
    continued = open_dataset(path)
    assert continued.fingerprint == dataset.fingerprint and ids_of(continued) == ids_of(dataset)
    assert not verify(continued)
    assert {p.suffix for p in path.iterdir()} == {".json", ".arrow", ".safetensors"}
    assert len(list(path.iterdir())) == 4 + len(continued.shards())


def in_a_fork(function: Callable[[], object]) -> int:
    """Exit code of a child process (minus the signal that ended it); 0 if the function returned."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_sigkill_at_any_sync_or_rename_never_leaves_a_broken_dataset(dataset: Dataset, tmp_path: Path) -> None:
    def killed_at(function: Callable[..., object], places: list[int]) -> Callable[..., object]:
        def called(*arguments: object) -> object:
            places.pop()
            if not places:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return called

    def write(path: Path, places: list[int]) -> None:
        os.replace, os.fsync = killed_at(os.replace, places), killed_at(os.fsync, places)  # type: ignore[assignment]
        writer = DatasetWriter(path, FEATURES, 200_000)
        fill(writer, LENGTHS)
        writer.finish()

    place, status = 0, -1
    while status != 0:
        place += 1
        path = tmp_path / f"killed-{place}"
        status = in_a_fork(lambda path=path, place=place: write(path, [0] * place))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL)
        try:
            assert open_dataset(path).fingerprint == dataset.fingerprint
        except UserError as error:
            assert "is incomplete" in str(error) or place < 4  # killed before the first file existed
        with DatasetWriter(path, FEATURES, 200_000) as writer:
            fill(writer, [] if writer.finished else LENGTHS)
            writer.finish()
        continued = open_dataset(path)
        assert continued.fingerprint == dataset.fingerprint and not verify(continued)
        assert len(list(path.iterdir())) == 4 + len(continued.shards())  # no leftovers
        shutil.rmtree(path)
    assert place > 20


def test_a_disk_without_space_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = DatasetWriter(tmp_path, FEATURES)
    fill(writer, LENGTHS, 2)
    monkeypatch.setattr(writer_module.os, "pwrite", no_space)
    with pytest.raises(UserError, match="disk is full .*; 0 recordings are written"):
        fill(writer, LENGTHS)
    assert {path.name for path in tmp_path.iterdir()} == {"preparing.json", "part-00000.lock"}


def test_a_full_disk_is_an_error_that_keeps_written_recordings(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "full"
    space, real_pwrite = 1_000_000, os.pwrite

    def pwrite(file: int, view: memoryview, offset: int) -> int:
        nonlocal space
        if offset > 0 and space < len(view):
            raise OSError(errno.ENOSPC, "No space left on device")
        space -= len(view)
        return real_pwrite(file, view, offset)

    monkeypatch.setattr(writer_module.os, "pwrite", pwrite)
    message = "disk is full.*recordings are written and kept.*run the same command again"
    with pytest.raises(UserError, match=message), DatasetWriter(path, FEATURES, 10_000_000) as writer:
        fill(writer, LENGTHS)
    assert not list(path.glob("*.tmp"))
    monkeypatch.undo()
    with DatasetWriter(path, FEATURES) as writer:
        assert writer.done_ids == {"r000", "r001", "r002", "r003"}
        fill(writer, LENGTHS)
        writer.finish()
    assert open_dataset(path).fingerprint == dataset.fingerprint


def test_a_file_size_limit_leaves_no_temporary_file(tmp_path: Path) -> None:
    def write() -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
        with pytest.raises(UserError, match="disk is full"):
            fill(DatasetWriter(tmp_path, FEATURES, 10_000_000), LENGTHS)
        return True

    assert in_a_fork(write) == 0 and not list(tmp_path.glob("*.tmp"))
    assert len(safetensors.numpy.load_file(tmp_path / "shard-00000.safetensors")) == 4
    with DatasetWriter(tmp_path, FEATURES) as writer:
        assert writer.done_ids == {"r000", "r001", "r002", "r003"}


def test_a_folder_started_with_other_features_is_refused_by_field(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, FEATURES) as writer:
        fill(writer, [200])
    with pytest.raises(UserError, match=r"log_floor: 1e-06 != 1e-05"):
        DatasetWriter(tmp_path, FeatureSettings(log_floor=1e-5))


def test_a_finished_dataset_accepts_no_recordings(dataset: Dataset) -> None:
    with DatasetWriter(dataset.path, FEATURES) as writer:
        assert writer.finished
        with pytest.raises(UserError, match="finished dataset"):
            writer.add(Recording("new"), noise(100))
        writer.finish()


def test_two_writers_of_one_folder_are_refused(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, FEATURES), pytest.raises(UserError, match="another process is writing"):
        DatasetWriter(tmp_path, FEATURES)
    with DatasetWriter(tmp_path, FEATURES) as writer, pytest.raises(UserError, match="no recordings were added"):
        writer.finish()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((9, 80), np.nan), "NaN"),
        (np.full((9, 80), 1e6), "NaN or infinite"),
        (np.zeros((0, 80)), "at least one frame"),
        (np.zeros((9, 64)), r"shape \[9, 64\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_invalid_log_mel_names_the_recording(values: np.ndarray, message: str, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, FEATURES) as writer:
        with pytest.raises(UserError, match=f"'bad'.*{message}"):
            writer.add(Recording("bad"), values)
        fill(writer, [100])
        with pytest.raises(UserError, match="'r000' was added twice"):
            writer.add(Recording("r000"), noise(100))


@pytest.mark.parametrize("name", ["", " ", "a\nb", "__metadata__"])
def test_ids_that_cannot_name_a_tensor_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="recording id"):
        Recording(name)


def test_many_recordings_close_a_shard_before_its_header_is_full(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, FEATURES) as writer:
        writer.header_bytes = 2048
        fill(writer, [2] * 60)
        writer.finish()
    dataset = open_dataset(tmp_path)
    assert len(dataset.shards()) > 2 and not verify(dataset)
    paths = [tmp_path / schema.shard_name(shard) for shard in dataset.shards()]
    assert sum(len(safetensors.numpy.load_file(path)) for path in paths) == 60


def test_words_are_found_in_every_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.format.index_writer.BATCH_ROWS", 3)
    with DatasetWriter(tmp_path, FEATURES, 1_000) as writer:
        for number in range(8):
            writer.add(Recording(f"r{number}", words=[(f"w{number}", 0.0, 0.1)]), noise(10))
        writer.finish()
    dataset = open_dataset(tmp_path)
    assert [dataset.words(i) for i in (7, 0, 3, 5, 2)] == [[Word(f"w{i}", 0.0, 0.1)] for i in (7, 0, 3, 5, 2)]


def test_inspect_shows_totals_and_draws_a_recording(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dataset.path)]) == 0
    assert "7 recordings, 0.03 hours" in capsys.readouterr().out
    picture = dataset.path.parent / "picture.png"
    assert main(["inspect", str(dataset.path), "--id", "r003", "--png", str(picture)]) == 0
    assert "text 3" in capsys.readouterr().out and picture.read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(dataset.path), "--id", "unknown"]) == 2


def test_the_command_line_is_a_module(dataset: Dataset) -> None:
    command = [sys.executable, "-m", "data.shards", "verify", str(dataset.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 of 7 recordings are damaged\n") and not done.stderr
