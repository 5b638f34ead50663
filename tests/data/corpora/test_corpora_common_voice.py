"""Common Voice: exact tables (including quotation marks), disjoint splits, clear errors."""

import json
import random
from pathlib import Path

import pytest
from corpora_speech import FEATURES, damaged, encoded, likeness, put, speech
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import parse as parse_settings
from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.base import Unreadable
from data.corpora.common_voice import Clip, CommonVoiceSettings, read_clips, read_durations, sources
from data.corpora.registry import find_corpus
from data.format.dataset import open_dataset
from data.names import name_fault
from data.prepare.prepare import main

HEADER = (
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\t"
    "locale\tsegment"
)
SENTENCE = '"Guten Tag", sagte sie.'
# (client, number, sentence, up, down) of each table of a release.
ROWS = {
    "train": [("anna", 1, SENTENCE, 2, 0), ("anna", 2, "Er sagte: \u201eNein\u201c\u2028und ging.", 3, 1)],
    "dev": [("bert", 3, "Das Haus ist alt.", 2, 0)],
    "test": [("cora", 4, '"Ja', 2, 0)],
    "validated": [
        ("anna", 1, SENTENCE, 2, 0),
        ("bert", 3, "Das Haus ist alt.", 2, 0),
        ("cora", 4, '"Ja', 2, 0),
        ("cora", 5, "Noch ein Satz.", 2, 0),  # a test speaker's
        ("dora", 6, "Das Haus ist alt.", 2, 0),  # a dev sentence
        ("dora", 7, "Wir lesen ein Buch.", 5, 4),
    ],
}


def row(client: str, number: int, sentence: str, up: int, down: int) -> str:
    name = f"common_voice_de_{number:08d}.mp3"
    return f"{client}\t{name}\t{number:064x}\t{sentence}\t\t{up}\t{down}\ttwenties\tfemale_feminine\t\t\tde\t"


def table(rows: list[tuple[str, int, str, int, int]]) -> str:
    return "".join(f"{line}\n" for line in [HEADER, *(row(*values) for values in rows)])


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "cv-corpus-17.0-2024-03-15" / "de"
    for name, rows in ROWS.items():
        put(folder / f"{name}.tsv", table(rows))
    for number in range(1, 8):
        put(folder / "clips" / f"common_voice_de_{number:08d}.mp3", encoded("guten tag", "mp3", "de", 32000))
    durations = "".join(f"common_voice_de_{number:08d}.mp3\t{1000 * number}\n" for number in range(1, 8))
    put(folder / "clip_durations.tsv", f"clip\tduration[ms]\n{durations}")
    return folder


def listed(**fields: object) -> dict[str, FileSource]:
    found = sources(CommonVoiceSettings(**fields))  # type: ignore[arg-type]
    assert [source.id for source in found] == sorted(source.id for source in found)
    return {source.id[-1]: source for source in found}  # type: ignore[misc]


def test_tables_give_sentences_to_the_byte_with_speakers_and_splits(release: Path) -> None:
    found = listed(folder=str(release))
    assert {number: source.recording.split for number, source in found.items()} == {
        "1": "train",
        "2": "train",
        "3": "dev",
        "4": "test",
    }
    first = found["1"].recording
    assert (first.id, first.text, first.language, first.speaker) == (
        "common_voice_de_00000001",
        SENTENCE,
        "de",
        "anna",
    )
    assert found["4"].recording.text == '"Ja'  # a single quotation mark does not include the next lines
    assert found["2"].recording.text == "Er sagte: \u201eNein\u201c und ging."  # U+2028 does not end a line


def test_clips_decode_to_the_audio_of_their_files(release: Path) -> None:
    found = listed(folder=str(release.parent))["1"].load(FEATURES)
    assert likeness(found.waveform.numpy(), speech("guten tag", "de")) > 0.95


def test_validated_adds_no_speaker_and_no_sentence_of_dev_and_test(release: Path) -> None:
    found = listed(folder=str(release), splits=["train", "validated"])
    assert {number: source.recording.split for number, source in found.items()} == dict.fromkeys("127", "train")
    alone = listed(folder=str(release), splits=["validated"])
    assert set(alone) == {"1", "7"}


def test_clips_are_selected_by_votes_and_seconds(release: Path) -> None:
    both = ["train", "validated"]
    assert set(listed(folder=str(release), splits=both, max_down_votes=0)) == {"1"}
    assert set(listed(folder=str(release), splits=both, min_up_votes=3)) == {"2", "7"}
    assert set(listed(folder=str(release), splits=both, min_seconds=1.5, max_seconds=2.5)) == {"2"}
    (release / "clip_durations.tsv").unlink()
    assert set(listed(folder=str(release), splits=["dev"])) == {"3"}
    with pytest.raises(UserError, match="clip_durations.tsv: cannot be read"):
        listed(folder=str(release), max_seconds=3.0)


def test_languages_of_a_release(release: Path) -> None:
    french = release.parent / "fr"
    for name in ("train", "dev", "test"):
        put(french / f"{name}.tsv", f"{HEADER}\n{row('zoe', 9, 'Bonjour.', 2, 0).replace('_de_', f'_fr_{name}')}\n")
        put(french / "clips" / f"common_voice_fr_{name}00000009.mp3", encoded("bonjour", "mp3", "fr"))
    assert len(sources(CommonVoiceSettings(str(release.parent)))) == 7
    assert len(sources(CommonVoiceSettings(str(release.parent), languages=["fr"]))) == 3
    with pytest.raises(UserError, match="languages has 'it', but .* has de, fr"):
        sources(CommonVoiceSettings(str(release.parent), languages=["it"]))


def test_early_releases_without_locale_and_suffix(tmp_path: Path) -> None:
    for name, clip in (("train", "a1"), ("dev", "b2"), ("test", "c3")):
        put(tmp_path / "tr" / f"{name}.tsv", f"client_id\tpath\tsentence\r\ns{clip}\t{clip}\tevet\r\n")
        put(tmp_path / "tr" / "clips" / f"{clip}.mp3", b"")
    found = sources(CommonVoiceSettings(str(tmp_path / "tr")))
    assert [(s.id, s.recording.language, s.recording.text) for s in found] == [  # type: ignore[attr-defined]
        ("a1", "tr", "evet"),
        ("b2", "tr", "evet"),
        ("c3", "tr", "evet"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("client_id\t", "speaker\t", r"train.tsv:1: expected the columns client_id, path, sentence"),
        ("\tde\t\n", "\n", r"train.tsv:2: 11 values where the header has 13"),
        ("_00000002.mp3", "_00000001.mp3", r"train.tsv:3: the clip common_voice_de_00000001.mp3 occurs twice"),
        ("common_voice_de_00000002", "../../secret", r"train.tsv:3: path is '../../secret.mp3'"),
        ("_00000002.mp3", "_00000004.mp3", r"test.tsv:2: the clip .*4.mp3 is also in the table of another split"),
        ("_00000002.mp3", "_00000099.mp3", r"clips: 1 clips are missing: common_voice_de_00000099.mp3"),
        ("\t3\t1\t", "\tmany\t1\t", r"train.tsv:3: up_votes is 'many'"),
    ],
)
def test_errors_of_damaged_tables_name_file_and_line(release: Path, old: str, new: str, message: str) -> None:
    path = release / "train.tsv"
    content = path.read_text()
    assert old in content
    put(path, content.replace(old, new))
    with pytest.raises(UserError, match=message):
        sources(CommonVoiceSettings(str(release)))


def test_errors_of_invalid_text_name_the_line(release: Path) -> None:
    content = (release / "train.tsv").read_bytes()
    put(release / "train.tsv", content.replace("\u201e".encode(), b"\x84"))
    with pytest.raises(UserError, match=r"train.tsv:3: not UTF-8"):
        sources(CommonVoiceSettings(str(release)))
    put(release / "train.tsv", b"x" * (1 << 21))
    with pytest.raises(UserError, match=r"train.tsv:1: a line of more than 1048576 bytes"):
        sources(CommonVoiceSettings(str(release)))
    put(release / "train.tsv", b"")
    with pytest.raises(UserError, match=r"train.tsv: is empty"):
        sources(CommonVoiceSettings(str(release)))
    (release / "train.tsv").unlink()
    with pytest.raises(UserError, match=r"train.tsv: cannot be read \(No such file"):
        sources(CommonVoiceSettings(str(release)))


QUOTED = [
    ('"a tab\there"', "a tab here"),
    ('"a line\nend, or\r\n\ntwo"', "a line end, or two"),
    ('"She said ""hi""\tand left"', 'She said "hi" and left'),
    ('"She said ""hi"" and left"', 'She said "hi" and left'),
    ('"""Hi"" she said"', '"Hi" she said'),
    ('"Ja', '"Ja'),  # not CSV: as a quoted value it would extend into other rows
    ('Ja"', 'Ja"'),
    ('"Ja" und "Nein"', '"Ja" und "Nein"'),
    ('"Ja"', '"Ja"'),
    ('""', '""'),
    ("plain", "plain"),
]


def test_quotation_marks_are_read_as_text_or_csv(tmp_path: Path) -> None:
    rows = [("anna", number, sentence, 2, 0) for number, (sentence, _) in enumerate(QUOTED)]
    for seed in range(20):
        random.Random(seed).shuffle(rows)
        path = put(tmp_path / "train.tsv", table(rows))
        clips = [clip for clip in read_clips(path) if isinstance(clip, Clip)]
        assert [clip.sentence for clip in clips] == [QUOTED[number][1] for _, number, *_ in rows]
        lines = path.read_text().split("\n")
        assert all(clip.name in lines[int(clip.where.rpartition(":")[2]) - 1] for clip in clips)


def test_a_quoted_last_value_may_continue_in_the_next_line_and_a_lone_quote_does_not(tmp_path: Path) -> None:
    rows = 's\ta\t"Ja\ndoch"\ns\tb\t"Ja\ns\tc\tx"\ns\td\t"\n'
    path = put(tmp_path / "train.tsv", f"client_id\tpath\tsentence\n{rows}")
    clips = [clip for clip in read_clips(path) if isinstance(clip, Clip)]
    assert [clip.sentence for clip in clips] == ["Ja doch", '"Ja', 'x"', '"']


def test_a_table_with_a_quoted_header_is_csv(tmp_path: Path) -> None:
    path = put(tmp_path / "train.tsv", '"client_id"\t"path"\t"sentence"\n"s"\t"a.mp3"\t"Ja\n""doch"""\ns\tb.mp3\tx\n')
    assert [(clip.name, clip.sentence) for clip in read_clips(path)] == [("a.mp3", 'Ja "doch"'), ("b.mp3", "x")]  # type: ignore[union-attr]


BAD_ROWS = {
    "truncated": b"anna\tcommon_voice_de_00000011.mp3\t",
    "a quote that is never closed": b'anna\tcommon_voice_de_00000012.mp3\t0\t"Guten',
    "a line end without quotes": b"anna\tcommon_voice_de_00000013.mp3\t0\tGuten\nTag\t\t2\t0\t\t\t\t\tde\t",
    "not UTF-8": row("anna", 14, "gr\u00fcn", 2, 0).encode("latin-1"),
    "a NUL byte": row("anna", 15, "x\0", 2, 0).encode(),
    "a path": row("anna", 16, "x", 2, 0).replace("common", "../common").encode(),
    "no votes": row("anna", 17, "x", 2, 0).replace("\t2\t0\t", "\tx\t0\t").encode(),
    "no speaker": row("", 18, "x", 2, 0).encode(),
    "a clip that occurs twice": row("anna", 1, SENTENCE, 2, 0).encode(),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_an_unreadable_row_is_skipped_and_reported_with_its_line(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    lines = table(ROWS["train"]).encode().split(b"\n")[:-1]
    good = [row("anna", number, '"Noch" ein\u3000Satz, "', 2, 0).encode() for number in (5, 6, 7)]
    bad = BAD_ROWS[name]
    put(release / "train.tsv", b"\n".join([*lines, bad, *good, b""]))
    found = sources(CommonVoiceSettings(str(release)))
    reasons = [source.reason for source in found if isinstance(source, Unreadable)]
    assert len(found) - len(reasons) == 7 and len(reasons) == 1 + bad.count(b"\n")
    assert all(f"train.tsv:{4 + n}: " in reason for n, reason in enumerate(reasons))
    out = tmp_path / "out"
    assert main(["common_voice", f"--folder={release}", f"--out={out}", "--workers=1"]) == 0
    assert len(open_dataset(out)) == 7 and f"skipped {len(reasons)} recordings" in capsys.readouterr().out
    assert [json.loads(line)["reason"] for line in (out / "skipped.jsonl").read_text().splitlines()] == reasons
    strict = [f"--out={tmp_path / 'strict'}", "--workers=1", "--max_skipped_share=0"]
    assert main(["common_voice", f"--folder={release}", *strict]) == 2


def test_a_table_with_half_of_its_rows_unreadable_is_an_error(release: Path) -> None:
    put(release / "train.tsv", table(ROWS["train"]) + "short\n" * 2)
    with pytest.raises(UserError, match=r"train.tsv:4: 1 values where the header has 13: 'short' \(2 of 4 rows"):
        sources(CommonVoiceSettings(str(release)))


def test_a_clip_without_a_duration_is_skipped_if_the_seconds_are_limited(release: Path) -> None:
    path = release / "clip_durations.tsv"
    put(path, path.read_text().replace("common_voice_de_00000002.mp3\t2000\n", "").replace("03.mp3\t3000", "03.mp3\tx"))
    found = sources(CommonVoiceSettings(str(release), max_seconds=9.0))
    reasons = [source.reason for source in found if isinstance(source, Unreadable)]
    assert len(found) == 4 and len(reasons) == 2 and all("clip_durations.tsv has no" in reason for reason in reasons)


def test_wrong_folders_and_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder is empty: give the folder"):
        sources(CommonVoiceSettings())
    with pytest.raises(UserError, match="has no folder clips"):
        sources(CommonVoiceSettings(str(tmp_path)))
    with pytest.raises(UserError, match="Did you mean 'validated'"):
        parse_settings(CommonVoiceSettings, ["--splits=[validatd]"])
    with pytest.raises(UserError, match="max_seconds"):
        CommonVoiceSettings(max_seconds=0)
    assert find_corpus("common_voice").sources is sources


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_tables_give_clips_or_one_error(tmp_path: Path, data: st.DataObject) -> None:
    path = put(tmp_path / "train.tsv", data.draw(damaged(table(ROWS["train"]).encode())))
    try:
        for clip in read_clips(path):
            if isinstance(clip, Clip):
                assert clip.name and "/" not in clip.name and name_fault(clip.speaker) is None
            else:
                assert clip.reason.startswith(f"{path}:")
    except UserError as error:
        assert str(path) in str(error)
    durations = put(tmp_path / "clip_durations.tsv", data.draw(damaged(b"clip\tduration[ms]\na.mp3\t1000\n")))
    try:
        assert all(seconds >= 0 for seconds in read_durations(durations).values())
    except UserError as error:
        assert str(durations) in str(error)
