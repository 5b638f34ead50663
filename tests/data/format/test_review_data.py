"""Regressions of the data package: concurrent writers, mixtures of many groups, unreadable crops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel, pad_labels
from common.errors import UserError
from common.segments import Segments
from data import skipped as skipped_module
from data.format import schema
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter, locked
from data.loading.loader import LoaderSettings, RowLoader
from data.loading.mixture import DatasetGroup, MixedCrops, groups
from data.loading.order import CropOrder
from data.loading.supervised import FixedCrops, supervised_crops
from data.recording import Recording
from data.shards.derive import derive, hidden_sibling, stored_recording
from data.skipped import Skipped, list_path, merge_lists, write_list
from data.transcripts import Word
from tests.made_datasets import FEATURES, make_dataset, noise, verify


def write_part(folder: Path, part: int, parts: int, ids: list[str]) -> DatasetWriter:
    """Writer of a part with these recordings, with its shards closed."""
    writer = DatasetWriter(folder, FEATURES, part=part, parts=parts)
    for id in ids:
        if id not in writer.done_ids:
            writer.add(Recording(id), noise(20, part))
    writer.close()
    return writer


def test_shards_with_numbers_of_six_digits_are_not_overwritten(tmp_path: Path) -> None:
    parts = 60_000
    for ids in (["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]):  # shards 0, 60000, 120000, 180000
        writer = write_part(tmp_path, 0, parts, ids)
        assert writer.done_ids == set(ids)
        writer._unlock()
    assert sorted(int(path.stem[5:]) for path in tmp_path.glob("rows-*")) == [0, 60_000, 120_000, 180_000]


def test_a_merge_that_another_machine_just_finished_loses_no_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a shared file system: this machine sees the finished dataset late, when its rows are already removed."""
    first, second = write_part(tmp_path, 0, 2, ["a", "b"]), write_part(tmp_path, 1, 2, ["c"])
    assert not first.finish()

    def finish_elsewhere() -> None:
        monkeypatch.undo()
        # The other machine, stopped while it removes leftovers.
        with monkeypatch.context() as patch:
            patch.setattr(DatasetWriter, "_remove_leftovers", lambda _: None)
            second._merge()
        (tmp_path / "rows-00000.arrow").unlink()

    merge = DatasetWriter._merge

    def late(writer: DatasetWriter) -> None:
        finish_elsewhere()
        merge(writer)

    monkeypatch.setattr(DatasetWriter, "_merge", late)
    assert second.finish()
    assert [open_dataset(tmp_path).id(i) for i in range(3)] == ["a", "b", "c"]


def test_rows_that_are_lost_stop_a_merge(tmp_path: Path) -> None:
    first, second = write_part(tmp_path, 0, 2, ["a", "b"]), write_part(tmp_path, 1, 2, ["c"])
    first.finish()
    (tmp_path / "rows-00000.arrow").unlink()
    with pytest.raises(UserError, match="1 of 3 recordings"):
        second.finish()
    assert not (tmp_path / schema.DATASET_FILE).exists()


def test_a_writer_may_start_while_another_part_writes_its_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glob = Path.glob

    def glob_late(folder: Path, pattern: str) -> list[Path]:
        found = list(glob(folder, pattern))
        if pattern == "shard-*" and not list(glob(folder, "part-00000.lock")):
            write_part(tmp_path, 0, 2, ["a"])
        return found

    def is_file_late(path: Path) -> bool:
        found = path.exists()
        if path.name == schema.PREPARING_FILE and not found and not list(glob(tmp_path, "part-00000.lock")):
            write_part(tmp_path, 0, 2, ["a"])
        return found

    monkeypatch.setattr(Path, "glob", glob_late)
    monkeypatch.setattr(Path, "is_file", is_file_late)
    DatasetWriter(tmp_path, FEATURES, part=1, parts=2)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="writing failed"):
        DatasetWriter(tmp_path / "file" / "dataset", FEATURES)


def test_lists_of_skipped_recordings_may_be_merged_by_two_parts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (0, 1):
        write_list(list_path(tmp_path, "skipped", part, 2), [Skipped(f"r{part}", "bad")])
    replace_file, others = skipped_module.replace_file, [merge_lists]

    def replace_late(path: Path):  # type: ignore[no-untyped-def]
        if others:
            others.pop()(tmp_path)
        return replace_file(path)

    monkeypatch.setattr(skipped_module, "replace_file", replace_late)
    merge_lists(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("sizes", [[1, 1, 1, 400], [1, 300]])
def test_a_substitute_of_a_mixture_is_one_of_its_crops(sizes: list[int]) -> None:
    tables = [FixedCrops(np.arange(n), np.zeros(n), np.full(n, 50), [f"{n}"] * n, n) for n in sizes]
    # Very small shares are rounded up to a crop per epoch, so an epoch has more crops than the groups.
    mixed = MixedCrops(tables, [1e-9] * (len(sizes) - 1) + [1.0], 0)
    assert len(mixed) > sum(sizes) - len(sizes) + 1
    found = {mixed.substitute(seed, 60, 0)[3] for seed in range(8000)}  # type: ignore[index]
    assert found == set(range(sum(sizes)))


class RecordingStorage:
    """Storage that records which bytes were read and forgotten."""

    def __init__(self, inner: object) -> None:
        self.inner, self.was_read, self.was_forgotten = inner, set[int](), set[int]()

    def read_into(self, name: str, position: int, out: memoryview) -> None:
        if name.startswith("shard"):
            self.was_read |= set(range(position, position + len(out)))
        self.inner.read_into(name, position, out)  # type: ignore[attr-defined]

    def forget(self, name: str, position: int, length: int) -> None:
        if name.startswith("shard"):
            self.was_forgotten |= set(range(position, position + length))


@pytest.mark.parametrize("encoding", schema.ENCODINGS)
@pytest.mark.parametrize("verify", [False, True])
def test_all_cached_bytes_of_a_damaged_crop_are_dropped(
    tmp_path: Path, encoding: schema.Encoding, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("encoding", "dataset"):
        monkeypatch.setattr(f"data.format.{module}.CHECKSUM_FRAMES", 1024)
    values = noise(3000)
    values[:1500] = 1.0  # compresses well: block sizes differ
    with DatasetWriter(tmp_path, FEATURES, encoding=encoding) as writer:
        writer.add(Recording("a"), noise(10))
        writer.add(Recording("b"), values)
        writer.finish()
    dataset = open_dataset(tmp_path)
    dataset.storage = storage = RecordingStorage(dataset.storage)  # type: ignore[assignment]
    for start, stop in ((0, 100), (1400, 1700), (2900, 3000)):
        storage.was_read.clear(), storage.was_forgotten.clear()
        dataset.read(1, start, stop, verify=verify)
        dataset.forget(1, start, stop)
        assert storage.was_read and storage.was_read <= storage.was_forgotten


def test_a_shard_missing_from_storage_is_an_unreadable_recording(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [50])

    def gone(*_: object) -> None:
        raise FileNotFoundError("does not exist")

    dataset.storage.forget = gone  # type: ignore[method-assign]
    dataset.forget(0, 0, 10)


def with_short_language(folder: Path) -> Dataset:
    with DatasetWriter(folder, FEATURES, name="corpus") as writer:
        for number in range(4):
            writer.add(Recording(f"long-{number}", "word", language="cs"), noise(300))
            writer.add(Recording(f"short-{number}", "word", language="sk"), noise(30))
        writer.finish()
    return open_dataset(folder)


def test_a_language_of_too_short_recordings_is_left_out_as_it_is_without_a_temperature(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = with_short_language(tmp_path)
    settings = LoaderSettings(dataset=str(tmp_path), row_frames=400, max_seconds=4.0, language_temperature=0.5)
    crops = settings.crop_order(dataset)
    assert set(crops.crops(0, np.arange(len(crops))).recording.tolist()) == set(range(4))
    assert "min_frames" in caplog.text
    with pytest.raises(UserError, match="min_frames"):
        replace(settings, min_seconds=4.0).crop_order(dataset)


def test_datasets_of_one_name_keep_their_recordings_apart(tmp_path: Path) -> None:
    for name, seed in (("x", 0), ("y", 1)):
        with DatasetWriter(tmp_path / name, FEATURES, name="corpus") as writer:
            writer.add(Recording("a", f"text {name}"), noise(50, seed))
            writer.finish()
    group = DatasetGroup([open_dataset(tmp_path / name) for name in "xy"], [0.0, 0.0])
    assert group.id(0) != group.id(1)
    assert group.select(ids=[group.id(1)]).tolist() == [1]
    with pytest.raises(UserError, match="no recording 'z/a'"):
        group.select(ids=["z/a"])


def test_a_batch_without_any_readable_segment_has_no_loss_and_finite_gradients() -> None:
    settings = EncoderSettings(dim=16, num_layers=1, num_heads=2, feedforward_dim=16, subsampling_channels=8)
    model = CTCModel(settings, 5)
    unused = torch.zeros(2, 3, dtype=torch.int64)
    output = model(torch.zeros(2, 40, 80), Segments(unused, unused, 40), *pad_labels([]))
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == 0 and int(output.num_impossible) == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_crops_of_no_length_are_refused_and_do_not_loop(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, FEATURES) as writer:
        writer.add(Recording("a", "word", [Word("word", 0.1, 0.2)]), noise(300))
        writer.finish()
    dataset = open_dataset(tmp_path)
    settings = LoaderSettings(dataset=str(tmp_path), min_seconds=0.002, max_seconds=0.004)
    with pytest.raises(UserError, match="max_frames 0"):
        supervised_crops(dataset, dataset.select(), *settings.crop_frames(dataset))


def test_a_weighted_dataset_without_selected_recordings_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = []
    for name, split in (("x", "train"), ("y", "test")):
        with DatasetWriter(tmp_path / name, FEATURES, name=name) as writer:
            writer.add(Recording("a", split=split), noise(200, len(datasets)))
            writer.finish()
        datasets.append(open_dataset(tmp_path / name))
    group = DatasetGroup(datasets, [1.0, 1.0])
    (only,) = groups(group, group.select("train"), 1.0)
    assert only.weight == 1.0 and only.recordings.tolist() == [0]
    assert "no recording of y is selected" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"text": "\ud800"}, {"language": None}, {"words": [Word("\udfff", 0.0, 0.1)]}, {"speaker": 7}]
)
def test_text_that_cannot_be_stored_names_its_recording_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with DatasetWriter(tmp_path, FEATURES) as writer:
        writer.add(Recording("good"), noise(20))
        with pytest.raises(UserError, match="recording 'bad': .* is not Unicode text"):
            writer.add(Recording("bad", **wrong), noise(20))
        writer.finish()
    assert len(open_dataset(tmp_path)) == 1 and not verify(open_dataset(tmp_path))


def test_a_stream_without_a_single_row_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", [150])
    settings = LoaderSettings(row_frames=100, rows=2, min_seconds=1.0, max_seconds=1.0, num_workers=0)
    loader = RowLoader(dataset, NeverLongEnough(dataset.frames, 100, 100, 0), settings, multiple=4, row_gap=4)
    with pytest.raises(UserError, match="all crops are below data.min_seconds"):
        next(iter(loader))


class NeverLongEnough(CropOrder):
    """Crop order with crops that are all shorter than the minimum."""

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        recording, start, stop = super()._cut(epoch, item)
        return recording, start, np.minimum(stop, start + 75)


def test_a_dataset_is_derived_by_one_process_at_a_time(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", [100, 100])
    entries = [(dataset, i, stored_recording(dataset, i)) for i in range(2)]
    with locked(hidden_sibling(tmp_path / "out", "lock")), pytest.raises(UserError, match="another process is writing"):
        derive(tmp_path / "out", entries)
    assert len(derive(tmp_path / "out", entries)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]
