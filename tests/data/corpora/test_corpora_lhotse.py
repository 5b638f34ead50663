"""lhotse manifests: the right segment of the right channel, its text, and words with correct times."""

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fuzzed import damaged, damaged_json
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.corpora.base import Unreadable
from data.corpora.espeak import Synthesizer
from data.corpora.json_lines import MAX_LINE_BYTES, json_lines
from data.corpora.lhotse import LhotseSettings, sources
from data.features import FeatureSettings
from data.transcripts import Word
from data.word_times.base import check_word_times

FEATURES = FeatureSettings()
WORDS = "she sells sea shells".split()
FUZZ = settings(max_examples=300, deadline=None, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.wav, of 2 s; two.flac, whose second channel is the reversed first one at half the amplitude."""
    folder = tmp_path_factory.mktemp("audio")
    with Synthesizer("en-us") as voice:
        audio, _ = voice.speak(WORDS)
        rate = voice.sample_rate
    at = np.arange(32000) / 16000 * rate
    samples = np.interp(at, np.arange(len(audio)), audio).astype(np.float32)
    soundfile.write(folder / "one.wav", samples, 16000, subtype="FLOAT")
    soundfile.write(folder / "two.flac", np.stack([samples, samples[::-1] / 2], axis=1), 16000)
    return folder


def recording(folder: Path, channels: int = 1, **more: Any) -> dict:
    name = "one.wav" if channels == 1 else "two.flac"
    held = list(range(channels))
    return {
        "id": name[:3],
        "sources": [{"type": "file", "channels": held, "source": str(folder / name)}],
        "sampling_rate": 16000,
        "num_samples": 32000,
        "duration": 2.0,
        "channel_ids": held,
        **more,
    }


def supervision(id: str, start: float, text: str | None, clock: float | None = None, **more: Any) -> dict:
    """Supervision with 0.4 s per word; `clock`: start of its alignment in the recording."""
    words = (text or "").split()
    fields: dict[str, Any] = {
        "id": id,
        "recording_id": "one",
        "start": start,
        "duration": 0.4 * len(words),
        "channel": 0,
    }
    if text is not None:
        fields |= {"text": text, "language": "en", "speaker": "s1"}
    if clock is not None:
        items = [[w, round(clock + 0.4 * n, 3), 0.3, 0.9 if n else None] for n, w in enumerate(words)]
        fields["alignment"] = {"word": items}
    return {**fields, **more}


def cut(
    folder: Path, id: str, start: float, duration: float, *supervisions: dict, channel: int = 0, **more: Any
) -> dict:
    fields = {"id": id, "start": start, "duration": duration, "channel": channel, "supervisions": list(supervisions)}
    return {**fields, "recording": recording(folder, 1 + channel), "type": "MonoCut", **more}


def write(path: Path, *entries: dict | str) -> str:
    text = "".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(folder: Path) -> np.ndarray:
    return soundfile.read(folder / "one.wav", dtype="float32")[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_cut_is_a_segment_with_its_supervisions_in_time_order(folder: Path, tmp_path: Path, suffix: str) -> None:
    # Supervisions are relative to the start of the cut (0.25 s), their alignments to that of the recording.
    later = supervision("b", 0.95, "sea shells", clock=1.2, speaker="s2")
    manifest = write(
        tmp_path / f"c{suffix}", cut(folder, "c1", 0.25, 1.7, later, supervision("a", 0.1, "she sells", 0.35))
    )
    (source,) = sources(LhotseSettings(cuts=manifest))
    found = source.load(FEATURES)
    assert (found.recording.id, found.recording.text, found.recording.split) == ("c1", "she sells sea shells", "train")
    assert (found.recording.language, found.recording.speaker) == ("en", "")  # two speakers: none
    assert found.recording.words == [
        Word("she", 0.1, 0.4, None),
        Word("sells", 0.5, 0.8, 0.9),
        Word("sea", 0.95, 1.25, None),
        Word("shells", 1.35, 1.65, 0.9),
    ]
    assert torch.equal(found.waveform, torch.from_numpy(read(folder)[4000 : 4000 + 27200]))


def test_manifests_written_by_lhotse_itself_are_read_as_lhotse_reads_them(folder: Path, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    from lhotse.supervision import AlignmentItem

    whole = lhotse.Recording.from_file(folder / "one.wav")
    items = [AlignmentItem(word, 0.1 + 0.4 * n, 0.3, 1.0) for n, word in enumerate(WORDS)]
    said = lhotse.SupervisionSegment("s", "one", 0.1, 1.6, text=" ".join(WORDS), alignment={"word": items})
    cuts = lhotse.CutSet.from_manifests(
        lhotse.RecordingSet.from_recordings([whole]), lhotse.SupervisionSet.from_segments([said])
    )
    (window,) = [c for c in cuts.cut_into_windows(0.9) if c.start > 0][:1]
    cuts.to_file(tmp_path / "whole.jsonl.gz")
    lhotse.CutSet.from_cuts([window]).to_file(tmp_path / "window.jsonl")
    (source,) = sources(LhotseSettings(cuts=str(tmp_path / "whole.jsonl.gz")))
    (part,) = sources(LhotseSettings(cuts=str(tmp_path / "window.jsonl")))
    recorded = source.recording  # type: ignore[attr-defined]
    assert [word.word for word in recorded.words] == WORDS and recorded.words[1].start == pytest.approx(0.5)
    assert torch.equal(source.load(FEATURES).waveform, torch.from_numpy(whole.load_audio()[0]))
    # A window that cuts a supervision has the words whose middle is inside.
    assert (part.recording.text, [w.word for w in part.recording.words]) == ("sea shells", ["sea", "shells"])  # type: ignore[attr-defined]
    assert part.recording.words[0].start == pytest.approx(0.9 - window.start, abs=1e-6)  # type: ignore[attr-defined]
    assert torch.equal(part.load(FEATURES).waveform, torch.from_numpy(window.load_audio()[0]))


def test_each_supervision_may_become_a_recording(folder: Path, tmp_path: Path) -> None:
    a, b = supervision("a", 0.1, "she sells", 0.35), supervision("b", 0.95, "sea shells", 1.2)
    manifest = write(tmp_path / "c.jsonl", cut(folder, "c1", 0.25, 1.7, b, a))
    first, second = sources(LhotseSettings(cuts=manifest, unit="supervisions", split="test"))
    assert [first.id, second.id] == ["a", "b"]
    found = second.load(FEATURES)
    assert (found.recording.text, found.recording.split, found.recording.speaker) == ("sea shells", "test", "s1")
    assert found.recording.words == [Word("sea", 0.0, 0.3, None), Word("shells", 0.4, 0.7, 0.9)]
    assert torch.equal(found.waveform, torch.from_numpy(read(folder)[19200:31200]))


def test_a_cut_reads_only_its_channel(folder: Path, tmp_path: Path) -> None:
    selected, other = supervision("a", 0.0, "mine", channel=[1, 2]), supervision("b", 0.5, "not mine")
    manifest = write(tmp_path / "c.jsonl", cut(folder, "c", 0.5, 1.0, selected, other, channel=1))
    (source,) = sources(LhotseSettings(cuts=manifest))
    found = source.load(FEATURES)
    assert found.recording.text == "mine"
    backwards = torch.from_numpy(read(folder)[::-1][8000:24000].copy()) / 2
    assert torch.allclose(found.waveform, backwards, atol=1e-4)


def test_recordings_with_supervisions_give_every_whole_channel(folder: Path, tmp_path: Path) -> None:
    recordings = write(tmp_path / "r.jsonl.gz", recording(folder), recording(folder, 2))
    supervisions = write(
        tmp_path / "s.jsonl",
        supervision("z", 0.2, "she sells", 0.2),
        supervision("y", 0.0, "left", recording_id="two"),
        supervision("x", 0.0, "right", recording_id="two", channel=1),
    )
    found = sources(LhotseSettings(recordings=recordings, supervisions=supervisions))
    assert [(s.id, s.recording.text) for s in found] == [("one", "she sells"), ("two-0", "left"), ("two-1", "right")]  # type: ignore[attr-defined]
    assert found[0].recording.words[0] == Word("she", 0.2, 0.5, None)  # type: ignore[attr-defined]
    assert [len(s.load(FEATURES).waveform) for s in found] == [32000] * 3
    assert not torch.equal(found[1].load(FEATURES).waveform, found[2].load(FEATURES).waveform)
    bare = sources(LhotseSettings(recordings=recordings, text="none"))
    assert [s.recording.text for s in bare] == [None] * 3  # type: ignore[attr-defined]


def test_splits_have_separate_manifests_and_relative_paths_a_base_folder(folder: Path, tmp_path: Path) -> None:
    manifests = {}
    for split in ("train", "dev", "test"):
        entry = cut(folder, split, 0.0, 2.0, supervision("a", 0.0, "x y"))
        entry["recording"]["sources"][0]["source"] = "one.wav"
        manifests[split] = write(tmp_path / f"{split}.jsonl", entry)
    given = LhotseSettings(
        cuts=manifests["train"], dev_cuts=manifests["dev"], test_cuts=manifests["test"], audio_folder=str(folder)
    )
    assert [(s.id, s.recording.split) for s in sources(given)] == [(s, s) for s in ("dev", "test", "train")]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"1 of 1 audio files .* do not exist: one\.wav.*--audio_folder"):
        sources(LhotseSettings(cuts=manifests["train"]))


def test_unknown_text_is_an_error_or_none_but_never_wrong(folder: Path, tmp_path: Path) -> None:
    beyond = cut(folder, "c", 0.5, 0.5, supervision("a", -0.4, "she sells sea"))  # no alignment
    nothing = cut(folder, "d", 0.0, 1.0)
    for entry in (beyond, nothing):
        manifest = write(tmp_path / "c.jsonl", entry)
        with pytest.raises(UserError, match=r"c\.jsonl:1: .*trim_to_supervisions.*--text optional"):
            sources(LhotseSettings(cuts=manifest))
        (source,) = sources(LhotseSettings(cuts=manifest, text="optional"))
        assert source.recording.text is None and source.recording.words is None  # type: ignore[attr-defined]


def test_words_are_none_unless_all_supervisions_are_aligned(folder: Path, tmp_path: Path) -> None:
    said = [supervision("a", 0.0, "she", 0.0), supervision("b", 1.0, "shells")]
    (source,) = sources(LhotseSettings(cuts=write(tmp_path / "c.jsonl", cut(folder, "c", 0.0, 2.0, *said))))
    assert (source.recording.text, source.recording.words) == ("she shells", None)  # type: ignore[attr-defined]


def changed(entry: dict, path: str, value: Any) -> dict:
    """A copy with one field replaced; "recording.sources.0.type" names it."""
    copy = json.loads(json.dumps(entry))
    *steps, last = path.split(".")
    inner = copy
    for step in steps:
        inner = inner[int(step) if isinstance(inner, list) else step]
    inner[int(last) if isinstance(inner, list) else last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("type", "MultiCut", "a cut of type 'MultiCut', only MonoCut is supported"),
        ("type", "MixedCut", "a cut of type 'MixedCut', only MonoCut is supported"),
        ("type", None, "a cut of type None"),
        ("id", 3, "id is 3, expected str"),
        ("id", " ", "is empty"),
        ("recording", None, "a cut without a recording"),
        ("recording.sources.0.type", "command", "an audio source of type 'command'"),
        ("recording.sources.0.type", "url", "an audio source of type 'url'"),
        ("recording.sources.0.source", "a\0b", "is not the path of an audio file"),
        ("recording.sources.0.source", "~nobody-of-that-name/x.wav", "nobody-of-that-name"),
        ("recording.sources.0.channels", ["0"], "expected a list of numbers"),
        ("recording.transforms", [{"name": "Speed"}], "transform 'Speed' is not supported"),
        ("recording.transforms", 7, "transform 7 is not supported"),
        ("recording.duration", -2, "duration is -2, expected seconds"),
        ("channel", 4, "channel is 4, which the recording does not have"),
        ("channel", [0], r"channel is \[0\], which the recording does not"),
        ("start", None, "no 'start'"),
        ("supervisions", 5, "supervisions is 5"),
        ("supervisions.0.text", ["x"], r"supervisions\[0\]: text is \['x'\], expected str"),
        ("supervisions.0.start", "0", r"supervisions\[0\]: start is '0', expected seconds"),
        ("supervisions.0.channel", "0", r"supervisions\[0\]: channel is '0'"),
    ],
)
def test_unreadable_entries_are_named_with_their_line(
    folder: Path, tmp_path: Path, path: str, value: Any, complaint: str
) -> None:
    good = cut(folder, "c1", 0.25, 1.7, supervision("a", 0.1, "she sells", 0.35))
    manifest = write(tmp_path / "c.jsonl", {**good, "id": "c0"}, changed(good, path, value))
    with pytest.raises(UserError, match=rf"c\.jsonl:2: .*{complaint}"):
        sources(LhotseSettings(cuts=manifest))


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("supervisions.0.alignment.word", 3, "expected a list of"),
        ("supervisions.0.alignment.word.1", ["sells", 0.1, 0.1, 1], "sort the words"),
        (
            "supervisions.0.alignment.word.1",
            ["sells", 2.3, 0.1, 1],
            "alignments must be relative to the start of the recording",
        ),
    ],
)
@pytest.mark.parametrize("unit", ["cuts", "supervisions"])
def test_an_unusable_alignment_drops_the_times_unless_only_it_gives_the_text(
    folder: Path, tmp_path: Path, path: str, value: Any, complaint: str, unit: Any
) -> None:
    good = cut(folder, "c1", 0.25, 1.7, supervision("a", 0.1, "she sells", 0.35))
    bad = changed(good, path, value)
    (source,) = sources(LhotseSettings(cuts=write(tmp_path / "c.jsonl", bad), unit=unit))
    heard = source.load(FEATURES)
    assert (heard.recording.text, heard.recording.words) == ("she sells", None)
    assert heard.warnings[0].startswith("kept without word times: ") and complaint in heard.warnings[0]
    beyond = {**bad, "duration": 0.6}  # only the alignment gives the text of a part
    with pytest.raises(UserError, match=complaint):
        sources(LhotseSettings(cuts=write(tmp_path / "c.jsonl", beyond)))


@pytest.mark.parametrize("unit", ["cuts", "supervisions"])
def test_an_unreadable_line_is_skipped(folder: Path, tmp_path: Path, unit: Any) -> None:
    good = [cut(folder, f"c{n}", 0.25, 1.7, supervision(f"a{n}", 0.1, "she sells", 0.35)) for n in range(4)]
    wrong = changed(good[0], "supervisions.0.start", "0")
    manifest = write(tmp_path / "c.jsonl", good[1], '{"id": "cut', wrong, good[2], good[3])
    found = sources(LhotseSettings(cuts=manifest, unit=unit))
    bad = [source.reason for source in found if isinstance(source, Unreadable)]
    assert (
        len(found) == 5 and "c.jsonl:2: not a JSON object" in bad[0] and "c.jsonl:3: supervisions[0]: start" in bad[1]
    )
    recordings = write(tmp_path / "r.jsonl", recording(folder), "{", recording(folder, 2))
    supervisions = [supervision("z", 0.2, "she sells"), supervision("y", 0.0, "left", recording_id="lost")]
    supervisions += [supervision("x", 0.0, "right", recording_id="two", channel=[0, 1])]
    given_both = LhotseSettings(recordings=recordings, supervisions=write(tmp_path / "s.jsonl", *supervisions))
    assert [isinstance(source, Unreadable) for source in sources(given_both)].count(True) == 1
    # The recording of an unreadable supervision is unknown.
    write(tmp_path / "s.jsonl", *supervisions, "{")
    with pytest.raises(UserError, match=r"s\.jsonl:4: not a JSON object"):
        sources(given_both)


def test_only_a_supervision_of_zero_length_is_skipped(folder: Path, tmp_path: Path) -> None:
    """Its text exists, so it does not count as missing."""
    said = [supervision("a", 0.1, "she sells"), supervision("b", 0.5, "sea", duration=0.0), supervision("c", 0.6, "by")]
    manifest = write(tmp_path / "c.jsonl", cut(folder, "one", 0.25, 1.7, *said))
    found = sources(LhotseSettings(cuts=manifest, unit="supervisions"))
    assert sorted(source.id for source in found if not isinstance(source, Unreadable)) == ["a", "c"]
    (fault,) = [source.reason for source in found if isinstance(source, Unreadable)]
    assert "c.jsonl:1: supervisions[1]: the supervision 'b' has no length" in fault


def test_lhotse_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    for given_settings, complaint in (
        ({}, "either --cuts FILE"),
        ({"cuts": "a", "recordings": "b"}, "either --cuts FILE"),
        ({"recordings": "a"}, "supervisions is empty"),
        ({"cuts": "a", "supervisions": "b"}, "supervisions is given without recordings"),
    ):
        with pytest.raises(UserError, match=complaint):
            LhotseSettings(**given_settings)
    recordings = write(tmp_path / "r.jsonl", recording(folder))
    strays = write(tmp_path / "s.jsonl", supervision("a", 0, "x"), supervision("b", 0, "x", recording_id="lost"))
    with pytest.raises(UserError, match=r"s\.jsonl:2: recording_id is 'lost', and .*r\.jsonl has no such recording"):
        sources(LhotseSettings(recordings=recordings, supervisions=strays))
    with pytest.raises(UserError, match=r"r\.jsonl:1: a cut of type None"):
        sources(LhotseSettings(cuts=recordings))
    with pytest.raises(UserError, match="hold no cut"):
        sources(LhotseSettings(cuts=write(tmp_path / "e.jsonl", "", " ")))
    entry = cut(folder, "c", 0.0, 2.0, supervision("a", 0.0, "x"))
    entry["recording"]["duration"] = 3.0
    (source,) = sources(LhotseSettings(cuts=write(tmp_path / "c.jsonl", {**entry, "start": 1.5, "duration": 1.0})))
    with pytest.raises(UserError, match=r"one\.wav: ends before the segment's end"):
        source.load(FEATURES).waveform  # noqa: B018


# --- lines


def test_a_gzip_bomb_and_a_line_without_end_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    spaces = b" " * (1 << 20)
    for line, count, complaint in (
        (b"{}" + spaces + b"\n", 120, r"bomb\.jsonl\.gz:\d+: gzip that expands more than 200 times"),
        (spaces, (MAX_LINE_BYTES >> 20) + 8, r"bomb\.jsonl\.gz:1: a line of more than 32 MB"),
        (b"\n" * 20_000, 1, r"bomb\.jsonl\.gz:10001: more than 10000 blank lines"),
    ):
        with gzip.open(path, "wb") as file:
            for _ in range(count):
                file.write(line)
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match=complaint):
                for _ in json_lines(path):
                    pass
            assert tracemalloc.get_traced_memory()[1] < 5 * MAX_LINE_BYTES
        finally:
            tracemalloc.stop()


def test_a_damaged_gzip_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    content = gzip.compress(b'{"a": 1}\n' * 100)
    for damaged_content in (content[:-20], content[:20] + b"\xff" * 20 + content[40:], b"\x1f\x8b"):
        path.write_bytes(damaged_content)
        with pytest.raises(UserError, match=r"c\.jsonl\.gz: damaged gzip"):
            list(json_lines(path))
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        list(json_lines(tmp_path / "none.jsonl"))


@FUZZ
@given(data=st.data())
def test_a_damaged_manifest_gives_recordings_or_one_error_with_its_place(data: st.DataObject, folder: Path) -> None:
    good = cut(folder, "c1", 0.25, 1.7, supervision("a", 0.1, "she sells", 0.35), supervision("b", 0.95, "sea", 1.2))
    parts = data.draw(st.booleans())  # of the JSON, or any bytes
    valid = json.dumps(damaged_json(data, good) if parts else good).encode() + b"\n"
    zipped = data.draw(st.booleans())
    if zipped:
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
            file.write(valid)
        valid = buffer.getvalue()
    path = damaged(data, valid, "fuzzed.jsonl.gz" if zipped else "fuzzed.jsonl", 0 if parts else 4)
    unit = data.draw(st.sampled_from(["cuts", "supervisions"]))
    try:
        found = sources(LhotseSettings(cuts=str(path), unit=unit, text="optional"))
    except UserError as error:
        message = str(error)
        assert message.startswith(str(path)) or "do not exist" in message or "hold no cut" in message
        return
    for source in found:
        recorded = source.recording  # type: ignore[attr-defined]
        check_word_times(recorded.words or (), 2.1, recorded.id)
        assert (recorded.text or "").encode() is not None
