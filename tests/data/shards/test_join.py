"""`python -m data.shards join`: frames, word times and excluded stretches of joined recordings; cuts at the joins."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.loading.supervised import supervised_crops
from data.recording import Recording
from data.shards.__main__ import main
from data.shards.integrity import find_faults
from data.shards.join import join, neighbours
from data.transcripts import Word
from tests.made_datasets import FEATURES, noise

# id, text, words, language, speaker, split, frames
PARTS = [
    ("a/1", "one two", [Word("one", 0.0, 0.5), Word("two", 0.5, 1.0)], "en", "x", "train", 100),
    ("a/2", "three four", None, "en", "y", "train", 150),
    ("a/3", "held out", None, "en", "x", "test", 80),
    ("a/4", None, None, "en", "y", "train", 120),
    ("a/5", "five", None, "en", "y", "train", 90),
    ("b/1", "ahoj", None, "cs", "x", "train", 60),
    ("b/2", None, None, "cs", "x", "train", 70),
    ("c/1", "very long", None, "en", "x", "train", 700),
    ("c/2", "six", None, "en", "x", "train", 50),
]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    with DatasetWriter(tmp_path / "set", FEATURES) as writer:
        for number, (id, text, words, language, speaker, split, frames) in enumerate(PARTS):
            writer.add(Recording(id, text, words, language, speaker, split), noise(frames, number))
        writer.finish()
    return open_dataset(tmp_path / "set")


def ids(dataset: Dataset, runs: list[list[int]]) -> list[list[str]]:
    return sorted([dataset.id(i) for i in run] for run in runs)


def test_neighbours_of_a_split_and_language_are_joined_up_to_the_maximum_length(dataset: Dataset) -> None:
    runs = ids(dataset, list(neighbours(dataset, 460, same_speaker=False)))
    assert runs == [["a/1", "a/2", "a/4", "a/5"], ["a/3"], ["b/1", "b/2"], ["c/1"], ["c/2"]]
    assert ids(dataset, list(neighbours(dataset, 459, False)))[0] == ["a/1", "a/2", "a/4"]
    of_speakers = ids(dataset, list(neighbours(dataset, 460, same_speaker=True)))
    assert of_speakers == [["a/1"], ["a/2", "a/4", "a/5"], ["a/3"], ["b/1", "b/2"], ["c/1"], ["c/2"]]


def test_frames_are_concatenated_and_words_and_stretches_without_text_are_shifted(
    dataset: Dataset, tmp_path: Path
) -> None:
    joined = join(dataset, tmp_path / "joined", 4.6, same_speaker=False)
    assert int(joined.total_frames) == int(dataset.total_frames) and find_faults(joined, 1) == []
    [number] = joined.select(ids=["a/1+3"]).tolist()
    source = [dataset.select(ids=[id])[0] for id in ("a/1", "a/2", "a/4", "a/5")]
    assert np.array_equal(joined.read(number), np.concatenate([dataset.read(int(i)) for i in source]))
    assert joined.text(number) == "one two three four five"
    assert joined.words(number) == [
        Word("one", 0.0, 0.5), Word("two", 0.5, 1.0), Word("three four", 1.0, 2.5), Word("five", 3.7, 4.6)
    ]  # fmt: skip
    assert joined.excluded(number) == [(2.5, 3.7)]
    assert (joined.language(number), joined.speaker(number), joined.split(number)) == ("en", "", "train")
    [czech] = joined.select(ids=["b/1+1"]).tolist()
    assert joined.speaker(czech) == "x" and joined.excluded(czech) == [(0.6, 1.3)]


def test_labelled_crops_of_joined_recordings_are_cut_between_utterances_only(dataset: Dataset, tmp_path: Path) -> None:
    joined = join(dataset, tmp_path / "joined", 4.6, same_speaker=False)
    crops = supervised_crops(joined, joined.select("train", "en"), 260, 10)
    [number] = joined.select(ids=["a/1+3"]).tolist()
    spans = [
        (start, stop, text)
        for recording, start, stop, text in zip(crops.recording, crops.start, crops.stop, crops.texts, strict=True)
        if recording == number
    ]
    assert spans == [(0, 250, "one two three four"), (370, 460, "five")]


def test_the_command_refuses_an_existing_folder_and_an_impossible_length(
    dataset: Dataset, tmp_path: Path, capsys
) -> None:
    assert main(["join", str(dataset.path), "--out", str(tmp_path / "new"), "--seconds", "4.6"]) == 0
    assert "5 recordings" in capsys.readouterr().out
    assert main(["join", str(dataset.path), "--out", str(tmp_path / "new")]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(UserError, match="--seconds is 0: give a number above 0"):
        join(dataset, tmp_path / "other", 0, same_speaker=False)
    assert not (tmp_path / "other").exists()


def test_an_interrupted_join_leaves_no_folder_and_can_be_repeated(
    dataset: Dataset, tmp_path: Path, monkeypatch
) -> None:
    def broken(self, recording, log_mel) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "add", broken)
        with pytest.raises(KeyboardInterrupt):
            join(dataset, tmp_path / "joined", 4.6, same_speaker=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(join(dataset, tmp_path / "joined", 4.6, same_speaker=False)) == 5
