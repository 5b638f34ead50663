"""Confidences, filter, cutting and precision of pseudo-labels; labels and pseudo-labels in one mixture."""

import math
from pathlib import Path

import numpy as np
import pytest

from bestrq.decoding.tokens import TimedTokens
from bestrq.report.filter_chart import precision_svg
from bestrq.scoring.word_errors import score_recording
from bestrq.transcripts.formats import TimedTranscript
from bestrq.transcripts.words import TimedWord
from common.config import parse
from common.errors import UserError
from data.format.dataset import Dataset, open_dataset
from data.loading.mixture import DatasetGroup
from data.loading.supervised import supervised_crops
from data.shards.derive import derive, stored_recording
from data.transcripts import Word
from pipelines.curriculum import choose_labelled, labelled_crops
from pipelines.finetuning import FinetuneConfig
from pipelines.pseudo_labels import (
    FilterSettings,
    Hypothesis,
    Scored,
    cut_words,
    hypothesis_of,
    is_kept,
    precision_row,
    precision_table,
    precision_text,
    threshold_of,
)
from tests.tiny import make_dataset


def test_the_confidence_of_a_recording_is_the_geometric_mean_over_labels_or_the_mean_over_words() -> None:
    words = [TimedWord("Ahoj,", 0.0, 0.4, 0.5), TimedWord("-", 0.4, 0.5, 0.1), TimedWord("sv\u011bte", 0.5, 1.0, 0.9)]
    tokens = TimedTokens([1, 2, 3], [0, 1, 2], [0, 1, 2], [0.9, 0.5, 0.3])
    hypothesis = hypothesis_of(TimedTranscript("a", 1.2, "Ahoj, - sv\u011bte", words), tokens, "cs")
    assert hypothesis.text == "ahoj sv\u011bte", "label text, without words that have no label"
    assert hypothesis.words == [Word("ahoj", 0.0, 0.4, 0.5), Word("sv\u011bte", 0.5, 1.0, 0.9)]
    assert hypothesis.label == pytest.approx((0.9 * 0.5 * 0.3) ** (1 / 3))
    assert hypothesis.word == pytest.approx(0.7)
    assert Hypothesis.from_dict(hypothesis.to_dict()) == hypothesis


def test_a_hypothesis_without_words_has_confidence_zero_and_is_never_kept() -> None:
    empty = hypothesis_of(TimedTranscript("a", 1.0, "", []), TimedTokens([], [], [], []), "cs")
    assert (empty.text, empty.label, empty.word) == ("", 0.0, 0.0)
    blank = hypothesis_of(TimedTranscript("a", 1.0, " ", []), TimedTokens([1], [0], [0], [0.99]), "cs")
    assert blank.label == 0.0, "a space is a label, but no word"
    assert is_kept(np.array([0.0, 0.2]), 0.0).tolist() == [False, True]
    impossible = TimedTokens([1], [0], [0], [0.0])
    label = hypothesis_of(TimedTranscript("a", 1.0, "b", [TimedWord("b", 0, 1, 0.0)]), impossible, "cs").label
    assert 0 < label < 1e-9 and math.isfinite(label)


def test_the_filter_keeps_a_share_of_the_audio_and_a_lowest_confidence() -> None:
    confidence, frames = np.array([0.9, 0.2, 0.5, 0.7]), np.array([100, 400, 200, 300])

    def kept(**settings: float) -> list[int]:
        threshold = threshold_of(confidence, frames, FilterSettings(**settings))  # type: ignore[arg-type]
        return np.flatnonzero(is_kept(confidence, threshold)).tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(keep=0.4) == [0, 3] and kept(keep=0.6) == [0, 2, 3]
    assert kept(keep=0.59) == [0, 3], "never more than the share"
    assert kept(keep=0.01) == [0], "but at least one recording"
    assert kept(min_confidence=0.5) == [0, 2, 3] and kept(min_confidence=0.6, keep=0.6) == [0, 3]
    with pytest.raises(UserError, match=r"filter.min_confidence is 0.95, but the highest confidence .* 0.900"):
        kept(min_confidence=0.95)
    with pytest.raises(UserError, match="none of the 3 hypotheses has a word"):
        threshold_of(np.zeros(3), frames[:3], FilterSettings())
    with pytest.raises(UserError, match="filter.keep is 0"):
        FilterSettings(keep=0)


def test_doubtful_words_are_cut_out_to_the_middle_of_the_pauses() -> None:
    words = [
        Word("a", 0.2, 0.4, 0.1), Word("b", 0.6, 1.0, 0.9), Word("c", 1.2, 1.4, 0.3), Word("d", 1.4, 1.6, 0.2),
        Word("e", 2.0, 2.4, 0.8), Word("f", 2.6, 2.8, 0.1),
    ]  # fmt: skip
    kept, passages = cut_words(words, 0.5, 3.0)
    assert [word.word for word in kept] == ["b", "e"]
    assert np.array(passages) == pytest.approx(np.array([(0.0, 0.5), (1.1, 1.8), (2.5, 3.0)]))
    assert cut_words(words, 0.0, 3.0) == (words, [])
    overlapping = [Word("x", 0.0, 3.0, 0.9), Word("y", 0.5, 0.6, 0.1), Word("z", 0.7, 0.8, 0.1)]
    assert all(start <= end for start, end in cut_words(overlapping, 0.5, 3.0)[1])


def test_training_on_cut_recordings_uses_exactly_the_words_that_are_left(tmp_path: Path) -> None:
    source = open_dataset(make_dataset(tmp_path / "data", recordings=10))
    number = next(i for i in range(10) if len(source.words(i) or []) == 5)
    recording = stored_recording(source, number)
    # Times of a recogniser are multiples of its encoder frames of 40 ms.
    words = [
        Word(word.word, round(word.start / 0.04) * 0.04, round(word.end / 0.04) * 0.04, 0.1 if place == 2 else 0.9)
        for place, word in enumerate(source.words(number) or ())
    ]
    kept, passages = cut_words(words, 0.5, int(source.frames[number]) / 100)
    text = " ".join(word.word for word in kept)
    changed = type(recording)(recording.id, text, kept, "en", "", "train", passages)
    derived = derive(tmp_path / "cut", [(source, number, changed)])
    crops = supervised_crops(derived, np.array([0]), 2000, 10)
    assert crops.texts == [" ".join(word.word for word in part) for part in (words[:2], words[3:])]
    cut = words[2]
    assert crops.stop[0] <= math.ceil(cut.start * 100) and crops.start[1] >= math.floor(cut.end * 100)


def scored(confidence: float, reference: str, hypothesis: str, seconds: float = 1.0) -> Scored:
    return Scored(confidence, seconds, score_recording("r", reference, hypothesis, "cs", seconds))


def test_the_precision_of_a_threshold_is_the_error_rate_of_the_kept_recordings() -> None:
    items = [
        scored(0.9, "abcd", "abcd"), scored(0.5, "abcd ef", "abcx ef", 3.0), scored(0.4, "ab", "xy"),
        scored(0.0, "abc", "", 5.0),
    ]  # fmt: skip
    row = precision_row(items, 0.5)
    assert (row.kept_recordings, row.kept_share) == (2, pytest.approx(0.4))
    assert row.cer == pytest.approx(1 / 11) and row.wer == pytest.approx(1 / 3)
    assert row.rejected_cer == pytest.approx(5 / 5)
    everything = precision_row(items, 0.0)
    assert everything.kept_recordings == 3, "a hypothesis without words is never kept"
    rows = precision_table(items)
    assert [row.threshold for row in rows] == [0.9, 0.5, 0.4, 0.0]
    assert [row.kept_share for row in rows] == pytest.approx([0.1, 0.4, 0.5, 0.5])
    lines = precision_text(rows, row).splitlines()
    assert len(lines) == 5 and lines[2].endswith("<- filter") and "9.1 %" in lines[2]
    drawing = precision_svg([vars(row) for row in rows], vars(row))
    assert drawing.startswith("<svg") and "CER" in drawing and "filter" in drawing


# ---- Labels and pseudo-labels in one mixture ----


@pytest.fixture
def datasets(tmp_path: Path) -> tuple[Dataset, Dataset]:
    """A dataset, and pseudo-labels of its unlabelled recordings: all but 0.3 minutes of labels, chosen by seed 3."""
    labelled = open_dataset(make_dataset(tmp_path / "data"))
    train = labelled.select("train")
    rest = np.setdiff1d(train, choose_labelled(labelled, train, 0.3, 3))
    pseudo = derive(tmp_path / "pseudo", ((labelled, int(i), stored_recording(labelled, int(i))) for i in rest))
    return labelled, pseudo


def config_of(*arguments: str) -> FinetuneConfig:
    settings = ["--data.seed=3", "--data.min_seconds=0.1", "--finetune.label_minutes=0.3"]
    return parse(FinetuneConfig, [*settings, *arguments])


def mixture_of(labelled: Dataset, pseudo: Dataset, order: str = "lp") -> tuple[DatasetGroup, FinetuneConfig]:
    parts = {
        "l": f"{{dataset: {labelled.location}, weight: 1}}",
        "p": f"{{dataset: {pseudo.location}, weight: 3, pseudo_labels: true}}",
    }
    config = config_of("--data.mixture", f"[{', '.join(parts[name] for name in order)}]")
    group = config.data.open()
    assert isinstance(group, DatasetGroup)
    return group, config


def trained_ids(dataset: Dataset, config: FinetuneConfig) -> list[str]:
    """Ids of the recordings in an epoch, without the name of their part."""
    crops = labelled_crops(dataset, config, config.data)
    recordings = np.unique(crops.crops(0, np.arange(len(crops))).recording).tolist()
    recordings += np.unique(crops.crops(1, np.arange(len(crops))).recording).tolist()
    return sorted({dataset.id(i).split("/")[-1] for i in recordings})


@pytest.mark.parametrize("order", ["lp", "pl"])
def test_label_minutes_limit_the_labelled_part_of_a_mixture_and_choose_the_same_recordings_as_alone(
    datasets: tuple[Dataset, Dataset], order: str
) -> None:
    labelled, pseudo = datasets
    alone = trained_ids(labelled, config_of(f"--data.dataset={labelled.location}"))
    expected = sorted(labelled.id(int(i)) for i in choose_labelled(labelled, labelled.select("train"), 0.3, 3))
    assert alone == expected
    minutes = sum(int(labelled.frames[labelled.index.find(id)]) for id in alone) / 6000
    assert 0 < minutes <= 0.3
    group, config = mixture_of(labelled, pseudo, order)
    pseudo_ids = {pseudo.id(i) for i in range(len(pseudo))}
    assert set(trained_ids(group, config)) == set(alone) | pseudo_ids and not set(alone) & pseudo_ids


def test_pseudo_labels_have_their_weight_of_the_audio(datasets: tuple[Dataset, Dataset]) -> None:
    group, config = mixture_of(*datasets)
    crops = labelled_crops(group, config, config.data)
    epochs = [crops.crops(epoch, np.arange(len(crops))) for epoch in range(40)]
    frames = np.concatenate([epoch.stop - epoch.start for epoch in epochs])
    is_pseudo = np.concatenate([epoch.recording for epoch in epochs]) >= len(datasets[0])
    assert frames[is_pseudo].sum() / frames.sum() == pytest.approx(0.75, abs=0.05)


def test_a_mixture_of_pseudo_labels_alone_has_no_labels_to_limit(datasets: tuple[Dataset, Dataset]) -> None:
    labelled, pseudo = datasets
    with pytest.raises(UserError, match="none beside pseudo-labels"):
        group, config = mixture_of(labelled, pseudo, "p")
        labelled_crops(group, config, config.data)
