"""Readers of word times: correct files are read exactly, invalid ones raise one error with the location."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.shards.inspect import words_between
from data.transcripts import Word
from data.word_times import base
from data.word_times.alignments import lhotse_words, nemo_words, read_words_json
from data.word_times.base import check_word_times
from data.word_times.ctm import read_ctm
from data.word_times.find import find_word_times
from data.word_times.google import read_google_words
from data.word_times.textgrid import read_textgrid

CTM = """;; made by hand
talk-1 A 0.50 0.25 Yes 0.90
talk-1 A 0.75 0.00 I NA lex spk1
talk-1 A 0.80 0.30 [laughter] 0.3 non-lex spk1

talk-1 B 0.60 0.40 \u00fcber
talk-1 A 1.20 0.20 sil
talk-1 A * * <ALT_BEGIN>
talk-1 A 1.50 0.20 gonna 1
talk-1 A * * <ALT>
talk-1 A 1.50 0.10 going
talk-1 A 1.60 0.10 to
talk-1 A * * <ALT_END>
talk-1 A 2.00 0.10 @
talk-2 1 0 1.5 other 0
"""
CTM_WORDS = {
    "talk-1": [
        Word("Yes", 0.5, 0.75, 0.9),
        Word("\u00fcber", 0.6, 1.0),
        Word("I", 0.75, 0.75),
        Word("gonna", 1.5, 1.7, 1.0),
    ],
    "talk-2": [Word("other", 0.0, 1.5, 0.0)],
}

TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2.3
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 2.3
        intervals: size = 5
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 0.9
            text = "say ""hi"" 12 ! <x>"
        intervals [3]:
            xmin = 0.9
            xmax = 1.2
            text = "sp"
        intervals [4]:
            xmin = 1.2
            xmax = 1.9
            text = "l\u00e0"
        intervals [5]:
            xmin = 1.9
            xmax = 2.3
            text = "sil"
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 2.3
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 2.3
            text = "AH0"
    item [3]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 2.3
        points: size = 1
        points [1]:
            number = 1.0
            mark = "click"
""".replace("\n", " \n")  # as Praat ends its lines
TEXTGRID_WORDS = [Word('say "hi" 12 ! <x>', 0.5, 0.9), Word("l\u00e0", 1.2, 1.9)]
SHORT_TEXTGRID = """File type = "ooTextFile short"
"TextGrid"

0
2.3
<exists>
2
"IntervalTier"
"Ann - words"
0
2.3
2
0.5
0.9
"say ""hi"" 12 ! <x>"
0.9
2.3
""
"IntervalTier"
"Bob - words"
0
2.3
1
1.2
1.9
"l\u00e0"
"""


def google(*results: list[dict[str, Any]]) -> dict[str, Any]:
    return {"results": [{"alternatives": [{"transcript": "...", "words": words}]} for words in results]}


def said(word: str, start: str, end: str, **more: Any) -> dict[str, Any]:
    return {"startTime": start, "endTime": end, "word": word, **more}


TAGGED = [said("Yes,", "1.300s", "1.500s", speakerTag=1), said("I", "1.500s", "2s", speakerTag=2, confidence=0.75)]
GOOGLE = google([said("Yes,", "1.300s", "1.500s"), said("I", "1.500s", "2s")], TAGGED)
GOOGLE_WORDS = [Word("Yes,", 1.3, 1.5), Word("I", 1.5, 2.0, 0.75)]

OURS = [["yes", 0.5, 0.75, 0.9], ["I", 0.75, 0.75], {"word": "do", "start": 1, "end": 1.5, "confidence": None}]
OUR_WORDS = [Word("yes", 0.5, 0.75, 0.9), Word("I", 0.75, 0.75), Word("do", 1.0, 1.5)]


def written(path: Path, content: str | bytes | Any) -> Path:
    if isinstance(content, (dict, list)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_ctm_gives_the_words_of_every_recording(tmp_path: Path) -> None:
    assert read_ctm(written(tmp_path / "a.ctm", CTM)) == CTM_WORDS
    assert read_ctm(written(tmp_path / "a.ctm", CTM.encode("utf-8-sig").replace(b"\n", b"\r\n"))) == CTM_WORDS
    assert read_ctm(written(tmp_path / "a.ctm", "")) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("talk A 1.0 0.5", "4 fields"),
        ("talk A one 0.5 x", "'one' is not a number"),
        ("talk A 1_0 0.5 x", "'1_0' is not a number"),
        ("talk A nan 0.5 x", "must start at 0"),
        ("talk A 1.0 nan x", "duration is nan"),
        ("talk A 1.0 -0.5 x", "duration is -0.5"),
        ("talk A -1.0 0.5 x", "must start at 0"),
        ("talk A 1.0 inf x", "duration is inf"),
        ("talk A 0.2 0.5 x", "sort the words"),
        ("talk A 0.6 0.5 x", "overlaps the previous word, which ends at 0.9 s"),
        ("talk A 8.0 2.5 x", "beyond the recording of 9.00 s"),
        ("talk A 1.0 0.5 x 1.5", "confidence is 1.5"),
        ("talk A * * <ALT_END>", "unexpected <ALT_END>"),
        ("talk A 1.0 0.5 " + 70_000 * "x", "longer than 65536 bytes"),
    ],
)
def test_an_invalid_line_of_a_ctm_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path / "a.ctm", ";; comment\ntalk A 0.5 0.4 a\n" + line + "\n")
    with pytest.raises(UserError, match=r"a\.ctm:3: .*" + message.replace(".", r"\.").replace("*", r"\*")):
        read_ctm(path, durations={"talk": 9.0})


def test_a_ctm_that_ends_within_alternatives_or_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="truncated"):
        read_ctm(written(tmp_path / "a.ctm", "t A * * <ALT_BEGIN>\nt A 1 1 x\n"))
    with pytest.raises(UserError, match=r"a\.ctm:2: not UTF-8"):
        read_ctm(written(tmp_path / "a.ctm", b"t A 1 1 x\nt A 2 1 \xe9t\xe9\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_ctm(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", [TEXTGRID, SHORT_TEXTGRID], ids=["long", "short, two speakers"])
def test_a_textgrid_gives_the_intervals_of_the_words_tier(tmp_path: Path, text: str, encoding: str) -> None:
    for newline in ("\n", "\r\n", "\r"):
        path = written(tmp_path / "a.TextGrid", text.replace("\n", newline).encode(encoding))
        assert read_textgrid(path) == TEXTGRID_WORDS


def test_another_tier_of_a_textgrid_can_be_selected(tmp_path: Path) -> None:
    path = written(tmp_path / "a.TextGrid", TEXTGRID)
    assert read_textgrid(path, "Phones") == [Word("AH0", 0.0, 2.3)]
    with pytest.raises(UserError, match=r"no interval tier 'clicks'; the file has \['words', 'phones', 'clicks'\]"):
        read_textgrid(path, "clicks")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("xmin = 1.2", "xmin = 0.3", 29, "sort the words"),
        ("xmin = 1.2", "xmin = 0.6", 29, "overlaps"),
        ("xmax = 1.9", "xmax = 1.1", 29, "interval 1.2 to 1.1 in a tier 0.0 to 2.3"),
        ("xmax = 1.9", "xmax = 5.9", 29, "interval 1.2 to 5.9 in a tier"),
        ("xmax = 1.9", "xmax = 1e999", 29, "interval 1.2 to inf"),
        ("xmax = 1.9", "xmax = nan", 30, 'expected a number, found "l'),
        ("size = 5", "size = 6", 36, 'expected a number, found "IntervalTier"'),
        ("size = 5", "size = 1.5", 14, "1.5 is not a number of"),
        ("size = 3", "size = 99999999999999", 54, "end of the file: truncated"),
        ('"clicks"', '"clicks', 53, "unclosed quote"),
        ("ooTextFile", "ooBinaryFile", None, "not a TextGrid"),
    ],
)
def test_an_error_in_a_textgrid_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, line: int | None, message: str
) -> None:
    path = written(tmp_path / "a.TextGrid", TEXTGRID.replace(old, new, 1))
    with pytest.raises(UserError, match=f"TextGrid:{line or ''}.*{message}"):
        read_textgrid(path)


def test_lines_are_counted_with_any_line_ending(tmp_path: Path) -> None:
    for newline in ("\n", "\r\n", "\r"):
        text = TEXTGRID.replace("xmin = 1.2", "xmin = 0.3").replace("\n", newline)
        with pytest.raises(UserError, match=r"TextGrid:29: .*sort the words"):
            read_textgrid(written(tmp_path / "a.TextGrid", text))


def test_a_textgrid_of_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_textgrid(written(tmp_path / "a.TextGrid", TEXTGRID.encode("latin-1")))


def test_google_words_are_those_of_the_last_result_if_it_has_speakers(tmp_path: Path) -> None:
    assert read_google_words(written(tmp_path / "a.json", GOOGLE)) == GOOGLE_WORDS


def test_google_words_are_those_of_all_results_without_speakers(tmp_path: Path) -> None:
    answer = google([{"endOffset": "0.500s", "word": "oh"}], [said("no", "1s", "1.2s", confidence=0.0)])
    answer["results"].append({"alternatives": []})
    assert read_google_words(written(tmp_path / "a.json", answer)) == [Word("oh", 0.0, 0.5), Word("no", 1.0, 1.2)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "not the output of Google"),
        ({"results": {}}, "not the output of Google"),
        ({"results": [3]}, r"results\[0\].alternatives\[0\].words: not a list"),
        (google([], ["word"]), r"results\[1\].alternatives\[0\].words\[0\]: not an object"),  # type: ignore[list-item]
        (google([said("a", "1s", "2")]), 'expected seconds such as "1.300s"'),
        (google([said("a", "1s", "xs")]), "'x' is not a number"),
        (google([said("a", "1s", "0.5s")]), r"words\[0\]: word 'a' at 1.0 to 0.5 s: .*end after its start"),
        (google([said("a", "1s", "2s"), said("b", "0.5s", "3s")]), r"words\[1\]: word 'b'.*sort the words"),
        (google([said("a", "1s", "2s")], [said("b", "0s", "1s")]), r"results\[1\].*sort the words"),
        (google([said("a", "1s", "90s")]), "beyond the recording of 60.00 s"),
        (google([said("\ud800", "1s", "2s")]), "not Unicode"),
    ],
)
def test_errors_in_google_words_are_named(tmp_path: Path, answer: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"a\.json: .*" + message):
        read_google_words(written(tmp_path / "a.json", answer), duration=60.0)


def test_words_json_is_read_in_each_form(tmp_path: Path) -> None:
    path = tmp_path / "a.words.json"
    assert read_words_json(written(path, OURS)) == OUR_WORDS
    assert read_words_json(written(path, {"words": OURS})) == OUR_WORDS
    assert read_words_json(written(path, GOOGLE)) == GOOGLE_WORDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokens": []}, "expected a list"),
        ([["a", 1]], r"words\[0\]: .* is not \[word, start, end\]"),
        ([["a", 1, 2], ["b", True, 2]], r"words\[1\]: True is not a number"),
        ([["a", 1, 2], ["b", "NaN", 2]], r"words\[1\].*must start at 0"),
        ([["a", 1, 2], [5, 2, 3]], r"words\[1\]: 5 is not a word"),
        ([["a", 1, 2], ["b", 0, 3]], r"words\[1\].*sort the words"),
        ([["a", 1, 2, 2]], r"words\[0\]: confidence is 2.0"),
        ([["a", 0, 10**400]], r"words\[0\]: 1000.* is not a number"),
        (b"[" * 100_000, "not JSON"),
        (b'[["a", 1, 2', "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_errors_in_words_json_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"a\.words\.json: .*" + message):
        read_words_json(written(tmp_path / "a.words.json", content))


def test_a_file_too_large_for_word_times_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LARGEST_FILE", 100)
    for read, name in ((read_words_json, "a.json"), (read_textgrid, "a.TextGrid")):
        with pytest.raises(UserError, match="larger than"):
            read(written(tmp_path / name, " " * 101))


def test_lhotse_alignments_are_shifted_by_the_offset() -> None:
    items = [["yes", 0.5, 0.25, 0.9], ["", 0.75, 0.1, None], ["I", 1.0, 0.5, None], ["do", 1.5, 0.5, -3.2], ["x", 2, 1]]
    assert lhotse_words(items, "cuts.jsonl:3", offset=10.0) == [
        Word("yes", 10.5, 10.75, 0.9),
        Word("I", 11.0, 11.5),
        Word("do", 11.5, 12.0),
        Word("x", 12.0, 13.0),
    ]
    assert lhotse_words([{"symbol": "a", "start": 1, "duration": 1}], "here") == [Word("a", 1.0, 2.0)]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({}, "expected a list"),
        ([["a", 1, 1], ["b", 0, 1]], r"alignment\[1\].*sort the words"),
        ([["", 0, 0], ["a", 1, 1], ["b", 1.5, 1]], r"alignment\[2\].*overlaps"),
        ([["a", 1]], r"alignment\[0\]: .* is not \[symbol"),
        ([["a", None, 1]], r"alignment\[0\]: None is not a number"),
        ([["a", 1, -1]], r"alignment\[0\].*end after its start"),
    ],
)
def test_errors_in_a_lhotse_alignment_are_named(items: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"^cuts\.jsonl:3: .*" + message):
        lhotse_words(items, "cuts.jsonl:3")


def test_nemo_words_are_read_from_the_ctm_of_the_line(tmp_path: Path) -> None:
    (tmp_path / "ctm").mkdir()
    written(tmp_path / "ctm/x.ctm", "x 1 0.10 0.20 yes NA lex NA\nx 1 0.30 0.20 I NA lex NA\n")
    for field in ("word_level_ctm_filepath", "words_level_ctm_filepath"):
        found = nemo_words({"audio_filepath": "x.wav", field: "ctm/x.ctm"}, tmp_path, "m.json:1")
        assert found == [Word("yes", 0.1, 0.3), Word("I", 0.3, 0.5)]
    assert nemo_words({"audio_filepath": "x.wav"}, tmp_path, "m.json:1") is None
    for name, message in (("ctm/y.ctm", "cannot be read"), (7, "expected the path"), ("a\0b", "expected the path")):
        with pytest.raises(UserError, match=message):
            nemo_words({"word_level_ctm_filepath": name}, tmp_path, "m.json:1")
    written(tmp_path / "ctm/two.ctm", "x 1 0.1 0.2 yes\ny 1 0.3 0.2 I\n")
    with pytest.raises(UserError, match="m.json:1: ctm/two.ctm has the words of 2 recordings"):
        nemo_words({"word_level_ctm_filepath": "ctm/two.ctm"}, tmp_path, "m.json:1")
    with pytest.raises(UserError, match="m.json:1: ctm/x.ctm, word 1: .*beyond the recording"):
        nemo_words({"word_level_ctm_filepath": "ctm/x.ctm"}, tmp_path, "m.json:1", duration=0.35)


def test_word_times_are_found_next_to_the_audio(tmp_path: Path) -> None:
    audio_path = tmp_path / "talk-1.part.flac"
    assert find_word_times(audio_path) is None
    for name, content, words in (
        ("talk-1.part.words.json", OURS, OUR_WORDS),
        ("talk-1.part.TextGrid", TEXTGRID, TEXTGRID_WORDS),
        ("talk-1.part.ctm", CTM.replace("talk-2", "talk-1.part"), CTM_WORDS["talk-2"]),
        ("talk-1.part.ctm", "any-name 1 0.5 0.25 yes 0.9", OUR_WORDS[:1]),
        ("talk-1.part.ctm", ";; nothing said", []),
    ):
        path = written(tmp_path / name, content)
        assert find_word_times(audio_path) == words
        path.unlink()
    written(tmp_path / "talk-1.part.ctm", CTM)
    with pytest.raises(UserError, match="2 recordings, none of them 'talk-1.part'"):
        find_word_times(audio_path)
    written(tmp_path / "talk-1.part.words.json", OURS)
    with pytest.raises(UserError, match=r"both talk-1.part.words.json and talk-1.part.ctm"):
        find_word_times(audio_path)


NASTY = (b'"', b"\n", b"-", b"9" * 400, b"nan", b"1e999", b"[", b"{", b"\\ud800", b"\xff", b"\0")
READERS: list[tuple[str, bytes, Callable[[Path], Any]]] = [
    ("ctm", CTM.encode(), lambda path: [word for words in read_ctm(path).values() for word in words]),
    ("long TextGrid", TEXTGRID.encode(), read_textgrid),
    ("short TextGrid", SHORT_TEXTGRID.encode("utf-16"), read_textgrid),
    ("google", json.dumps(GOOGLE).encode(), read_google_words),
    ("ours", json.dumps(OURS).encode(), read_words_json),
    (
        "lhotse",
        json.dumps([["a", 0, 0.5, 0.9], ["b", 1, 1]]).encode(),
        lambda p: lhotse_words(base.read_json(p), str(p)),
    ),
]


@pytest.mark.parametrize(("content", "read"), [reader[1:] for reader in READERS], ids=[reader[0] for reader in READERS])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_valid_words_or_one_error_that_names_it(
    tmp_path: Path, content: bytes, read: Callable[[Path], list[Word]], data: st.DataObject
) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut", "repeat"]))
        if kind == "change" and at < len(damaged):
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            tokens = st.sampled_from(
                [b'"', b"\n", b"-", b"9" * 400, b"nan", b"1e999", b"[", b"{", b"\\ud800", b"\xff", b"\0"]
            )
            damaged[at:at] = data.draw(st.binary(max_size=8) | tokens)
        elif kind == "delete":
            del damaged[at : at + data.draw(st.integers(1, 40))]
        elif kind == "cut":
            del damaged[at:]
        else:
            damaged[at:at] = damaged[at : at + data.draw(st.integers(1, 200))]
    path = written(tmp_path / "damaged", bytes(damaged))
    try:
        words = read(path)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 1000
        return
    for word in words:
        assert word.word and word.word == word.word.strip() and word.word.encode()
        assert 0 <= word.start <= word.end < math.inf and 0 <= (word.confidence or 0) <= 1


TIMES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=30)


@settings(max_examples=150, deadline=None)
@given(TIMES, st.integers(0, 80), st.integers(0, 80))
def test_words_between_equals_a_linear_scan(times: list, start: int, end: int) -> None:
    words = [Word(f"w{i}", a, a + length) for i, (a, length) in enumerate(sorted(times))]
    assert words_between(words, start, end) == [word for word in words if start <= word.start < end]


@settings(max_examples=100, deadline=None)
@given(TIMES, st.randoms())
def test_word_lists_out_of_order_are_detected(times: list, random: Any) -> None:
    words = [(f"w{i}", float(a), float(a + length)) for i, (a, length) in enumerate(sorted(times))]
    shuffled = random.sample(words, len(words))
    check_word_times(words, 100.0, "talk")
    check_word_times([(*word, 1.0) for word in words], 100.0, "talk")
    starts = [word[1] for word in shuffled]
    if starts == sorted(starts):
        return
    with pytest.raises(UserError, match="'talk', word .*sort the words"):
        check_word_times(shuffled, 100.0, "talk")
