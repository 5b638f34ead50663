"""Reference words of an evaluation: entries of `words` that are whole utterances."""

from pathlib import Path

from bestrq.transcripts.formats import TimedTranscript
from bestrq.transcripts.words import TimedWord
from data.format.dataset import open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.transcripts import Word
from pipelines.evaluation_results import evaluate_recording, spread_words
from tests.made_datasets import FEATURES, noise


def test_a_word_keeps_its_times_and_an_utterance_is_spread_evenly() -> None:
    assert spread_words("one", 0.1, 0.7) == [TimedWord("one", 0.1, 0.7)]
    assert spread_words("one two", 1.0, 2.0) == [TimedWord("one", 1.0, 1.5), TimedWord("two", 1.5, 2.0)]
    assert spread_words(" ", 1.0, 2.0) == []


def test_a_joined_recording_is_aligned_word_by_word(tmp_path: Path) -> None:
    """One of four words is wrong; its time is that of its place in the utterance, not that of the hypothesis."""
    words = [Word("ana bela", 0.0, 1.0), Word("cid dora", 2.0, 3.0)]
    with DatasetWriter(tmp_path / "set", FEATURES) as writer:
        writer.add(Recording("a", "ana bela cid dora", words, "pt"), noise(300))
        writer.finish()
    starts = zip("ana bela cid eva".split(), (0.0, 0.2, 0.4, 0.6), strict=True)
    spoken = [TimedWord(word, second, second + 0.1) for word, second in starts]
    transcript = TimedTranscript("a", 3.0, "ana bela cid eva", spoken)
    scored = evaluate_recording(open_dataset(tmp_path / "set"), 0, transcript, None, [])
    assert scored.score.words.errors == 1
    assert [(word.reference, word.hypothesis) for word in scored.alignment] == [
        ("ana", "ana"), ("bela", "bela"), ("cid", "cid"), ("dora", "eva")
    ]  # fmt: skip
    assert 2.5 <= scored.alignment[-1].time <= 3.0 and 0.5 <= scored.alignment[1].time <= 1.0
