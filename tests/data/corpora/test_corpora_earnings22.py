"""Earnings-22: words with times and confidences, events, spoken forms, two separate sets of calls."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fuzzed import damaged, damaged_json
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import parse as parse_settings
from common.errors import UserError
from data.corpora.earnings22 import Earnings22FullSettings, Earnings22Settings, sources, sources_full
from data.corpora.espeak import Synthesizer
from data.corpora.nlp_tokens import NlpToken, read_nlp, read_normalizations, timed_words, transcript_units
from data.corpora.registry import CORPORA
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.names import name_fault
from data.prepare.prepare import main
from data.splits.published import published_split
from data.transcripts import Word
from data.word_times.base import check_word_times
from tests.paths import REPOSITORY

FEATURES = FeatureSettings()
FIXTURES = REPOSITORY / "tests/fixtures/earnings22"
CALL = "4420696"
LISTS = published_split("earnings22")
OTHER = "MTN-Ghana-2021-Third-Quarter-Results-Call"
METADATA = (
    "File ID,Ticker Symbol,Country by Ticker,UN Defined,Major Dialect Family,Language Family + Area Based,"
    "File Length (seconds),Sampling Rate (Hz)\n"
)
PLAIN = "token|speaker|ts|endTs|punctuation|prepunctuation|case|tags\r\n"
ALIGNED = PLAIN.rstrip() + "|oldTs|oldEndTs|ali_comment\r\n"
FUZZ = settings(max_examples=250, deadline=None, database=None)


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(lines).encode())
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published repository: 12 listed calls and another one, at different rates; one has its real transcripts."""
    folder = tmp_path_factory.mktemp("speech-datasets") / "earnings22"
    with Synthesizer("en-us") as voice:
        audio, _ = voice.speak("greetings i am peter".split())
        rate = voice.sample_rate
    rows = []
    for number, id in enumerate([*LISTS["dev"], *LISTS["test"], OTHER]):
        new_rate = (16000, 22050, 44100)[number % 3]
        at = np.arange(int(len(audio) / rate * new_rate)) / new_rate * rate
        path = folder / "media" / f"{id}.mp3"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.interp(at, np.arange(len(audio)), audio), new_rate, format="MP3")
        rows.append(f'{id},T{number},"Korea, Republic of",Asia,Other,Asian,{1 + number},{new_rate}\n')
        kinds = folder / "transcripts"
        if id == CALL:
            for name, kind in (
                (f"nlp_references/{id}.nlp", "nlp"),
                (f"force_aligned_nlp_references/{id}.aligned.nlp", "aligned.nlp"),
                (f"normalizations/{id}.norm.json", "norm.json"),
            ):
                write(kinds / name, (FIXTURES / f"{CALL}.{kind}").read_bytes().decode())
            continue
        write(
            kinds / f"nlp_references/{id}.nlp", PLAIN, "Q1|1|||.||CA|['0:ALPHANUMERIC']\r\n", "<noise>|1|||||N/A|[]\r\n"
        )
        norm = {"0": {"candidates": [{"probability": 1.0, "verbalization": ["Q", "one"]}], "class": "ALPHANUMERIC"}}
        write(kinds / f"normalizations/{id}.norm.json", json.dumps(norm, indent=2))
        if number % 2:
            lines = ["Q|1|0.1|0.2|||CA|['0:ALPHANUMERIC']|||\r\n", "one|1|0.2|0.4|.||LC|['0:ALPHANUMERIC']|||\r\n"]
            write(kinds / f"force_aligned_nlp_references/{id}.aligned.nlp", ALIGNED, *lines)
    write(folder / "metadata.csv", METADATA, *rows)
    return folder


def call_words(text: str = "written", punctuation: bool = True) -> list[Word]:
    spoken = read_normalizations(FIXTURES / f"{CALL}.norm.json") if text == "spoken" else None
    units = list(transcript_units(read_nlp(FIXTURES / f"{CALL}.nlp"), spoken, punctuation))
    return timed_words(units, read_nlp(FIXTURES / f"{CALL}.aligned.nlp"), CALL)


# --- the two corpora


def test_the_lists_are_the_6_and_6_calls_and_the_full_set_has_another_name(published: Path) -> None:
    assert LISTS["dev"] == ("4420696", "4448760", "4461799", "4469836", "4473238", "4482110")
    assert LISTS["test"] == ("4432298", "4450488", "4470290", "4479741", "4483338", "4485244")
    listed = CORPORA["earnings22"].sources(Earnings22Settings(folder=str(published)))
    assert {s.id: s.recording.split for s in listed} == {id: split for split in LISTS for id in LISTS[split]}  # type: ignore[attr-defined]
    everything = CORPORA["earnings22-full"].sources(Earnings22FullSettings(folder=str(published)))
    assert [source.id for source in everything] == sorted([*LISTS["dev"], *LISTS["test"], OTHER])
    assert {source.recording.split for source in everything} == {"test"}  # type: ignore[attr-defined]
    only_test = sources(Earnings22Settings(folder=str(published), splits=["test"]))
    assert [source.id for source in only_test] == sorted(LISTS["test"])


def test_a_call_has_text_words_country_and_audio_at_any_sampling_rate(published: Path) -> None:
    listed = sources(Earnings22Settings(folder=str(published)))
    recording = next(source.recording for source in listed if source.id == CALL)
    assert recording.text is not None and recording.text.startswith("Greetings. I am Peter Kweon, Head of IR at KB")
    assert recording.words is not None and recording.text == " ".join(word.word for word in recording.words)
    assert (recording.language, recording.speaker) == ("en", "Korea, Republic of")
    seconds = [len(source.load(FEATURES).waveform) / 16000 for source in listed]
    assert max(seconds) - min(seconds) < 0.1 and min(seconds) > 0.5
    dialects = sources(Earnings22Settings(folder=str(published), speaker="dialect", punctuation=False))
    assert {source.recording.speaker for source in dialects} == {"Other"}
    without_words = [source.recording for source in dialects if source.recording.words is None]
    assert without_words and {recording.text for recording in without_words} == {"Q1"}


def test_the_papers_layout_gives_the_same_calls_without_events_or_times(published: Path, tmp_path: Path) -> None:
    texts = {}
    for split, ids in LISTS.items():
        for id in ids:
            texts[id] = f"call <inaudible> {id}\n<crosstalk>"
            path = tmp_path / f"earnings-22/{split}_original/{id}.mp3"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(published / "media" / f"{id}.mp3")
    folder = tmp_path / "earnings-22"
    write(folder / "full_transcripts.json", json.dumps(texts))
    listed = sources(Earnings22Settings(folder=str(folder)))
    assert {s.id: s.recording.split for s in listed} == {id: split for split in LISTS for id in LISTS[split]}
    assert [s.recording.text for s in listed] == [f"call {id}" for id in sorted(texts)]
    assert all(s.recording.words is None and len(s.load(FEATURES).waveform) > 8000 for s in listed)
    with pytest.raises(UserError, match="the full set needs the published repository"):
        sources_full(Earnings22FullSettings(folder=str(folder)))
    with pytest.raises(UserError, match="text is 'spoken'"):
        sources(Earnings22Settings(folder=str(folder), text="spoken"))
    write(folder / "full_transcripts.json", json.dumps(dict(list(texts.items())[1:])))
    with pytest.raises(UserError, match=r"full_transcripts\.json: no text for the call 4420696"):
        sources(Earnings22Settings(folder=str(folder)))


def test_missing_calls_and_git_lfs_pointers_are_named(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("metadata.csv", "transcripts"):
        (folder / name).symlink_to(published / name)
    (folder / "media").mkdir()
    with pytest.raises(UserError, match=r"13 of 13 calls have no audio .*4420696.*expected .*media/4420696\.mp3"):
        sources_full(Earnings22FullSettings(folder=str(folder)))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for id in [*LISTS["dev"], *LISTS["test"]]:
        write(folder / "media" / f"{id}.mp3", pointer)
    with pytest.raises(UserError, match=r"\.mp3: a pointer of git-lfs .*git lfs pull"):
        sources(Earnings22Settings(folder=str(folder)))
    with pytest.raises(UserError, match="folder is empty"):
        sources(Earnings22Settings())
    with pytest.raises(UserError, match="splits is 'train'"):
        parse_settings(Earnings22Settings, ["--splits=[train]"])


def test_a_truncated_mp3_makes_its_call_unusable(published: Path, tmp_path: Path) -> None:
    source = sources(Earnings22Settings(folder=str(published), splits=["test"]))[0]
    damaged_file = tmp_path / "a.mp3"
    damaged_file.write_bytes(source.path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"a\.mp3"):
        type(source)(source.recording, damaged_file).load(FEATURES).waveform  # noqa: B018


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a,b\n", r"metadata\.csv:1: expected the columns File ID"),
        (METADATA + "x,y\n", r"metadata\.csv:2: 2 values where the header has 8"),
        (METADATA + "../x,1,2,3,4,5,6,7\n", r"metadata\.csv:2: File ID is '\.\./x'"),
        (METADATA + "x,1,2,3,4,5,6,7\n" * 2, r"metadata\.csv:3: File ID is 'x'"),
        (METADATA + '"x,1\n', r"metadata\.csv:2: 2 values where the header has 8"),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    write(tmp_path / "metadata.csv", content)
    with pytest.raises(UserError, match=complaint):
        sources_full(Earnings22FullSettings(folder=str(tmp_path)))


# --- words and times


def test_every_written_word_of_a_real_excerpt_has_a_time() -> None:
    assert len(read_nlp(FIXTURES / f"{CALL}.nlp")) == 150 and len(read_nlp(FIXTURES / f"{CALL}.aligned.nlp")) == 179
    words = call_words()
    check_word_times(words, 90.0, CALL)
    assert words[:3] == [
        Word("Greetings.", 10.88, 11.6, 1.0),
        Word("I", 12.09, 12.26, 1.0),  # a contraction spelled out word for word: its time is known
        Word("am", 12.26, 12.42, 1.0),
    ]
    assert words[4] == Word("Kweon,", 12.83, 13.18, 0.0)  # recognised as <unk>
    # Written "2021", aligned as "twenty twenty one", whose inner boundaries are guesses.
    assert words[17] == Word("2021", 17.13, 18.07, 0.0)
    assert words[-1].word == "the" and words[-1].start == 87.73
    assert "COVID-19" in [word.word for word in words]
    assert len(words) == 150 and sum(word.confidence == 0 for word in words) == 14


def test_tagged_tokens_are_replaced_by_spoken_words() -> None:
    written, spoken = call_words(punctuation=False), call_words("spoken", punctuation=False)
    assert [word.word for word in spoken[16:23]] == ["the", "twenty", "twenty", "one", "Q", "one", "earnings"]
    assert [word.word for word in written[16:20]] == ["the", "2021", "Q1", "earnings"]
    assert spoken[17] == Word("twenty", 17.13, 17.47, 0.0) and spoken[19].end == 18.07
    untagged = {"Greetings", "Peter", "shareholders"}
    assert untagged <= {word.word for word in written} & {word.word for word in spoken}
    check_word_times(spoken, 90.0, CALL)


def table(tmp_path: Path, name: str, header: str, *lines: str) -> list[NlpToken]:
    return read_nlp(write(tmp_path / name, header, *(line + "\r\n" for line in lines)))


def test_events_are_not_words_and_deleted_words_are_distributed_over_their_gap(tmp_path: Path) -> None:
    plain = table(
        tmp_path, "a.nlp", PLAIN,
        "<silence>|1|||||N/A|[]", "lead|1|||||LC|[]", "so|1|||,||LC|[]", "<inaudible>|1|||.||N/A|[]",
        "on|1|||||LC|[]", "a|1||||(|LC|[]", "<unk>|1|||||N/A|[]", "day|1|||?||LC|[]", "tail|1|||||LC|[]",
    )  # fmt: skip
    aligned = table(
        tmp_path, "a.aligned.nlp", ALIGNED,
        "lead|1|||||LC|[]|||del", "so|1|1.0|2.0|,||LC|[]|||", "inaudible|1|2.0|2.5|||LC|[]|||,direct",
        "on|1|||||LC|[]|||del", "a|1|||||LC|[]|||del,split_worst", "Yanni|1|3.0|3.5|||UC|[]|||sub(x)",
        "day|1|4.0|4.5|?||LC|[]|||", "tail|1|||||LC|[]|||del",
    )  # fmt: skip
    words = timed_words(list(transcript_units(plain, None, True)), aligned, "a")
    assert words == [
        Word("lead", 0.0, 1.0, 0.0),
        Word("so,", 1.0, 2.0, 1.0),
        Word("on", 2.0, 3.0, 0.0),
        Word("(a", 3.0, 4.0, 0.0),
        Word("day?", 4.0, 4.5, 1.0),
        Word("tail", 4.5, 4.5, 0.0),
    ]


def test_words_after_a_difference_of_the_two_tables_get_their_times(tmp_path: Path) -> None:
    names = [f"w{number}" for number in range(30)]
    plain = table(tmp_path, "a.nlp", PLAIN, *(f"{name}|1|||||LC|[]" for name in names))
    others = names[:10] + ["x", "y", "z"] + names[14:20] + names[21:]
    aligned = table(tmp_path, "b.nlp", ALIGNED, *(f"{w}|1|{t}|{t + 1}|||LC|[]|||" for t, w in enumerate(others)))
    words = timed_words(list(transcript_units(plain, None, False)), aligned, "a")
    sure = {word.word: word.start for word in words if word.confidence}
    assert sure == {w: float(t) for t, w in enumerate(others) if w[0] == "w"}
    check_word_times(words, 30.0, "a")


def test_a_gap_of_any_length_in_the_alignment_affects_no_other_words(tmp_path: Path) -> None:
    """Like call 4484088: words after the gap get their times, although they are common and repeated."""
    generator = random.Random(0)
    names = generator.choices([f"w{number}" for number in range(60)], k=3000)
    plain = table(tmp_path, "a.nlp", PLAIN, *(f"{name}|1|||||LC|[]" for name in names))
    gaps = [*range(200, 260), *range(1000, 1900)]
    aligned_numbers = [n for n in range(3000) if n not in gaps]
    aligned = table(tmp_path, "b.nlp", ALIGNED, *(f"{names[t]}|1|{t}|{t + 1}|||LC|[]|||" for t in aligned_numbers))
    words = timed_words(list(transcript_units(plain, None, False)), aligned, "a")
    right = sum(word.start == t for t, word in enumerate(words) if word.confidence)
    assert [word.word for word in words] == names and right >= 0.99 * len(aligned_numbers)
    assert sum(word.confidence == 1 and word.start != t for t, word in enumerate(words)) <= 10  # at the edges
    check_word_times(words, 3000.0, "a")


def test_a_call_whose_alignment_is_nearly_empty_is_kept_without_word_times(published: Path, tmp_path: Path) -> None:
    """Like call 4453076: all calls are prepared, and the missing times are counted and listed."""
    folder = tmp_path / "earnings22"
    shutil.copytree(published, folder)
    name = f"transcripts/force_aligned_nlp_references/{CALL}.aligned.nlp"
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join(lines[:9]))
    listed = sources_full(Earnings22FullSettings(folder=str(folder)))
    found = {source.id: source.load(FEATURES) for source in listed}
    assert len(found) == 13 and found[CALL].recording.words is None and len(found[CALL].recording.text or "") > 500
    assert re.fullmatch(rf"kept without word times: .*{CALL}\.aligned\.nlp: has \d of the .*", found[CALL].warnings[0])
    (folder / name).write_text("token|no table\n")
    assert main(["earnings22-full", f"--folder={folder}", f"--out={tmp_path / 'out'}", "--workers=1"]) == 0
    warnings = [json.loads(line) for line in (tmp_path / "out/warnings.jsonl").read_text().splitlines()]
    assert CALL in [warning["id"] for warning in warnings] and "no column" in str(warnings)
    assert len(open_dataset(tmp_path / "out")) == 13 and not (tmp_path / "out/skipped.jsonl").exists()


def test_a_gap_in_the_table_of_calls_drops_the_speaker_or_the_row(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "earnings22"
    shutil.copytree(published, folder)
    rows = (folder / "metadata.csv").read_text().splitlines(keepends=True)
    (folder / "metadata.csv").write_text("".join([*rows[:1], rows[1][:20] + "\n", *rows[2:]]))
    listed = sources(Earnings22Settings(folder=str(folder)))
    first = next(source for source in listed if source.id == LISTS["dev"][0])
    assert first.recording.speaker == "" and "kept without its speaker: " in first.warnings[0]
    assert sum(source.recording.speaker == "Korea, Republic of" for source in listed) == 11
    full = sources_full(Earnings22FullSettings(folder=str(folder)))
    assert len(full) == 13 and "metadata.csv:2: 4 values where the header has 8" in full[-1].reason
    (folder / "metadata.csv").unlink()
    assert len(sources(Earnings22Settings(folder=str(folder)))) == 12


def test_only_a_time_out_of_order_becomes_a_guess(tmp_path: Path) -> None:
    starts = [0.0, 1.0, 900.0, 2.0, 3.0, 0.5, 4.0]
    plain = table(tmp_path, "a.nlp", PLAIN, *(f"w{n}|1|||||LC|[]" for n in range(7)))
    aligned = table(tmp_path, "b.nlp", ALIGNED, *(f"w{n}|1|{t}|{t + 0.5}|||LC|[]|||" for n, t in enumerate(starts)))
    words = timed_words(list(transcript_units(plain, None, False)), aligned, "a")
    assert [word.confidence for word in words] == [1, 1, 0, 1, 1, 0, 1]
    assert [word.start for word in words] == [0.0, 1.0, 1.5, 2.0, 3.0, 3.5, 4.0]


def test_a_deleted_word_between_overlapping_words_is_at_the_start_of_the_second(tmp_path: Path) -> None:
    plain = table(tmp_path, "a.nlp", PLAIN, *(f"w{n}|1|||||LC|[]" for n in range(3)))
    lines = ["w0|1|1.0|2.0|||LC|[]|||", "w1|1|||||LC|[]|||del", "w2|1|1.5|2.5|||LC|[]|||"]
    words = timed_words(list(transcript_units(plain, None, False)), table(tmp_path, "b.nlp", ALIGNED, *lines), "a")
    assert words[1] == Word("w1", 1.5, 1.5, 0.0)


def test_the_alignment_of_another_call_is_detected(tmp_path: Path) -> None:
    aligned = table(tmp_path, "b.nlp", ALIGNED, *(f"other{n}|1|{n}|{n}|||LC|[]|||" for n in range(99)))
    units = list(transcript_units(read_nlp(FIXTURES / f"{CALL}.nlp"), None, True))
    with pytest.raises(UserError, match="has 0 of the .* tokens of the transcript; truncated, or of another call"):
        timed_words(units, aligned, CALL)


def test_the_most_probable_spoken_form_is_taken_and_the_first_of_equals(tmp_path: Path) -> None:
    forms = [{"probability": p, "verbalization": words} for p, words in ((0.2, ["a"]), (0.4, ["b", "c"]), (0.4, ["d"]))]
    empty = [{"probability": 1.0, "verbalization": []}]
    path = write(tmp_path / "a.norm.json", json.dumps({"7": {"candidates": forms}, "8": {"candidates": empty}}))
    assert read_normalizations(path) == {"7": ["b", "c"], "8": []}
    tokens = table(tmp_path, "a.nlp", PLAIN, "X|1|||.||CA|['7:Y']", "*|1|||,||N/A|['8:FALLBACK']", "z|1|||||LC|[]")
    assert [words for _, words in transcript_units(tokens, {"7": ["b", "c"], "8": []}, True)] == [
        ["b", "c."],
        [],
        ["z"],
    ]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["a|b\r\n"], r"a\.nlp:1: no column 'token'"),
        ([], r"a\.nlp:1: no column 'token'"),
        ([PLAIN, "x|1\r\n"], r"a\.nlp:2: 2 fields, the first line has 8"),
        ([PLAIN, "|1|||||LC|[]\r\n"], r"a\.nlp:2: an empty token"),
        ([PLAIN, "x|1|||||LC|[1]\r\n"], r"a\.nlp:2: tags are '\[1\]'"),
        ([PLAIN, "x|1|-1|2|||LC|[]\r\n"], r"a\.nlp:2: ts is -1\.0"),
        ([PLAIN, "x|1|1|nan|||LC|[]\r\n"], r"a\.nlp:2: endTs is nan"),
        ([PLAIN, "x|1|one|2|||LC|[]\r\n"], r"a\.nlp:2: 'one' is not a number"),
    ],
)
def test_a_bad_token_table_is_named(tmp_path: Path, lines: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_nlp(write(tmp_path / "a.nlp", *lines))


@pytest.mark.parametrize(
    "content",
    ["[1]", '{"1": 2}', '{"1": {"candidates": []}}', '{"1": {"candidates": [{"probability": 2, "verbalization": []}]}}',
     '{"1": {"candidates": [{"probability": 1, "verbalization": "x"}]}}', "{", "[" * 100000],
)  # fmt: skip
def test_a_bad_normalisation_file_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"a\.norm\.json: "):
        read_normalizations(write(tmp_path / "a.norm.json", content))


# --- fuzz

SHORT = {
    kind: b"\r\n".join((FIXTURES / f"{CALL}.{kind}").read_bytes().split(b"\r\n")[:25])
    for kind in ("nlp", "aligned.nlp")
}
NORM = {
    tag: form
    for tag, form in json.loads((FIXTURES / f"{CALL}.norm.json").read_text()).items()
    if tag in ("15", "27", "131")
}


@FUZZ
@given(st.data())
def test_damaged_token_tables_give_sorted_words_or_one_error_with_its_place(data: st.DataObject) -> None:
    plain = damaged(data, SHORT["nlp"], "fuzzed.nlp")
    aligned = damaged(data, SHORT["aligned.nlp"], "fuzzed.aligned.nlp")
    try:
        units = list(transcript_units(read_nlp(plain), {"15": ["a", "b"], "27": []}, True))
        words = timed_words(units, read_nlp(aligned), str(aligned))
    except UserError as error:
        assert str(error).startswith((str(plain), str(aligned)))
        return
    assert [word.word for word in words] == [word for _, spelled in units for word in spelled]
    check_word_times(words, float("inf"), "fuzzed")


@FUZZ
@given(st.data())
def test_a_damaged_normalisation_file_gives_words_or_one_error_with_its_place(data: st.DataObject) -> None:
    parts = data.draw(st.booleans())  # of the JSON, or any bytes
    content = json.dumps(damaged_json(data, NORM) if parts else NORM).encode()
    path = damaged(data, content, "fuzzed.norm.json", 0 if parts else 4)
    try:
        found = read_normalizations(path)
    except UserError as error:
        assert str(error).startswith(str(path))
        return
    assert all(name_fault(word) is None for words in found.values() for word in words)
