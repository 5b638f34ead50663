"""Multilingual LibriSpeech: the hub's Parquet files and OpenSLR's folders give the same corpus; clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora_speech import FEATURES, damaged, encoded, likeness, put, speech
from fake_hub import COMMIT, FakeHub
from hub_copies import write_mls, write_mls_english
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import parse as parse_settings
from common.errors import UserError
from data.corpora.base import Unreadable
from data.corpora.mls import MlsSettings, sources
from data.corpora.registry import find_corpus
from data.format.dataset import open_dataset
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

METAINFO = """\
 SPEAKER   |   GENDER   | PARTITION  |  MINUTES   |  BOOK ID   |             TITLE              |            CHAPTER
    100    |     M      |   train    |   17.148   |     7      | Das Buch                       | Kapitel 1
    101    |     F      |   train    |   9.347    |     7      | Das Buch                       | Kapitel 2
    104    |     F      |    dev     |   8.123    |     9      | Ein anderes | Buch             | 1
    105    |     M      |    test    |   8.123    |     9      | Ein anderes Buch               | 2
"""
TRAIN = [
    ("100_7_000000", "das alte haus"),
    ("100_7_000001", "wir lesen"),
    ("101_7_000002", "ein gutes buch"),
    ("100_8_000003", "das alte haus"),
]
SPLITS = {"train": TRAIN, "dev": [("104_9_000004", "wir lesen")], "test": [("105_9_000005", "wir lesen")]}


def write_language(folder: Path, kind: str, language: str = "de", shift: int = 0) -> Path:
    """One of OpenSLR 94's archives, unpacked."""
    put(folder / "metainfo.txt", METAINFO)
    for split, rows in SPLITS.items():
        moved = [(f"{int(id[:3]) + shift}{id[3:]}", text) for id, text in rows]
        for id, text in moved:
            speaker, book, _ = id.split("_")
            put(folder / split / "audio" / speaker / book / f"{id}.{kind}", encoded(text, kind, language))
        put(folder / split / "transcripts.txt", "".join(f"{id}\t{text}\n" for id, text in moved))
        url = "http://www.archive.org/download/buch_librivox/buch_01_64kb.mp3"
        put(folder / split / "segments.txt", "".join(f"{id}\t{url}\t401.76\t417.57\n" for id, _ in moved))
    limited = folder / "train" / "limited_supervision"
    for number in range(6):
        ids = [f"{101 + shift}_7_000002"] if number == 2 else [f"{100 + shift}_7_000001"] if number == 4 else []
        put(limited / f"1hr/{number}/handles.txt", "".join(f"{id}\n" for id in ids))
    put(limited / "9hr/handles.txt", f"{100 + shift}_7_000000\n{100 + shift}_8_000003\n")
    return folder


@pytest.fixture
def german(tmp_path: Path) -> Path:
    return write_language(tmp_path / "mls_german_opus", "opus")


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """Settings that read local copies of the hub's datasets."""
    copies = write_mls(tmp_path / "multilingual_librispeech"), write_mls_english(tmp_path / "mls_eng")
    return {"dataset": str(copies[0]), "english_dataset": str(copies[1])}


def table(**fields: object) -> dict[str, tuple[str, str, str, str | None]]:
    """(split, language, speaker, text) of every recording."""
    found = sources(MlsSettings(**fields))  # type: ignore[arg-type]
    listed_recordings = [source.recording for source in found]  # type: ignore[attr-defined]
    assert len({recording.id for recording in listed_recordings}) == len(found) == len(listed_recordings)
    return {r.id: (r.split, r.language, r.speaker, r.text) for r in listed_recordings}


def test_the_hub_and_openslr_give_the_same_corpus(german: Path, hub: dict[str, str]) -> None:
    openslr = table(folder=str(german.parent))
    assert openslr == {id: (split, "de", id[:3], text) for split, rows in SPLITS.items() for id, text in rows}
    assert table(languages=["german"], **hub) == openslr
    for splits in (["9_hours"], ["1_hours", "dev"], ["9_hours", "1_hours", "test"]):
        limited = table(languages=["de"], splits=splits, **hub)
        if splits == ["9_hours"]:
            assert set(limited) == {"100_7_000000", "100_7_000001"}
        assert {split for split, *_ in limited.values()} == {"train", *splits} - {"9_hours", "1_hours"}


def test_limited_supervision_has_the_recordings_of_the_handles(german: Path) -> None:
    def ids(*splits: str) -> set[str]:
        return set(table(folder=str(german), splits=list(splits)))

    assert ids("9_hours") == {"100_7_000000", "100_8_000003"}
    assert ids("1_hours") == {"101_7_000002", "100_7_000001"}
    assert ids("10_minutes_2") == {"101_7_000002"}
    with pytest.raises(UserError, match="train contains the limited supervision"):
        MlsSettings(splits=["train", "9_hours"])


def test_recordings_of_hub_flac_and_opus_decode_correctly(german: Path, hub: dict[str, str], tmp_path: Path) -> None:
    flac = write_language(tmp_path / "flac" / "mls_german", "flac")
    layouts = [MlsSettings(folder=str(german)), MlsSettings(folder=str(flac)), MlsSettings(["de"], **hub)]  # type: ignore[arg-type]
    for road, likely in zip(layouts, (0.9, 0.999, 0.9), strict=True):
        for source in sources(road):
            heard = source.load(FEATURES)
            assert likeness(heard.waveform.numpy(), speech(heard.recording.text or "", "de")) > likely
    english = sources(MlsSettings(["en"], ["train"], **hub))  # type: ignore[arg-type]
    assert [source.id for source in english] == [f"302_5_{n:06d}" for n in range(3)]
    assert likeness(english[2].load(FEATURES).waveform.numpy(), speech("a good book", "en")) > 0.999


def test_several_languages_from_the_hub_and_from_folders(german: Path, hub: dict[str, str]) -> None:
    both = table(languages=["fr", "english"], splits=["dev"], **hub)
    assert {language for _, language, *_ in both.values()} == {"fr", "en"}
    write_language(german.parent / "mls_dutch", "flac", "nl", shift=500)
    assert {language for _, language, *_ in table(folder=str(german.parent)).values()} == {"de", "nl"}
    assert {language for _, language, *_ in table(folder=str(german.parent), languages=["nl"]).values()} == {"nl"}
    with pytest.raises(UserError, match="holds no mls_LANGUAGE for it"):
        sources(MlsSettings(["nl", "it"], folder=str(german.parent)))


def test_recordings_are_selected_by_gender_in_metainfo(german: Path) -> None:
    assert set(table(folder=str(german), splits=["train", "dev"], gender="F")) == {"101_7_000002", "104_9_000004"}
    put(german / "metainfo.txt", METAINFO.replace("     F      |   train", "     ?      |   train"))
    with pytest.raises(UserError, match=r"metainfo.txt:3: expected a speaker's number and F or M"):
        sources(MlsSettings(folder=str(german), gender="F"))
    with pytest.raises(UserError, match="needs --folder"):
        MlsSettings(gender="F")


def test_a_slice_of_the_sources_is_the_same_sources(german: Path) -> None:
    found = sources(MlsSettings(folder=str(german)))
    whole = [source.id for source in found]
    for part in (slice(1, 4), slice(None, None, 2), slice(4, 1), slice(-2, None), slice(None, None, -1)):
        assert [source.id for source in found[part]] == whole[part]
    assert found[-1].id == whole[-1]
    with pytest.raises(IndexError):
        found[len(whole)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev/transcripts.txt", "104_9_000004\twir lesen\n104_9_000004\twir\n", "the id '104_9_000004' is in more"),
        ("dev/transcripts.txt", "104_9_000004\twir\n104_9_0000", r"transcripts.txt:2: expected SPEAKER_BOOK_NUMBER, a"),
        ("dev/transcripts.txt", "104_9_000004\t\n", r"transcripts.txt:1: 104_9_000004 has no transcript"),
        ("dev/transcripts.txt", "../104_9_000004\twir\n", r"transcripts.txt:1: expected SPEAKER_BOOK_NUMBER, a"),
        ("dev/transcripts.txt", "", "split dev is empty"),
        ("dev/transcripts.txt", b"104_9_000004\tk\xfchn\n", r"transcripts.txt:1: not UTF-8"),
        ("train/limited_supervision/9hr/handles.txt", "100_7_999999\n", "has no 100_7_999999, which limited_super"),
        ("train/limited_supervision/9hr/handles.txt", "nonsense\n", r"handles.txt:1: expected an id"),
        ("train/limited_supervision/9hr/handles.txt", "", "are empty"),
    ],
)
def test_errors_of_damaged_files_name_file_and_line(german: Path, name: str, content: str, message: str) -> None:
    put(german / name, content)
    with pytest.raises(UserError, match=message):
        sources(MlsSettings(folder=str(german), splits=["9_hours", "dev"]))


def test_wrong_folders_and_settings_are_an_error(german: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="languages is 'klingon'"):
        MlsSettings(["klingon"])
    with pytest.raises(UserError, match="Did you mean '9_hours'"):
        parse_settings(MlsSettings, ["--splits=[9hours]"])
    with pytest.raises(UserError, match="holds no mls_LANGUAGE"):
        sources(MlsSettings(folder=str(german / "train")))
    for path in sorted((german / "dev/audio").rglob("*.opus")):
        path.unlink()
    with pytest.raises(UserError, match=r"dev/audio: holds no SPEAKER/BOOK"):
        sources(MlsSettings(folder=str(german)))
    write_language(german.parent / "mls_german", "flac")
    with pytest.raises(UserError, match="holds mls_german and mls_german_opus, the same recordings"):
        sources(MlsSettings(folder=str(german.parent)))
    assert find_corpus("mls").sources is sources


def prepare_from(hub: FakeHub, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with this server as the hub."""
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(out.parent / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "data.prepare", "mls", "--out", str(out), "--languages", "de", "--workers", "1"]
    command += ["--cache", str(out.parent / "cache"), *arguments]
    repository = REPOSITORY
    return subprocess.run(
        command, cwd=repository, env={**os.environ, **home}, capture_output=True, text=True, timeout=PATIENCE
    )


def test_the_hub_is_streamed_into_a_dataset_in_bounded_space(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    copy = write_mls(tmp_path / "copy")
    with FakeHub(copy, "facebook/multilingual_librispeech") as hub:
        done = prepare_from(hub, tmp_path / "out", "--splits", "train,dev", "--cache_gb", "0.00001")
        assert done.returncode == 0, done.stderr
        files = {path.rsplit("/", 1)[1] for method, path, asked in hub.requests if asked and method == "GET"}
    dataset = open_dataset(tmp_path / "out")
    found = {dataset.id(n): (dataset.text(n), dataset.split(n), dataset.speaker(n)) for n in range(len(dataset))}
    expected = {id: (text, split, id[:3]) for split in ("train", "dev") for id, text in SPLITS[split]}
    assert found == expected
    assert files == {f"train-0000{n}-of-00002.parquet" for n in range(2)} | {"dev-00000-of-00001.parquet"}
    # Files are 20 kB, the limit is 10: only the newest is kept.
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix == ".parquet"]) == 1
    assert COMMIT in "".join(path for _, path, _ in hub.requests)


def test_the_error_of_a_gated_dataset_gives_the_fix(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with FakeHub(write_mls(tmp_path / "copy"), "facebook/multilingual_librispeech", gated=True) as hub:
        failed = prepare_from(hub, tmp_path / "out")
    assert failed.returncode == 2
    assert "gated" in failed.stderr and "hf auth login" in failed.stderr and "Traceback" not in failed.stderr


def test_an_unreadable_transcript_line_is_skipped(german: Path) -> None:
    path = german / "train/transcripts.txt"
    put(path, path.read_bytes() + b"no tab\n" + "100_8_000009\tgr\u00fcn\n".encode("latin-1"))
    put(german / "train/audio/100/7/._100_7_000000.flac", b"")  # macOS left it: the suffix is .opus all the same
    found = list(sources(MlsSettings(folder=str(german))))
    bad = [source for source in found if isinstance(source, Unreadable)]
    assert len(found) == 8 and [source.id[len(str(path)) :] for source in bad] == [":5 (train)", ":6 (train)"]
    assert "expected SPEAKER_BOOK_NUMBER" in bad[0].reason and "not UTF-8" in bad[1].reason
    assert found[0].load(FEATURES).recording.text == "das alte haus"
    assert len(list(sources(MlsSettings(folder=str(german), splits=["9_hours", "1_hours"])))) == 2 + 2 + 2 * len(bad)
    put(path, "no tab\n" * 9)
    with pytest.raises(UserError, match=r"transcripts.txt:1: expected .* \(9 of 9 rows are unusable\)"):
        sources(MlsSettings(folder=str(german)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_give_recordings_within_the_folder_or_one_error(german: Path, data: st.DataObject) -> None:
    originals = {
        german / "train/transcripts.txt": "".join(f"{id}\t{text}\n" for id, text in TRAIN).encode(),
        german / "train/limited_supervision/9hr/handles.txt": b"100_7_000000\n100_8_000003\n",
        german / "metainfo.txt": METAINFO.encode(),
    }
    wrong = data.draw(st.sampled_from(sorted(originals)))
    for path, content in originals.items():
        put(path, data.draw(damaged(content)) if path == wrong else content)
    try:
        found = list(sources(MlsSettings(folder=str(german), splits=["9_hours"], gender="M")))
    except UserError as error:
        assert str(german) in str(error)
        return
    for source in found:
        if isinstance(source, Unreadable):
            assert source.reason.startswith(f"{german}/train/transcripts.txt:")
        else:
            assert source.path.parents[2] == german / "train/audio"  # type: ignore[attr-defined]
