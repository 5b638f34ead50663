"""NeMo manifests: word times, gzip, unreadable lines with the reason; word times next to the files of a folder."""

import gzip
import json
import re
from pathlib import Path

import pytest
import soundfile
from fuzzed import damaged, damaged_json
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.base import Unreadable
from data.corpora.espeak import Synthesizer
from data.corpora.folder import FolderSettings, sources
from data.features import FeatureSettings
from data.transcripts import Word
from data.word_times.base import check_word_times

FUZZ = settings(max_examples=300, deadline=None, database=None)
WORDS = [Word("sea", 0.0, 0.3, 0.8), Word("shells", 0.3, 0.7)]
CTM = "one 1 0.00 0.30 sea 0.8\none 1 0.30 0.40 shells\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """audio/one.wav, of about a second, and its words as NeMo's forced aligner writes them."""
    folder = tmp_path_factory.mktemp("nemo")
    with Synthesizer("en-us") as voice:
        audio, _ = voice.speak(["sea", "shells"])
        (folder / "audio").mkdir()
        soundfile.write(folder / "audio/one.wav", audio, voice.sample_rate)
    (folder / "one.ctm").write_text(CTM)
    return folder


def entry(**more: object) -> dict:
    return {"audio_filepath": "audio/one.wav", "duration": 0.8, "text": "sea shells", "speaker": "s", **more}


def listed(folder: Path, *entries: dict, name: str = "m.json", **more: object) -> list[FileSource]:
    text = "".join(json.dumps(e) + "\n" for e in entries)
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = sources(FolderSettings(manifest=str(folder / name), **more))  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["m.json", "m.jsonl.gz"])
@pytest.mark.parametrize(
    "more",
    [
        {"words_level_ctm_filepath": "one.ctm"},
        {"word_level_ctm_filepath": "one.ctm"},
        {"words": [["sea", 0.0, 0.3, 0.8], ["shells", 0.3, 0.7]]},
        {"words": [{"word": "sea", "start": 0, "end": 0.3, "confidence": 0.8}, ["", 0.3, 0.3], ["shells", "0.3", 0.7]]},
    ],
)
def test_word_times_come_from_a_ctm_or_a_list(folder: Path, name: str, more: dict) -> None:
    (source,) = listed(folder, entry(**more), name=name)
    assert source.recording.words == WORDS
    (stretch,) = listed(folder, entry(offset=0.1, duration=0.7, **more), name=name)
    assert stretch.recording.words == WORDS  # relative to the start of the segment
    (bare,) = listed(folder, entry(**more), name=name, text="none")
    assert (bare.recording.words, bare.recording.text) == (None, None)


def test_absolute_paths_and_parent_folders_are_allowed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "one.wav").symlink_to(folder / "audio/one.wav")
    for name in ("../one.wav", str(folder / "audio/one.wav")):
        (source,) = listed(tmp_path / "manifests", entry(audio_filepath=name))
        assert source.load(FeatureSettings()).recording.text == "sea shells"


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"shard_id": 3}, "a line of a tarred dataset"),
        ({"audio_filepath": ""}, "'' is not the path of an audio file"),
        ({"audio_filepath": "a\0"}, "is not the path of an audio file"),
        ({"audio_filepath": "~nobody-of-that-name/a.wav"}, "nobody-of-that-name"),
        ({"text": "\ud800"}, "is not Unicode text"),
        ({"speaker": ["x"]}, r"speaker is \['x'\]"),
        ({"duration": 10**400}, "duration is 1000.*expected seconds"),
        ({"duration": float("nan")}, "duration is nan"),
        ({"offset": 0.1, "duration": 0}, "needs its duration too"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(folder: Path, more: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"m\.json:2: .*{complaint}"):
        listed(folder, entry(), entry(**more))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"words": "sea shells"}, "words is 'sea shells'"),
        ({"words": [["sea", 0.1]]}, r"words\[0\]: .* is not \[word, start, end\]"),
        ({"words": [["sea", 0.1, 0.2], ["shells", 0.0, 0.1]]}, r"words\[1\]: .*sort the words"),
        ({"words": [["sea", 0.1, 3.0]]}, r"words\[0\]: .*beyond the recording of 0\.80 s"),
        ({"word_level_ctm_filepath": 7}, "expected the path of a CTM"),
        ({"word_level_ctm_filepath": "lost.ctm"}, "lost.ctm: cannot be read"),
    ],
)
def test_unreadable_word_times_are_dropped_with_a_warning(folder: Path, more: dict, complaint: str) -> None:
    (source,) = listed(folder, entry(**more))
    heard = source.load(FeatureSettings())
    assert (heard.recording.text, heard.recording.words) == ("sea shells", None)
    assert re.search(f"kept without word times: .*{complaint}", heard.warnings[0])


def test_an_unreadable_line_is_skipped_and_reported_with_its_number(folder: Path) -> None:
    lines = [json.dumps(entry(offset=n / 10, duration=0.1)) for n in range(3)]
    lines[1:1] = ['{"audio_filepath": "audio/one', json.dumps({"text": "x"})]
    (folder / "m.json").write_text("".join(f"{line}\n" for line in lines))
    found = sources(FolderSettings(manifest=str(folder / "m.json")))
    bad = [source for source in found if isinstance(source, Unreadable)]
    assert len(found) == 5 and [source.id for source in bad] == [f"{folder}/m.json:{n}" for n in (2, 3)]
    assert "m.json:2: not a JSON object" in bad[0].reason and "no 'audio_filepath'" in bad[1].reason
    lines.append(json.dumps({"audio_filepath": "audio/one.wav"}))
    (folder / "m.json").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match="m.json:6: no 'text': add it"):  # required: an error of the whole
        sources(FolderSettings(manifest=str(folder / "m.json")))


@pytest.mark.parametrize("name", ["tarred__OP_0..127_CL_.json", "manifest_{0..7}.json"])
def test_a_family_of_tarred_manifests_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="many files of a tarred dataset"):
        sources(FolderSettings(manifest=str(folder / name)))


def test_files_that_are_missing_are_counted_once_each(folder: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 2 audio files of .*m\.json do not exist: .*lost\.wav\. A relative"):
        listed(folder, entry(), *[entry(audio_filepath="lost.wav", offset=n) for n in range(3)])
    with pytest.raises(UserError, match="1 of 1 audio files"):
        listed(folder, entry(audio_filepath="x" * 5000))


def test_word_times_next_to_the_files_of_a_folder_are_read(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.wav").symlink_to(folder / "audio/one.wav")
        (tmp_path / f"{name}.txt").write_text("sea shells")
    (tmp_path / "a.ctm").write_text(CTM)
    (tmp_path / "b.words.json").write_text(json.dumps(WORDS))
    a, b, c = (source.recording for source in sources(FolderSettings(folder=str(tmp_path))))  # type: ignore[attr-defined]
    assert a.words == b.words == WORDS and c.words is None
    (tmp_path / "c.TextGrid").write_text("no")
    (tmp_path / "a.TextGrid").write_text("no")  # and a.ctm: which of the two?
    a, b, c = (source.load(FeatureSettings()) for source in sources(FolderSettings(folder=str(tmp_path))))
    assert [recording.recording.text for recording in (a, b, c)] == ["sea shells"] * 3
    assert a.recording.words is c.recording.words is None and b.recording.words == WORDS and b.warnings == ()
    assert "c.TextGrid" in c.warnings[0] and "keep one of them" in a.warnings[0]


@FUZZ
@given(data=st.data())
def test_a_damaged_manifest_gives_recordings_or_one_error_with_its_place(data: st.DataObject, folder: Path) -> None:
    audio = str(folder / "audio/one.wav")
    good = entry(audio_filepath=audio, offset=0.1, lang="en", split="dev", words=[list(word) for word in WORDS])
    parts = data.draw(st.booleans())  # of the JSON, or any bytes
    content = json.dumps(damaged_json(data, good) if parts else good).encode()
    path = damaged(data, content, "fuzzed.json", 0 if parts else 4)
    try:
        found = sources(FolderSettings(manifest=str(path), text="optional"))
    except UserError as error:
        assert str(error).startswith(str(path)) or f"manifest {path}" in str(error) or "do not exist" in str(error)
        return
    for source in found:
        recording = source.recording  # type: ignore[attr-defined]
        check_word_times(recording.words or (), float("inf"), recording.id)
        assert f"{recording.text}{recording.language}{recording.speaker}".encode()


def test_lines_with_the_same_start_are_separate_recordings(folder: Path) -> None:
    """Segments of two speakers; a repeated line affects only itself."""
    lines = [entry(offset=0.1, duration=duration) for duration in (0.5, 0.6, 0.5)]
    lines += [entry(), entry(), entry(offset=0.1004, duration=0.7), entry(offset=0.3, duration=0.5)]
    found = listed(folder, *lines)
    names = [source.id for source in found if not isinstance(source, Unreadable)]
    wanted = ["audio/one", "audio/one@0.100", "audio/one@0.100+0.600", "audio/one@0.100+0.700", "audio/one@0.300"]
    assert sorted(names) == wanted
    faults = [source.reason for source in found if isinstance(source, Unreadable)]
    assert [re.findall(r"m\.json:(\d)", reason) for reason in faults] == [["3", "1"], ["5", "4"]]
