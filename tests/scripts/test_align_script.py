"""tools/align.py: exact word times from a perfect recogniser; equal outputs of one, two and interrupted processes."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from torch import Tensor

from bestrq.alignment.pieces import STAR
from bestrq.long_form.inference import InferenceSettings
from bestrq.training.process import World
from common.errors import UserError
from common.segments import Segments
from common.text import label_text
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.shards.derive import stored_recording
from data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from data.transcripts import Word
from data.word_times.base import check_word_times
from pipelines.recogniser import Recogniser
from tests.gloo import run_distributed
from tests.paths import REPOSITORY
from tests.scripts.test_evaluate import make_export, with_extra_files
from tools import align as script

FEATURES = FeatureSettings()
LETTERS = CharTokenizer(list(" abcdefghijklmnopqrstuvwxyz"))
FRAME = 0.04
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards mix poison of a frozen vine".split()


class PerfectModel:
    """Model that outputs label v at each encoder frame in which mel bin v is 1."""

    encoder = SimpleNamespace(settings=SimpleNamespace(stride=4))

    def to(self, device: Any) -> "PerfectModel":
        return self

    def log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        return (6 * log_mel.unflatten(1, (-1, 4)).mean(dim=2)[..., : LETTERS.vocab_size]).log_softmax(dim=-1)


def make_log_mel(words: Sequence[str], silence: int = 5) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Log-mel of words, with a frame of silence after that of each label, and (start, end) of each word in seconds."""
    labels, times = [0] * silence, []
    for number, word in enumerate(words):
        labels += [*LETTERS.encode(" "), 0] * (number > 0)
        start = len(labels)
        for label in LETTERS.encode(word):
            labels += [label, 0]
        times.append((start * FRAME, (len(labels) - 1) * FRAME))
    labels += [0] * silence
    log_mel = np.zeros((4 * len(labels), FEATURES.num_mels), np.float32)
    log_mel[np.arange(4 * len(labels)), np.repeat(labels, 4)] = 1
    return log_mel, times


def phrase(seed: int, count: int) -> list[str]:
    return [WORDS[i] for i in np.random.default_rng(seed).integers(0, len(WORDS), count)]


GOOD = {f"good-{number:02d}": phrase(number, 5 + 20 * (number == 3) + number) for number in range(10)}


def make_dataset(path: Path) -> Path:
    """Ten recordings that can be aligned, one with word times, and one of each kind that cannot be aligned."""
    timed = [Word("quick", 0.1, 0.2, 0.5), Word("brown", 0.3, 0.4), Word("fox", 0.5, 0.6)]
    with DatasetWriter(path, FEATURES) as writer:
        for number, (id, words) in enumerate(GOOD.items()):
            split = "test" if number < 5 else "train"
            writer.add(Recording(id, " ".join(words), language="en", split=split), make_log_mel(words)[0])
        writer.add(Recording("bad-empty", "...", language="en"), make_log_mel(["fox"])[0])
        writer.add(Recording("bad-foreign", " ".join(phrase(98, 12)), language="en"), make_log_mel(phrase(99, 12))[0])
        writer.add(Recording("bad-long", " ".join(WORDS * 3), language="en"), make_log_mel(WORDS)[0])
        writer.add(Recording("bad-shuffled", " ".join(sorted(WORDS)), language="en"), make_log_mel(WORDS)[0])
        writer.add(Recording("bad-silent", None, language="en"), make_log_mel(WORDS)[0])
        kept = Recording("kept", "quick brown fox", timed, "en", excluded=[(0.0, 0.1)])
        writer.add(kept, make_log_mel(WORDS[1:4])[0])
        marks = "The \u2013 quick, well-bred 4711 fox!"
        writer.add(Recording("marks", marks, language="en"), make_log_mel("the quick well bred number fox".split())[0])
        writer.finish()
    return path


def use_perfect_model() -> None:
    recogniser = Recogniser(cast(Any, PerfectModel()), LETTERS, FEATURES, "recording")
    script.load_recogniser = lambda export: recogniser


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[script.Config]:
    folder = tmp_path_factory.getbasetemp() / "align"
    if not folder.exists():
        (folder / "run").mkdir(parents=True)
        make_export(folder / "run" / "export", FEATURES)
        make_dataset(folder / "data")
    monkeypatch.setattr(script, "load_recogniser", None)  # restored at the end
    use_perfect_model()
    yield script.Config(
        model=str(folder / "run" / "export"),
        out="set by each test",
        data=script.DataSettings(dataset=str(folder / "data")),
        inference=InferenceSettings(context_seconds=2.0, batch_seconds=8.0),
        device="cpu",
    )


def run(config: script.Config, out: Path, **changes: Any) -> Dataset:
    script.align(replace(config, out=str(out), **changes), World())
    return open_dataset(out)


def number_of(dataset: Dataset, id: str) -> int:
    return int(dataset.select(ids=[id])[0])


def test_words_get_times_and_everything_else_is_unchanged(config: script.Config, tmp_path: Path, capsys: Any) -> None:
    aligned, before = run(config, tmp_path / "out"), open_dataset(config.data.dataset)
    assert len(aligned) == len(before)
    for i in range(len(before)):
        new, old = stored_recording(aligned, i), stored_recording(before, i)
        assert replace(new, words=None) == replace(old, words=None)
        assert (aligned.read(i) == before.read(i)).all()
        if new.id in GOOD:
            _, times = make_log_mel(GOOD[new.id])
            assert new.words is not None and [word.word for word in new.words] == GOOD[new.id]
            starts, ends = ([getattr(word, edge) for word in new.words] for edge in ("start", "end"))
            assert starts == pytest.approx([start - 0.04 for start, _ in times], abs=1e-3)
            assert ends == pytest.approx([end + 0.015 for _, end in times], abs=1e-3)
            assert all(word.confidence is not None and word.confidence > 0.8 for word in new.words)
            check_word_times(new.words, int(aligned.frames[i]) / 100, new.id)
        elif new.id == "kept":
            assert new.words == old.words
    assert "aligned: 11 recordings" in capsys.readouterr().out
    assert not (tmp_path / "out.align").exists()
    # The checksums of all blocks of the linked shards are correct.
    assert all(len(aligned.read(i, verify=True)) == aligned.frames[i] for i in range(len(aligned)))


def test_recordings_that_do_not_align_are_listed_and_kept_without_words(config: script.Config, tmp_path: Path) -> None:
    aligned = run(config, tmp_path / "out", words=str(tmp_path / "words.jsonl"))
    lines = (tmp_path / "out" / script.UNALIGNED).read_text().splitlines()
    reasons = {line["id"]: line["reason"] for line in map(json.loads, lines)}
    assert {id: reason.split(":")[0] for id, reason in reasons.items()} == {
        "bad-empty": "the transcript is empty",
        "bad-foreign": "the transcript is not what was heard",
        "bad-long": "the transcript is too long",
        "bad-shuffled": "the transcript is not what was heard",
        "bad-silent": "there is no transcript",
    }
    assert all(aligned.words(number_of(aligned, id)) is None for id in reasons)
    summary = json.loads((tmp_path / "out" / script.SUMMARY).read_text())
    assert summary["unaligned"]["the transcript is not what was heard"] == 2 and summary["left_as_they_were"] == 1
    by_id = {line["id"]: line for line in map(json.loads, (tmp_path / "words.jsonl").read_text().splitlines())}
    assert set(by_id) == {aligned.id(i) for i in range(len(aligned))} - {"kept"}
    assert by_id["bad-long"]["words"] is None and by_id["bad-long"]["reason"] == reasons["bad-long"]
    words = aligned.words(number_of(aligned, "good-03"))
    assert words is not None and len(words) == len(by_id["good-03"]["words"])
    for word, line in zip(words, by_id["good-03"]["words"], strict=True):
        assert line == pytest.approx(word._asdict(), abs=1e-6)


def test_spelling_is_kept_and_words_that_cannot_be_encoded_are_stars(config: script.Config, tmp_path: Path) -> None:
    aligned = run(config, tmp_path / "out")
    words = aligned.words(number_of(aligned, "marks"))
    assert words is not None
    assert [word.word for word in words] == ["The", "\u2013", "quick,", "well-bred", "4711", "fox!"]
    _, times = make_log_mel("the quick well bred number fox".split())
    expected_times = [times[0], None, times[1], (times[2][0], times[3][1]), times[4], times[5]]
    for word, truth in zip(words, expected_times, strict=True):
        if truth is None:
            assert word.start == word.end
        else:
            assert (word.start, word.end) == pytest.approx((truth[0] - 0.04, truth[1] + 0.015), abs=0.09)
    assert words[4].confidence == min(words[3].confidence or 0, words[5].confidence or 0)


def test_existing_word_times_are_replaced_only_with_realign(config: script.Config, tmp_path: Path) -> None:
    aligned = run(config, tmp_path / "out", realign=True)
    words = aligned.words(number_of(aligned, "kept")) or []
    truth = [start - 0.04 for start, _ in make_log_mel(WORDS[1:4])[1]]
    assert [word.start for word in words] == pytest.approx(truth, abs=1e-3)
    only_test = run(config, tmp_path / "test", data=replace(config.data, split="test"))
    with_words = {only_test.id(i) for i in range(len(only_test)) if only_test.words(i)}
    assert with_words == {"kept", *list(GOOD)[:5]} and len(only_test) == len(aligned)


def align_with_perfect_model(world: World, config: script.Config) -> None:
    use_perfect_model()
    script.align(config, world)


def test_two_processes_give_the_dataset_of_one(config: script.Config, tmp_path: Path) -> None:
    one = run(config, tmp_path / "one")
    run_distributed(align_with_perfect_model, 2, replace(config, out=str(tmp_path / "two")))
    assert open_dataset(tmp_path / "two").fingerprint == one.fingerprint
    lists = [(tmp_path / name / script.UNALIGNED).read_text() for name in ("one", "two")]
    assert lists[0] == lists[1] != ""


def test_an_interrupted_alignment_continues(
    config: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config, tmp_path / "whole")
    done: list[int] = []
    original = script.forced_alignment

    def interrupted(*arguments: Any) -> Any:
        if len(done) in (4, 9):
            done.append(0)
            raise KeyboardInterrupt
        done.append(1)
        return original(*arguments)

    monkeypatch.setattr(script, "forced_alignment", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "broken")
        assert not (tmp_path / "broken").exists()
        [log] = (tmp_path / "broken.align").glob("*.jsonl")
        with open(log, "ab") as file:  # a killed process leaves an incomplete line
            file.write(b'{"number": 3, "wor')
    # Interrupted again before the summary is written.
    monkeypatch.setattr(script, "write_json", None)
    with pytest.raises(TypeError):
        run(config, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    monkeypatch.undo()
    use_perfect_model()
    monkeypatch.setattr(script, "forced_alignment", None)
    assert run(config, tmp_path / "broken").fingerprint == whole.fingerprint
    # Each of the 14 recordings with labels was aligned exactly once.
    assert sum(done) == 14
    lists = [(tmp_path / name / script.UNALIGNED).read_text() for name in ("whole", "broken")]
    assert lists[0] == lists[1]


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    config: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, tmp_path / "out")
    monkeypatch.setattr(script, "model_outputs", None)
    run(config, tmp_path / "out")
    for changes in ({"realign": True}, {"alignment": replace(config.alignment, lead_ms=0.0)}):
        with pytest.raises(UserError, match="already exists and is another dataset"):
            run(config, tmp_path / "out", **changes)


def test_invalid_settings_are_refused_before_any_work(
    config: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="model is missing"):
        script.Config(out="x", data=script.DataSettings(dataset="y"))
    with pytest.raises(UserError, match="out is missing: .* --words"):
        script.Config(model="x", data=script.DataSettings(dataset="y"))
    with pytest.raises(UserError, match="no recording with split 'tset'"):
        run(config, tmp_path / "out", data=replace(config.data, split="tset"))
    kept = open_dataset(config.data.dataset)
    with DatasetWriter(tmp_path / "timed", FEATURES) as writer:
        i = number_of(kept, "kept")
        writer.add(stored_recording(kept, i), kept.read(i).astype(np.float32))
        writer.finish()
    with pytest.raises(UserError, match=r"nothing to align: 1 of 1 recordings already have word times.*--realign"):
        run(config, tmp_path / "out", data=script.DataSettings(dataset=str(tmp_path / "timed")))
    other = Recogniser(cast(Any, PerfectModel()), LETTERS, FeatureSettings(low_hz=60.0), "recording")
    monkeypatch.setattr(script, "load_recogniser", lambda export: other)
    with pytest.raises(UserError, match=r"low_hz: 60.0 != 20.0"):
        run(config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["timed"]


@pytest.mark.parametrize("replace_unknown", [False, True])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_labels_of_words_are_those_of_the_text(kind: str, replace_unknown: bool) -> None:
    texts = [" ".join(phrase(seed, 12)) for seed in range(20)]
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer.train(texts, replace_unknown)
    else:
        tokenizer = BPETokenizer.train(texts, 60, replace_unknown)
    text = "The lazy, lazy dog \u2014 mix-jumps over a frozen vine!"
    for transcript in (text, "the lazy [background noise] dog (it \u2019s a frozen fox)"):
        labels = script.labels_of(transcript.split(), tokenizer, "en").ids.tolist()
        assert labels == tokenizer.encode(label_text(transcript, "en"))
    starred = script.labels_of("the \u00e7a 42 fox".split(), tokenizer, "en")
    assert [starred.ids[a:b].tolist() for a, b in zip(starred.first, starred.stop, strict=True)][1:3] == [[STAR]] * 2


def test_the_command_with_an_untrained_recogniser_aligns_no_recording(config: script.Config, tmp_path: Path) -> None:
    """The command line with a real export."""
    command = [sys.executable, "-m", "tools.align", "--model", config.model, "--data.dataset", config.data.dataset]
    options = ["--out", str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]
    run_info = subprocess.run([*command, *options], capture_output=True, text=True, cwd=REPOSITORY)
    assert run_info.returncode == 0, run_info.stderr
    assert "aligned: 0 recordings" in run_info.stdout and "not what was heard" in run_info.stdout
    assert len((tmp_path / "out" / script.UNALIGNED).read_text().splitlines()) == 16


def test_speech_in_excluded_intervals_is_not_aligned(config: script.Config, tmp_path: Path) -> None:
    first, foreign, last = phrase(1, 8), phrase(2, 30), phrase(3, 8)
    parts = [make_log_mel(words) for words in (first, foreign + last, last)]
    lengths = [len(log_mel) / FEATURES.frames_per_second for log_mel, _ in parts]
    excluded = [(lengths[0], lengths[0] + lengths[1])]
    with DatasetWriter(tmp_path / "data", FEATURES) as writer:
        recording = Recording("a", " ".join(first + last), language="en", excluded=excluded)
        writer.add(recording, np.concatenate([log_mel for log_mel, _ in parts]))
        writer.finish()
    data = script.DataSettings(dataset=str(tmp_path / "data"))
    words = run(config, tmp_path / "out", data=data).words(0)
    assert words is not None and [word.word for word in words] == first + last
    starts = [start for start, _ in parts[0][1]] + [sum(lengths[:2]) + start for start, _ in parts[2][1]]
    assert [word.start for word in words] == pytest.approx([start - 0.04 for start in starts], abs=FRAME + 1e-3)


def test_a_dataset_that_cannot_be_linked_is_refused_before_any_work(
    config: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(config.data.dataset)
    dataset.location = "s3://bucket/data"
    monkeypatch.setattr(script, "open_dataset", lambda _: dataset)
    monkeypatch.setattr(script, "model_outputs", None)
    with pytest.raises(UserError, match="s3://bucket/data is not a folder"):
        run(config, tmp_path / "out")
    nothing = script.DataSettings(dataset="s3://bucket/data", split="nothing")
    with pytest.raises(UserError, match="no recording with split 'nothing'"):
        script.align(replace(config, out="", words=str(tmp_path / "words.jsonl"), data=nothing), World())


def test_other_files_in_the_model_folder_have_no_effect(config: script.Config, tmp_path: Path, capsys: Any) -> None:
    run(config, tmp_path / "out")
    capsys.readouterr()
    run(config, tmp_path / "out", model=with_extra_files(config.model, tmp_path / "export"))
    assert "already holds this alignment" in capsys.readouterr().out
