"""File formats of transcripts: readers of each format recover the written words and times, for any input."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq.transcripts.formats import WRITERS, TimedTranscript
from bestrq.transcripts.subtitles import SubtitleSettings, make_cues, srt_text, vtt_text
from bestrq.transcripts.words import TimedWord, disjoint
from common.config import parse
from common.errors import UserError
from data.word_times.alignments import read_words_json
from data.word_times.base import SILENCES
from data.word_times.ctm import read_ctm
from data.word_times.textgrid import read_textgrid

PLAIN = SubtitleSettings()


@dataclass
class TranscriptConfig:
    """Settings of a script with subtitles."""

    subtitles: SubtitleSettings = field(default_factory=SubtitleSettings)


# Excluded, as no tokenizer writes them: white space, control characters, and the silence marks of forced aligners.
LETTERS = st.characters(exclude_categories=("Cs", "Cc", "Z"))
WORDS = st.text(LETTERS, min_size=1, max_size=12).filter(lambda word: word.lower() not in SILENCES and word.strip())
NO_MARKS = WORDS.filter(lambda word: not word.startswith("<") and word != "@")


@st.composite
def word_sequences(draw: st.DrawFn, word: st.SearchStrategy[str] = WORDS) -> list[TimedWord]:
    """Words sorted by start; some start together, are empty or overlap the next one, like those of a transducer."""
    words, start = [], 0
    for _ in range(draw(st.integers(0, 12))):
        start += draw(st.sampled_from([0, 0, 1, 40, 700, 3000])) + draw(st.integers(0, 3))
        length = draw(st.sampled_from([0, 1, 40, 80, 8000]))
        confidence = draw(st.none() | st.integers(0, 1000).map(lambda share: share / 1000))
        words.append(TimedWord(draw(word), start / 1000, (start + length) / 1000, confidence))
    return words


def separated(words: Sequence[TimedWord]) -> list[TimedWord]:
    """Words without overlaps, which readers of CTM and JSON require."""
    times = disjoint(words)
    return [TimedWord(w.word, a / 1000, b / 1000, w.confidence) for w, (a, b) in zip(words, times, strict=True)]


def written(form: str, words: Sequence[TimedWord], folder: Path, seconds: float = 60.0, limits: SubtitleSettings = PLAIN
            ) -> Path:  # fmt: skip
    path = folder / f"talk.{form}"
    text = " ".join(word.word for word in words)
    path.write_bytes(WRITERS[form](TimedTranscript("day 1/talk", seconds, text, words), limits).encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transcripts")


@given(word_sequences())
@settings(max_examples=60, deadline=None)
def test_disjoint_words_are_not_empty_and_do_not_overlap(words: list[TimedWord]) -> None:
    for duration in (None, max(30_000, len(words)), max(len(words), 1)):
        times = disjoint(words, duration)
        assert all(start < end for start, end in times) and len(times) == len(words)
        assert all(end <= start for (_, end), (start, _) in zip(times, times[1:], strict=False))
        assert not times or (times[0][0] >= 0 and (duration is None or times[-1][1] <= duration))


def test_words_that_are_already_disjoint_keep_their_times() -> None:
    words = [TimedWord("a", 0.1, 0.4), TimedWord("b", 0.4, 0.9), TimedWord("c", 2.0, 2.04)]
    assert disjoint(words) == disjoint(words, 3000) == [(100, 400), (400, 900), (2000, 2040)]


def test_words_of_the_same_frame_divide_it() -> None:
    words = [TimedWord(letter, 0.4, 0.44) for letter in "abc"]
    assert disjoint(words) == [(400, 401), (401, 402), (402, 440)]
    assert disjoint(words, 402) == [(399, 400), (400, 401), (401, 402)]


@given(word_sequences(NO_MARKS))
@settings(max_examples=60, deadline=None)
def test_ctm_keeps_words_times_and_confidence(folder: Path, words: list[TimedWord]) -> None:
    words = separated(words)
    read = read_ctm(written("ctm", words, folder))
    assert read == ({"day_1/talk": [(w.word, w.start, w.end, w.confidence) for w in words]} if words else {})


def test_ctm_lines_are_those_of_nist(folder: Path) -> None:
    words = [TimedWord("yes", 11.34, 11.54, 0.994), TimedWord("you", 12.0, 12.34)]
    assert written("ctm", words, folder).read_text().splitlines() == [
        "day_1/talk 1 11.340 0.200 yes 0.994", "day_1/talk 1 12.000 0.340 you"
    ]  # fmt: skip


@given(word_sequences())
@settings(max_examples=60, deadline=None)
def test_json_keeps_words_times_and_confidence(folder: Path, words: list[TimedWord]) -> None:
    path = written("json", words, folder)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["id"], content["seconds"]) == ("day 1/talk", 60.0)
    assert content["text"].split(" ") == [word.word for word in words] or not words
    assert [TimedWord(**word) for word in content["words"]] == words  # also those that overlap
    words = separated(words)
    result = read_words_json(written("json", words, folder))
    assert result == [(w.word, w.start, w.end, w.confidence) for w in words]


@given(word_sequences(), st.sampled_from([0.0, 0.004, 2.5, 60.0]))
@settings(max_examples=60, deadline=None)
def test_a_textgrid_keeps_the_words_and_fills_the_recording(
    folder: Path, words: list[TimedWord], seconds: float
) -> None:
    path = written("TextGrid", words, folder, seconds)
    last = max(round(1000 * seconds), len(words), 1)
    times = [(start / 1000, end / 1000) for start, end in disjoint(words, last)]
    assert [w[:3] for w in read_textgrid(path)] == [(w.word, *t) for w, t in zip(words, times, strict=True)]
    text = path.read_text(encoding="utf-8")
    edges = [float(number) for number in re.findall(r"^ {12}xm(?:in|ax) = (\S+)$", text, re.MULTILINE)]
    starts, ends = edges[::2], edges[1::2]
    assert starts == [0.0, *ends[:-1]] and ends[-1] == last / 1000
    assert all(start < end for start, end in zip(starts, ends, strict=True))
    assert f"intervals: size = {len(starts)}\n" in text and f"intervals [{len(starts)}]:\n" in text


def test_quotes_are_doubled_in_a_textgrid(folder: Path) -> None:
    path = written("TextGrid", [TimedWord('"5"', 0.0, 1.0)], folder)
    assert 'text = """5"""\n' in path.read_text()


CLOCK = re.compile(r"(\d\d+):(\d\d):(\d\d)[,.](\d\d\d) --> (\d\d+):(\d\d):(\d\d)[,.](\d\d\d)")


def parse_cues(text: str) -> list[tuple[int, int, list[str]]]:
    """Cues from blocks between empty lines; the times are in the first or (SRT) the second line of a block."""
    cues = []
    for block in text.removeprefix("WEBVTT\n\n").strip("\n").split("\n\n"):
        lines = block.split("\n")
        if lines[0].isdigit():
            assert int(lines.pop(0)) == len(cues) + 1
        if lines == [""] or lines == ["WEBVTT"]:
            continue
        match = CLOCK.fullmatch(lines[0])
        assert match is not None
        h, m, s, ms, h2, m2, s2, ms2 = (int(number) for number in match.groups())
        cues.append((((h * 60 + m) * 60 + s) * 1000 + ms, ((h2 * 60 + m2) * 60 + s2) * 1000 + ms2, lines[1:]))
    return cues


@st.composite
def subtitle_settings(draw: st.DrawFn) -> SubtitleSettings:
    return SubtitleSettings(
        draw(st.integers(1, 30)), draw(st.integers(1, 3)), draw(st.sampled_from([2.0, 6.0])),
        draw(st.sampled_from([0.0, 1.0, 2.0])), draw(st.sampled_from([0.03, 0.5, 9.0])),
    )  # fmt: skip


@given(word_sequences(), subtitle_settings())
@settings(max_examples=120, deadline=None)
def test_subtitles_keep_every_word_and_their_limits(words: list[TimedWord], limits: SubtitleSettings) -> None:
    cues = make_cues(words, limits)
    assert [word for cue in cues for line in cue.lines for word in line.split(" ")] == [word.word for word in words]
    assert all(cue.start < cue.end for cue in cues)
    assert all(a.end <= b.start for a, b in zip(cues, cues[1:], strict=False))
    times, place = disjoint(words), 0
    for number, cue in enumerate(cues):
        count = sum(len(line.split(" ")) for line in cue.lines)
        cue_times, place = times[place : place + count], place + count
        assert cue.start == cue_times[0][0] and len(cue.lines) <= limits.lines
        assert count == 1 or cue_times[-1][1] - cue.start <= 1000 * limits.longest_seconds
        assert all(len(line) <= limits.line_characters or " " not in line for line in cue.lines)
        pauses = [b[0] - a[1] for a, b in zip(cue_times, cue_times[1:], strict=False)]
        assert all(pause < 1000 * limits.pause_seconds for pause in pauses)
        following = cues[number + 1].start if number + 1 < len(cues) else 10**9
        assert cue.end == min(following, max(cue_times[-1][1], cue.start + round(1000 * limits.shortest_seconds)))


@given(word_sequences(), subtitle_settings())
@settings(max_examples=60, deadline=None)
def test_srt_and_vtt_are_read_as_the_cues_that_were_written(words: list[TimedWord], limits: SubtitleSettings) -> None:
    cues = make_cues(words, limits)
    expected = [(cue.start, cue.end, list(cue.lines)) for cue in cues]
    assert parse_cues(srt_text(cues)) == expected
    vtt = vtt_text(cues)
    assert vtt.startswith("WEBVTT\n") and vtt.count("-->") == len(cues)
    assert not re.search(r"<|&(?!amp;|lt;|gt;)", vtt)
    assert [(a, b, [html.unescape(line) for line in lines]) for a, b, lines in parse_cues(vtt)] == expected


def test_subtitles_have_the_layout_of_the_standards() -> None:
    words = [TimedWord("good", 1.0, 1.4), TimedWord("morning", 1.5, 2.0), TimedWord("<all>", 3723.456, 3723.5)]
    cues = make_cues(words, SubtitleSettings(line_characters=8))
    assert srt_text(cues) == (
        "1\n00:00:01,000 --> 00:00:02,000\ngood\nmorning\n\n2\n01:02:03,456 --> 01:02:04,456\n<all>\n\n"
    )
    assert vtt_text(cues) == (
        "WEBVTT\n\n00:00:01.000 --> 00:00:02.000\ngood\nmorning\n\n01:02:03.456 --> 01:02:04.456\n&lt;all&gt;\n"
    )


@pytest.mark.parametrize("field, value", [
    ("lines", 0), ("line_characters", 0), ("longest_seconds", 0), ("pause_seconds", -1), ("shortest_seconds", 7),
])  # fmt: skip
def test_an_error_of_invalid_settings_names_field_and_value(field: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"subtitles\.{field}\b.*[ :]{value}\b"):
        parse(TranscriptConfig, [f"--subtitles.{field}", str(value)])
