"""Derived datasets: the selected recordings with the same values and a new index; sources are unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.files import replace_file, write_file
from data.features import FeatureSettings
from data.format import schema
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.shards import derive as derive_module
from data.shards.derive import derive, stored_recording
from data.transcripts import Word
from tests.made_datasets import make_dataset, noise, verify

LENGTHS = [300, 700, 400, 250, 5000, 500]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "set", LENGTHS)


def everything(dataset: Dataset) -> list[tuple[Dataset, int, Recording]]:
    return [(dataset, i, stored_recording(dataset, i)) for i in range(len(dataset))]


def test_a_copy_of_all_recordings_is_the_same_dataset_and_takes_no_space(dataset: Dataset, tmp_path: Path) -> None:
    copy = derive(tmp_path / "copy", everything(dataset), name="again")
    assert copy.fingerprint == dataset.fingerprint and copy.name == "again" and not verify(copy)
    for shard in copy.shards():
        assert (copy.path / schema.shard_name(shard)).stat().st_nlink == 2
    assert {path.suffix for path in copy.path.iterdir()} == {".json", ".arrow", ".safetensors"}


def test_selected_recordings_keep_their_values_and_get_new_labels(dataset: Dataset, tmp_path: Path) -> None:
    words = [Word("hello", 0.1, 0.4, 0.5)]
    entries = [
        (dataset, 4, replace(stored_recording(dataset, 4), words=words, split="test")),
        (dataset, 1, replace(stored_recording(dataset, 1), id="zzz", excluded=[(0.0, 1.0)])),
    ]
    selected = derive(tmp_path / "selected", iter(entries))
    assert [selected.id(i) for i in range(2)] == ["r004", "zzz"] and selected.frames.tolist() == [5000, 700]
    assert selected.words(0) == words and selected.split(0) == "test" and selected.excluded(1) == [(0.0, 1.0)]
    assert np.array_equal(selected.read(0, verify=True), dataset.read(4))
    assert np.array_equal(selected.read_normalised(1), dataset.read_normalised(1))
    assert not verify(selected) and not verify(dataset)


def test_merged_datasets_renumber_shards(dataset: Dataset, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "other", dataset.features) as writer:
        writer.add(Recording("a", split="dev"), noise(321, 99))
        writer.finish()
    other = open_dataset(tmp_path / "other")
    joined = derive(tmp_path / "joined", [*everything(dataset), *everything(other)])
    assert len(joined) == 7 and joined.id(0) == "a" and not verify(joined)
    assert np.array_equal(joined.read(0), other.read(0)) and np.array_equal(joined.read(5), dataset.read(4))
    assert joined.totals("split") == {"dev": (1, 321), "train": (6, sum(LENGTHS))}


def test_shards_are_copied_if_links_are_impossible(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(derive_module.os, "link", no_links)
    copy = derive(tmp_path / "copy", everything(dataset))
    assert not verify(copy) and (copy.path / schema.shard_name(copy.shards()[0])).stat().st_nlink == 1


def test_an_index_of_many_batches_is_merged(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("format.index_writer", "shards.derive"):
        monkeypatch.setattr(f"data.{module}.BATCH_ROWS", 2)
    copy = derive(tmp_path / "copy", reversed(everything(dataset)))
    assert copy.fingerprint == dataset.fingerprint and len(copy.index.batches) == 3


def test_invalid_merges_are_refused_and_leave_no_files(dataset: Dataset, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "other", FeatureSettings(log_floor=1e-5)) as writer:
        writer.add(Recording("a"), noise(321, 99))
        writer.finish()
    wrong = [
        ("log_floor", [*everything(dataset), *everything(open_dataset(tmp_path / "other"))]),
        ("share their id with another, first 'r000'", [*everything(dataset), *everything(dataset)]),
        ("no recordings were selected", []),
    ]
    for message, entries in wrong:
        with pytest.raises(UserError, match=message):
            derive(tmp_path / "out", entries)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "set"]
    with pytest.raises(UserError, match="exists already"):
        derive(tmp_path / "set", everything(dataset))


def test_a_folder_name_may_have_the_maximum_length(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / ("a" * 255), FeatureSettings()) as writer:
        writer.add(Recording("one"), np.zeros((10, 80)))
        writer.finish()
    source = open_dataset(tmp_path / ("a" * 255))
    derive(tmp_path / ("b" * 255), [(source, 0, stored_recording(source, 0))])
    write_file(tmp_path / ("c" * 255), "text")
    with replace_file(tmp_path / ("d" * 255)) as file:
        file.write(b"text")
    assert sorted({path.name[0] for path in tmp_path.iterdir()}) == ["a", "b", "c", "d"]
