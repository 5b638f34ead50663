"""TED-LIUM: published SPHERE audio and STM, whole talks and segments, and no silent omissions."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fuzzed import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import parse as parse_settings
from common.errors import UserError
from data.corpora.base import Unreadable
from data.corpora.espeak import Synthesizer
from data.corpora.tedlium import TedliumSettings, sources
from data.features import FeatureSettings
from data.names import name_fault
from data.splits.published import published_split
from data.word_times.stm import plain_text, read_stm

FEATURES = FeatureSettings()
DEV, TEST = published_split("tedlium")["dev"], published_split("tedlium")["test"]

# Lines of a talk as in the releases: gaps as a separate speaker, unsorted, marks of all kinds.
LINES = """\
AimeeMullins_2009P 1 inter_segment_gap 0 0.60 <o,,unknown> ignore_time_segment_in_scoring
AimeeMullins_2009P 1 AimeeMullins 1.50 2.25 <o,f0,female> and {NOISE} i don 't a(2) <unk> 's know (2) {UH}
AimeeMullins_2009P 1 AimeeMullins 0.60 1.20 <o,f0,female> i 'd like to(3) share
AimeeMullins_2009P 1 AimeeMullins 1.20 1.50 <NA> ignore_time_segment_in_scoring
AimeeMullins_2009P 1 AimeeMullins 2.25 2.40 <o,f0,female> {BREATH} {SMACK}
"""
FUZZ = settings(max_examples=300, deadline=None, database=None)


def speech(seconds: float) -> np.ndarray:
    """float32 at 16 kHz."""
    with Synthesizer("en-us") as voice:
        audio, _ = voice.speak("share with you a discovery that i made".split())
        rate = voice.sample_rate
    at = np.arange(int(seconds * 16000)) / 16000 * rate
    return np.interp(at, np.arange(len(audio)), audio).astype(np.float32)


@pytest.fixture(scope="module")
def sphere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "talk.sph"
    soundfile.write(path, speech(2.5), 16000, format="NIST", subtype="PCM_16")
    assert path.read_bytes()[:8] == b"NIST_1A\n"
    return path


def add_talk(folder: Path, split: str, talk: str, sphere: Path, lines: str = LINES) -> None:
    for kind in ("sph", "stm"):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
    (folder / split / "sph" / f"{talk}.sph").symlink_to(sphere)  # as in release 3
    (folder / split / "stm" / f"{talk}.stm").write_text(lines.replace("AimeeMullins_2009P", talk))


@pytest.fixture
def release(tmp_path: Path, sphere: Path) -> Path:
    folder = tmp_path / "TEDLIUM_release1"
    for split, talks in (("train", ["AaronHuey_2010X"]), ("dev", DEV), ("test", TEST)):
        for talk in talks:
            add_talk(folder, split, talk, sphere)
    return folder


def test_dev_has_8_talks_and_test_11(release: Path) -> None:
    found = sources(TedliumSettings(folder=str(release)))
    assert len(DEV) == 8 and len(TEST) == 11 and len(found) == 20
    assert [source.id for source in found] == sorted(["AaronHuey_2010X", *DEV, *TEST])
    assert {source.id for source in found if source.recording.split == "test"} == set(TEST)


def test_a_talk_has_its_text_in_time_order_and_its_ignored_segments_excluded(release: Path) -> None:
    source = next(s for s in sources(TedliumSettings(folder=str(release))) if s.id == "AimeeMullins_2009P")
    recording = source.recording
    assert recording.text == "i'd like to share and i don't a 's know"
    assert recording.excluded == [(0.0, 0.6), (1.2, 1.5)]
    assert (recording.speaker, recording.language, recording.words) == ("AimeeMullins", "en", None)
    waveform = source.load(FEATURES).waveform
    assert torch.allclose(waveform, torch.from_numpy(speech(2.5)), atol=1e-4)


def test_an_utterance_is_a_segment_and_wordless_segments_are_left_out(release: Path) -> None:
    settings = TedliumSettings(folder=str(release), unit="segments", splits=["test"])
    found = [source for source in sources(settings) if source.id.startswith("AimeeMullins")]
    assert [(s.id, s.recording.text) for s in found] == [
        ("AimeeMullins_2009P-0000060-0000120", "i'd like to share"),
        ("AimeeMullins_2009P-0000150-0000225", "and i don't a 's know"),
    ]
    assert all(s.recording.excluded is None and s.recording.speaker == "AimeeMullins" for s in found)
    waveform = found[1].load(FEATURES).waveform
    assert torch.allclose(waveform, torch.from_numpy(speech(2.5)[24000:36000]), atol=1e-4)


def test_release_3_has_two_partitions(tmp_path: Path, sphere: Path) -> None:
    folder = tmp_path / "TEDLIUM_release-3"
    for talk in DEV:
        add_talk(folder / "legacy", "dev", talk, sphere)
    add_talk(folder / "speaker-adaptation", "dev", "AnotherTalk_2012", sphere)
    legacy = TedliumSettings(folder=str(folder), splits=["dev"])
    assert [source.id for source in sources(legacy)] == sorted(DEV)
    other = TedliumSettings(folder=str(folder), splits=["dev"], partition="speaker-adaptation")
    assert [source.id for source in sources(other)] == ["AnotherTalk_2012"]  # not the published list
    direct = TedliumSettings(folder=str(folder / "legacy"), splits=["dev"])
    assert len(sources(direct)) == 8


def test_an_incomplete_evaluation_set_is_refused_unless_allowed(release: Path) -> None:
    for kind in ("sph", "stm"):
        (release / "test" / kind / f"{TEST[3]}.{kind}").unlink()
    with pytest.raises(UserError, match=f"test lacks 1 of the 11 published talks: {TEST[3]}.*--incomplete"):
        sources(TedliumSettings(folder=str(release)))
    assert len(sources(TedliumSettings(folder=str(release), incomplete=True))) == 19


@pytest.mark.parametrize("kind", ["sph", "stm"])
def test_a_talk_without_audio_or_transcript_is_named(release: Path, kind: str) -> None:
    (release / "dev" / kind / f"{DEV[0]}.{kind}").unlink()
    with pytest.raises(UserError, match=rf"dev/{kind} lacks 1 \.{kind} files: {DEV[0]}"):
        sources(TedliumSettings(folder=str(release)))


def test_a_truncated_sphere_file_makes_its_talk_unusable(release: Path, sphere: Path) -> None:
    path = release / "train/sph/AaronHuey_2010X.sph"
    path.unlink()
    path.write_bytes(sphere.read_bytes()[: 1024 + 20000])
    source = sources(TedliumSettings(folder=str(release), splits=["train"]))[0]
    with pytest.raises(UserError, match=r"AaronHuey_2010X\.sph: truncated, has 10000 of about 40000 samples"):
        source.load(FEATURES)


def test_tedlium_mistakes_are_named(release: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder is empty"):
        sources(TedliumSettings())
    with pytest.raises(UserError, match="has no folder 'train'.*--splits"):
        sources(TedliumSettings(folder=str(tmp_path)))
    with pytest.raises(UserError, match="unit is 'talk', expected one of talks, segments"):
        parse_settings(TedliumSettings, ["--unit=talk"])
    with pytest.raises(UserError, match="splits is 'eval'"):
        parse_settings(TedliumSettings, ["--splits=[eval]"])
    (release / "train/stm/AaronHuey_2010X.stm").write_text("")
    with pytest.raises(UserError, match=r"AaronHuey_2010X\.stm: holds no segment"):
        sources(TedliumSettings(folder=str(release)))
    (release / "train/stm/AaronHuey_2010X.stm").write_text("a 1 s 0 1 x\nb 1 s 0 1 x\n")
    with pytest.raises(UserError, match=r"AaronHuey_2010X\.stm: segments of 2 recordings"):
        sources(TedliumSettings(folder=str(release)))


# --- STM


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("i 'm sure we 've seen it don 't", "i'm sure we've seen it don't"),
        ("the students ' work it 's", "the students' work it's"),
        ("'cause i told 'em 'til", "'cause i told 'em 'til"),
        ("'s first", "'s first"),
        ("<unk> 's {NOISE}and[laughs] a(2) b(13)", "'s and a b"),
        ("(2) f(x) (", "f(x) ("),
        ("", ""),
    ],
)
def test_marks_are_removed_and_clitics_joined(written: str, plain: str) -> None:
    assert plain_text(written) == plain


def test_stm_lines_are_sorted_and_comments_and_labels_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.stm"
    path.write_bytes(
        b'\xef\xbb\xbf;; CATEGORY "0"\r\nb A s2 3 4.5 <unk> word\r\na 1 s1 7 8 <o,f0,male>\r\n\r\n'
        b"a 1 s1 2 6 <o,,x> Ignore_Time_Segment_In_Scoring\r\na 1 Inter_Segment_Gap 6 7 <o,,x>\r\n"
    )
    first, gap, second, third = read_stm(path)
    assert (gap.start, gap.ignored, gap.text) == (6.0, True, "")
    assert (first.start, first.ignored, first.label) == (2.0, True, "o,,x")
    assert (second.start, second.ignored, second.label, second.text) == (7.0, False, "o,f0,male", "")
    assert (third.recording, third.channel, third.label, third.text) == ("b", "A", "unk", "word")


@pytest.mark.parametrize("marker", ["ignore_time_segment_in_scoring", "IGNORE_TIME_SEGMENT_IN_SCORING"])
@pytest.mark.parametrize("label", ["", "<> ", "<>\t", "<NA> ", "<o,f0,male> ", "<o,,> ", "<o, f0, x> ", "< > ", "<X>"])
def test_any_field_in_angle_brackets_is_a_label_and_ignored_segments_need_none(
    tmp_path: Path, label: str, marker: str
) -> None:
    path = tmp_path / "a.stm"
    path.write_text(f"a 1 s 0 1 {label}{marker} \r\na\t1\ts\t1\t2\t{label}two words\na 1 s 2 3 {label}<unk> x\n")
    ignored, said, event = read_stm(path)
    assert ignored.ignored and not said.ignored and said.text == "two words"
    assert ignored.label == said.label == label.strip(" \t<>")
    assert plain_text(event.text) == "x"


@pytest.mark.parametrize("text", ["<5 or so and >6", "a <> b", "a ignore_time_segment_in_scoring", "> x", "<"])
def test_text_with_angle_brackets_is_no_label(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.stm"
    path.write_text(f"a 1 s 0 1 {text}\n")
    (segment,) = read_stm(path)
    assert (segment.label, segment.text, segment.ignored) == ("", text, False)


def test_a_training_talk_with_an_unreadable_stm_is_skipped(release: Path, sphere: Path) -> None:
    for talk in ("One_2001", "Two_2002"):
        add_talk(release, "train", talk, sphere, "")
    add_talk(release, "train", "Three_2003", sphere)
    (release / "train/stm/Two_2002.stm").write_text("a 1 s 0 1 fine\n".replace("a", "Two_2002"))
    (release / "train/stm/._Two_2002.stm").write_bytes(b"\x00\x05\x16\x07")
    found = sources(TedliumSettings(folder=str(release)))
    bad = [source for source in found if isinstance(source, Unreadable)]
    assert len(found) == 23 and [source.id for source in bad] == ["One_2001"] and "no segment" in bad[0].reason
    (release / "test/stm" / f"{TEST[0]}.stm").write_text("")  # error rates of the remaining talks are not comparable
    with pytest.raises(UserError, match="holds no segment"):
        sources(TedliumSettings(folder=str(release)))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a 1 s 0", "4 fields"),
        ("a 1 s 0 x <o> t", "'x' is not a number"),
        ("a 1 s -1 2 t", "must start at 0"),
        ("a 1 s 3 2 t", "from 3.0 to 2.0 s"),
        ("a 1 s nan 2 t", "must start at 0"),
        ("a 1 s 0 inf t", "must start at 0"),
        ("a 1 s 0 1 \x00", "control character"),
    ],
)
def test_a_bad_stm_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "a.stm"
    path.write_text(f"a 1 s 0 1 t\n{line}\n")
    with pytest.raises(UserError, match=rf"a\.stm:2: .*{complaint}"):
        read_stm(path)


@FUZZ
@given(st.data())
def test_a_damaged_stm_gives_segments_or_one_error_with_its_place(data: st.DataObject) -> None:
    path = damaged(data, LINES.encode(), "fuzzed.stm")
    try:
        segments = read_stm(path)
    except UserError as error:
        assert str(error).startswith(str(path))
        return
    assert segments == sorted(segments, key=lambda s: (s.recording, s.start, s.end))
    for segment in segments:
        assert 0 <= segment.start <= segment.end < float("inf")
        assert name_fault(f"x{plain_text(segment.text)}") is None
