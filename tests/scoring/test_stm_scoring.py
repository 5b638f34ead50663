"""Scoring by time: handmade cases, and a comparison with NIST's sclite if it is installed."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bestrq.scoring.stm import (
    ReferenceSegment,
    assign_words,
    score_as_whole,
    score_by_segments,
    score_segments,
)
from bestrq.scoring.word_errors import ErrorCounts
from bestrq.transcripts.words import TimedWord
from common.errors import UserError

SCLITE = shutil.which("sclite")


def at(word: str, middle: float, width: float = 0.2) -> TimedWord:
    return TimedWord(word, middle - width / 2, middle + width / 2)


def assigned(segments: list[ReferenceSegment], words: list[TimedWord]) -> list[str]:
    """Texts of the scored segments with the words assigned to them: "reference: hypothesis"."""
    return [
        f"{segment.text}: {' '.join(word.word for word in own_words)}".strip()
        for segment, own_words in assign_words(segments, words)
    ]


def ignored(start: float, end: float) -> ReferenceSegment:
    return ReferenceSegment(start, end, "ignore_time_segment_in_scoring", "inter_segment_gap", ignored=True)


def test_words_go_to_the_segment_of_their_midpoint_and_edges_to_the_later_one() -> None:
    segments = [ReferenceSegment(0, 2, "one"), ReferenceSegment(2, 4, "two")]
    words = [TimedWord("a", 0.0, 1.0), TimedWord("long", 1.0, 2.8), TimedWord("late", 1.6, 2.6), at("edge", 2.0, 0.5)]
    assert assigned(segments, words) == ["one: a long", "two: edge late"]


def test_words_in_ignored_segments_are_not_scored_for_any_order_of_segments() -> None:
    scored = [ReferenceSegment(0, 4, "one"), ReferenceSegment(6, 9, "two")]
    # They overlap, and one has zero length.
    ignored_segments = [ignored(3, 6), ignored(3.5, 5), ignored(8, 8), ignored(9, 9.5), ignored(7, 7.5)]
    words = [at("yes", 2.99), at("no", 3.0), at("no", 3.8), at("no", 5.99), at("yes", 6.0), at("no", 7.2),
             at("yes", 7.5), at("yes", 8.0), at("no", 9.2)]  # fmt: skip
    generator = random.Random(0)
    for _ in range(20):
        mixed = [*scored, *ignored_segments]
        generator.shuffle(mixed)
        generator.shuffle(words)
        assert assigned(mixed, words) == ["one: yes", "two: yes yes yes"]
        whole = score_as_whole("talk", mixed, words, "nl")
        assert (whole.reference, whole.hypothesis) == ("one two", "yes yes yes yes")
    assert assigned([ignored(0, 10)], words) == []


def test_a_word_in_two_segments_counts_once_in_the_earlier_one() -> None:
    segments = [ReferenceSegment(2, 4, "inner"), ReferenceSegment(3, 12, "later"), ReferenceSegment(0, 10, "outer")]
    words = [at("a", 1), at("b", 3), at("c", 5), at("d", 10), at("e", 11)]
    assert assigned(segments, words) == ["outer: a b c", "inner:", "later: d e"]


def test_a_segment_of_zero_length_keeps_its_text_and_takes_no_words_of_others() -> None:
    segments = [ReferenceSegment(0, 2, "one"), ReferenceSegment(1, 1, "none"), ReferenceSegment(2, 3, "two")]
    words = [at("a", 0.5), at("b", 1.0), at("c", 2.5)]
    assert assigned(segments, words) == ["one: a b", "none:", "two: c"]
    score = score_by_segments("talk", segments, words, "nl")
    assert score.words == ErrorCounts(substitutions=2, deletions=1, insertions=1)


def test_words_outside_all_segments_are_insertions_in_the_next() -> None:
    segments = [ReferenceSegment(1, 2, "one"), ReferenceSegment(4, 5, "two"), ignored(3.5, 4)]
    words = [at("before", 0.5), at("a", 1.5), at("gap", 3.0), at("hidden", 3.7), at("b", 4.5), at("after", 9.0)]
    assert assigned(segments, words) == ["one: before a", "two: gap b after"]
    assert score_as_whole("talk", segments, words, "nl").hypothesis == "before a gap b after"


def test_channels_are_scored_separately() -> None:
    segments = [
        ReferenceSegment(0, 5, "left words", "anna", channel="1"), ReferenceSegment(0, 5, "right", "bob", channel="2"),
        ReferenceSegment(5, 9, "", ignored=True, channel="2"),
    ]  # fmt: skip
    words = [at("left", 1), at("words", 6)]
    left, right = (score_by_segments("call", segments, words, "nl", channel=channel) for channel in ("1", "2"))
    assert (left.words, left.speaker) == (ErrorCounts(hits=2), "anna")  # the other channel's pause has no effect
    assert (right.words, right.speaker) == (ErrorCounts(substitutions=1), "bob")
    mixed = score_as_whole("call", segments, words, "nl")
    assert (mixed.reference, mixed.hypothesis, mixed.speaker) == ("left words right", "left", "")
    with pytest.raises(UserError, match="'1', '2'"):
        score_by_segments("call", segments, words, "nl", channel="A")


def test_segments_are_aligned_separately_and_whole_recordings_across_segments() -> None:
    segments = [ReferenceSegment(0, 2, "b a"), ReferenceSegment(2, 4, "c d")]
    words = [at("b", 0.5), at("a", 2.1), at("c", 2.5), at("d", 3.5)]  # "a" is recognised a little late
    apart, whole = (score(
        "talk", segments, words, "nl", seconds=4.0
    ) for score in (score_by_segments, score_as_whole))  # fmt: skip
    assert apart.words == ErrorCounts(hits=3, deletions=1, insertions=1)
    assert whole.words == ErrorCounts(hits=4)
    assert (apart.reference, apart.hypothesis, apart.seconds) == (whole.reference, whole.hypothesis, 4.0)
    assert (apart.normaliser, whole.normaliser) == ("unicode", "unicode")


def test_empty_references_empty_hypotheses_and_invalid_times() -> None:
    assert score_by_segments("a", [], [], "nl").words == ErrorCounts()
    assert score_as_whole("a", [], [at("x", 1)], "nl").words == ErrorCounts(insertions=1)
    assert score_by_segments("a", [ReferenceSegment(0, 1, "x y")], [], "nl").words == ErrorCounts(deletions=2)
    for start, end in ((2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))):
        for score in (score_by_segments, score_as_whole):
            with pytest.raises(UserError, match="segment from .* is invalid"):
                score("a", [ReferenceSegment(start, end, "x")], [], "nl")


@pytest.mark.skipif(SCLITE is None, reason="sclite (NIST's SCTK) is not on PATH")
def test_words_are_assigned_to_the_same_segments_as_by_sclite(tmp_path: Path) -> None:
    generator = random.Random(9)
    segments: list[ReferenceSegment] = []
    clock = 0.0
    for n in range(150):
        start = max(0.0, clock + generator.choice([0.0, 0.0, 1.0, -0.6]))  # touching, apart, overlapping
        length = generator.choice([0.0, 0.5, 2.0, 5.0])
        text = " ".join(generator.choices("abcdefgh", k=generator.randrange(1, 8)))
        segments.append(ReferenceSegment(round(start, 2), round(start + length, 2), text, f"s{n:03d}", channel="1"))
        clock = start + length
        if generator.random() < 0.3 and clock >= max(segment.end for segment in segments):
            segments.append(ReferenceSegment(round(clock, 2), round(clock + 2, 2), "", "gap", True, "1"))
            clock += 2
    segments.sort(key=lambda segment: (segment.start, segment.end))
    # On odd thousandths, so that no midpoint is an edge up to rounding.
    words = [at(generator.choice("abcdefgh"), round(clock * k / 900, 2) + 0.003, 0.05) for k in range(900)]
    rows = [
        f"talk 1 {segment.speaker} {segment.start} {segment.end} "
        f"<o,,> {'ignore_time_segment_in_scoring' if segment.ignored else segment.text}"
        for segment in segments
    ]
    (tmp_path / "ref.stm").write_text("\n".join(rows) + "\n")
    rows = [f"talk 1 {word.start:.4f} {word.end - word.start:.4f} {word.word}" for word in words]
    (tmp_path / "hyp.ctm").write_text("\n".join(rows) + "\n")
    command = [str(SCLITE), "-s", "-r", "ref.stm", "stm", "-h", "hyp.ctm", "ctm", "-o", "pralign", "stdout", "-f", "0"]
    report = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    expected = {}
    for speaker, alignment in re.findall(r"^id: \((\w+)-\d+\)\n(.*?)^Eval", report, re.MULTILINE | re.DOTALL):
        words_shown = [word for line in re.findall(r"^HYP: (.*)", alignment, re.MULTILINE) for word in line.split()]
        expected[speaker] = " ".join(word.lower() for word in words_shown if set(word) != {"*"})
    scored = score_segments(segments, words, "nl", channel="1")
    hypotheses = {part.segment.speaker: part.hypothesis for part in scored}
    assert len(hypotheses) == 150 and hypotheses == expected


def test_a_pause_of_one_channel_does_not_ignore_words_of_another_in_a_mix() -> None:
    segments = [
        ReferenceSegment(0, 4, "we talk on", channel="A"),
        ReferenceSegment(0, 9, "", "inter_segment_gap", ignored=True, channel="B"),
    ]
    words = [at("we", 1), at("talk", 2), at("on", 3), at("noise", 6)]
    score = score_as_whole("x", segments, words, "nl")
    assert score.words == ErrorCounts(hits=3)
    assert score_as_whole("x", segments, words, "nl", channel="A").words == ErrorCounts(hits=3, insertions=1)
