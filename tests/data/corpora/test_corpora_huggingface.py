"""Datasets of the Hugging Face hub: listed without their audio, read row by row, over a failing network."""

import io
import json
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora_speech import FEATURES, damaged, encoded, likeness, put, speech
from flaky_server import FlakyServer
from hub_copies import AUDIO, MLS, mls_row, readme, schema, write_mls, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.corpora import remote
from data.corpora.base import Source, Unreadable
from data.corpora.huggingface import HuggingFaceSettings, _saved_to_disk, find_columns, sources
from data.corpora.parquet_rows import MAX_ROWS, Place, RowSource, _arrow_table, read_columns, read_schema
from data.corpora.registry import find_corpus
from data.corpora.remote import FileCache
from data.recording import Recording
from data.storage.local import StorageSettings

TEXTS = ["das alte haus", "wir lesen", "ein gutes buch", "das buch", "wir lesen das alte buch"]
COLUMNS = {"audio": AUDIO, "text": pa.string(), "speaker": pa.int64(), "lang": pa.string(), "id": pa.string()}


def row(number: int, text: str, kind: str = "flac") -> dict:
    audio = {"bytes": encoded(text, kind, "de"), "path": f"{number}.{kind}"}
    return {"audio": audio, "text": text, "speaker": 7, "lang": "de", "id": f"r{number}"}


def dataset(folder: Path, rows: list[dict] | None = None, columns: dict | None = None, group: int = 2) -> Path:
    """A folder with one configuration and one split."""
    rows = [row(n, text) for n, text in enumerate(TEXTS)] if rows is None else rows
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows, columns or COLUMNS, group)
    put(folder / "README.md", readme({"default": {"train": "data/train-*"}}))
    return folder


def listed(folder: Path, **fields: object) -> list[RowSource]:
    return list(sources(HuggingFaceSettings(str(folder), **fields)))  # type: ignore[arg-type]


def sounds_right(source: Source, language: str = "de", likely: float = 0.99) -> bool:
    heard = source.load(FEATURES)
    return likeness(heard.waveform.numpy(), speech(heard.recording.text or "", language)) > likely


def test_common_column_names_are_found_and_rows_are_read_in_any_order(tmp_path: Path) -> None:
    found = listed(dataset(tmp_path))
    assert [(s.id, s.recording.text, s.recording.speaker, s.recording.language, s.recording.split) for s in found] == [
        (f"r{n}", text, "7", "de", "train") for n, text in enumerate(TEXTS)
    ]
    random.Random(0).shuffle(found)
    assert all(map(sounds_right, [*found, *found]))


def test_rows_of_a_large_group_are_correct_in_both_directions(tmp_path: Path) -> None:
    """The reader keeps a row group open and holds a few rows of it."""
    texts = [TEXTS[number % len(TEXTS)] for number in range(21)]
    found = listed(dataset(tmp_path, [row(n, text) for n, text in enumerate(texts)], group=21))
    assert {source.place.group for source in found} == {0}
    assert all(map(sounds_right, [*found[::4], *found[::-4], found[20], found[0]]))


@pytest.mark.parametrize(("kind", "likely"), [("mp3", 0.95), ("opus", 0.9), ("wav", 0.99)])
def test_every_audio_encoding_of_the_cells_is_decoded(tmp_path: Path, kind: str, likely: float) -> None:
    assert sounds_right(listed(dataset(tmp_path, [row(0, TEXTS[0], kind)]))[0], likely=likely)


def test_rows_are_listed_without_reading_audio(tmp_path: Path) -> None:
    path = dataset(tmp_path) / "data/train-00000-of-00001.parquet"
    content, metadata = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(0)
        assert chunk.path_in_schema == "audio.bytes"
        start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
        content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    found = listed(tmp_path)
    assert [source.recording.text for source in found] == TEXTS
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet, row group 1, row 0: cannot be read"):
        found[2].load(FEATURES)


def test_pickled_sources_contain_no_audio(tmp_path: Path) -> None:
    source = listed(dataset(tmp_path))[3]
    sent = pickle.dumps(source)
    assert len(sent) < 1500
    assert sounds_right(pickle.loads(sent))


def test_columns_can_be_named_and_left_out(tmp_path: Path) -> None:
    columns = {"clip": AUDIO, "words": pa.string(), "text": pa.string(), "reader": pa.string()}
    rows = [
        {"clip": row(n, text)["audio"], "words": text, "text": "wrong", "reader": f"s{n}"}
        for n, text in enumerate(TEXTS)
    ]
    folder = dataset(tmp_path, rows, columns)
    found = listed(folder, text_column="words", speaker_column="reader", language="de")
    assert [(s.id, s.recording.text, s.recording.speaker, s.recording.language) for s in found] == [
        (str(n), text, f"s{n}", "de")
        for n, text in enumerate(TEXTS)  # ids are the names of the audio files
    ]
    assert sounds_right(found[0])
    assert [s.id for s in listed(folder, id_column="-")] == [f"train/{n:08d}" for n in range(len(TEXTS))]
    assert {s.recording.text for s in listed(folder, text_column="-")} == {None}
    with pytest.raises(
        UserError, match=r"speaker_column is 'redaer', .* has clip, words, text, reader. Did you mean 'rea"
    ):
        listed(folder, speaker_column="redaer")
    with pytest.raises(
        UserError, match=r"no column holds audio .* Columns: clip \(struct<bytes: binary, path: string>\)"
    ):
        listed(folder, audio_column="text")


def test_the_error_of_a_missing_transcript_column_lists_the_columns(tmp_path: Path) -> None:
    columns = {"audio": AUDIO, "label": pa.int64()}
    folder = dataset(tmp_path, [{"audio": row(0, TEXTS[0])["audio"], "label": 3}], columns)
    with pytest.raises(UserError, match=r"no column of transcripts was found: .* Columns: audio .*, label \(int64\)"):
        listed(folder)


def test_configurations_and_splits_are_those_of_the_dataset(tmp_path: Path) -> None:
    write_mls(tmp_path)
    found = listed(tmp_path, subset="french", splits=["train", "test"])
    assert [(s.id, s.recording.split) for s in found] == [
        ("200_7_000000", "train"),
        ("200_7_000001", "train"),
        ("201_7_000002", "train"),
        ("200_8_000003", "train"),
        ("205_9_000005", "test"),
    ]
    assert all(sounds_right(source, "fr", 0.9) for source in found)
    with pytest.raises(UserError, match=r"subset is 'klingon' .* Available: \['german', 'french'\]"):
        listed(tmp_path, subset="klingon")
    with pytest.raises(UserError, match=r"subset is '' .*german"):
        listed(tmp_path)
    with pytest.raises(UserError, match="splits has 'valid', but .* has dev, test, train, 9_hours, 1_hours"):
        listed(tmp_path, subset="german", splits=["valid"])
    with pytest.raises(UserError, match=r"the id '100_7_000000' is in more than one row \(in 9_hours, train\)"):
        listed(tmp_path, subset="german")


def test_a_split_with_an_unusual_name_is_mapped_by_the_user(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/clean-00000.parquet", [row(0, TEXTS[0])], COLUMNS)
    put(tmp_path / "README.md", readme({"default": {"clean": "data/clean-*"}}))
    with pytest.raises(UserError, match="'clean' is not mapped to train, dev or test"):
        listed(tmp_path)
    assert [s.recording.split for s in listed(tmp_path, splits=["clean=dev"])] == ["dev"]
    with pytest.raises(UserError, match="'clean' is not mapped to train, dev or test"):
        listed(tmp_path, splits=["clean=devel"])


def test_folders_named_after_splits_need_no_readme(tmp_path: Path) -> None:
    """Layout of the hub's conversions to Parquet."""
    for split in ("train", "validation"):
        write_parquet(tmp_path / split / "0000.parquet", [row(0, TEXTS[0]) | {"id": split}], COLUMNS)
    assert {s.id: s.recording.split for s in listed(tmp_path)} == {"train": "train", "validation": "dev"}


def save_to_disk(folder: Path, rows: list[dict]) -> Path:
    """Files of `Dataset.save_to_disk` (which cannot encode Audio without torchcodec)."""
    table = pa.Table.from_pylist(rows, schema(COLUMNS))
    put(folder / "dataset_info.json", json.dumps({"features": {}}))
    put(folder / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}))
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return folder


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    rows = [row(n, text) for n, text in enumerate(TEXTS)]
    single = save_to_disk(tmp_path / "single", rows)
    assert all(map(sounds_right, listed(single)))
    put(tmp_path / "both/dataset_dict.json", '{"splits": ["test", "train"]}')
    save_to_disk(tmp_path / "both/train", rows[:3])
    save_to_disk(tmp_path / "both/test", rows[3:])
    assert [s.recording.split for s in listed(tmp_path / "both")] == ["test", "test", "train", "train", "train"]
    assert [s.id for s in listed(tmp_path / "both", splits=["test"])] == ["r3", "r4"]


def test_the_library_itself_writes_such_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"audio": {"bytes": b"x", "path": "x.wav"}, "text": "a", "id": "i"}])
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path)
    assert _saved_to_disk(tmp_path) == {"train": [str(tmp_path / "train/data-00000-of-00001.arrow")]}
    assert [source.id for source in listed(tmp_path)] == ["i"]


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "/etc/passwd"}, {"bytes": b"", "path": None}])
def test_a_path_in_a_table_opens_no_file(tmp_path: Path, cell: dict | None) -> None:
    source = listed(dataset(tmp_path, [row(0, TEXTS[0]) | {"audio": cell}]))[0]
    with pytest.raises(UserError, match="row group 0, row 0: column 'audio' holds no audio bytes"):
        source.load(FEATURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "r0"}, r"the id 'r0' is in more than one row \(in train\)"),
        ({"id": None}, r"parquet, row group 0, row 1: recording id '' is empty"),
        ({"id": "a\nb"}, r"parquet, row group 0, row 1: recording id 'a\\nb' has the control character U\+000A"),
    ],
)
def test_unusable_ids_are_an_error(tmp_path: Path, change: dict, message: str) -> None:
    folder = dataset(tmp_path, [row(0, TEXTS[0]), row(1, TEXTS[1]) | change])
    with pytest.raises(UserError, match=message):
        listed(folder)
    assert len(listed(folder, id_column="-")) == 2


def test_a_row_without_a_usable_id_is_skipped(tmp_path: Path) -> None:
    rows = [row(n, TEXTS[n]) for n in range(3)] + [
        row(3, TEXTS[0]) | {"id": "a\nb"},
        row(4, TEXTS[0]) | {"id": "a\u3000b"},
    ]
    found = listed(dataset(tmp_path, rows))
    assert [source.id for source in found if not isinstance(source, Unreadable)] == ["r0", "r1", "r2", "a\u3000b"]
    (bad,) = [source for source in found if isinstance(source, Unreadable)]
    assert "row group 1, row 1: recording id 'a\\nb' has the control character" in bad.reason
    assert found[3].id.endswith("row group 1, row 1")
    assert found[4].load(FEATURES).recording.id == "a\u3000b"


def test_files_of_a_split_must_agree_on_the_columns(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    fewer = {name: kind for name, kind in COLUMNS.items() if name != "text"}
    write_parquet(folder / "data/train-00001-of-00001.parquet", [{k: row(9, "das buch")[k] for k in fewer}], fewer)
    with pytest.raises(UserError, match=r"train-00001-of-00001.parquet: .* no column 'text', which other files"):
        listed(folder)


def test_errors_of_unsuitable_datasets_give_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dataset is empty"):
        sources(HuggingFaceSettings())
    put(tmp_path / "tables/data.csv", "audio,text\n/etc/passwd,x\n")
    with pytest.raises(UserError, match=r"holds files such as data.csv, but Parquet is required.*refs/convert/parquet"):
        listed(tmp_path / "tables")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing: cannot be opened"):
        listed(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be opened"):
        listed(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install -r requirements.txt"):
        listed(tmp_path / "tables")
    assert find_corpus("huggingface").sources is sources


def test_errors_of_a_gated_or_unreachable_hub_give_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("'a/b' is a gated dataset on the Hub.")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    for broken in (refuse, fail):
        monkeypatch.setattr(datasets, "load_dataset_builder", broken)
        with pytest.raises(
            UserError, match=r"(?s)a/b: cannot be opened.*hf auth login.*hf download a/b .*--dataset DIR"
        ):
            sources(HuggingFaceSettings("a/b"))


# --- over a network


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRIES", StorageSettings(attempts=4, wait_seconds=0.01))


def parquet(texts: list[str], group: int = 2) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist([row(n, text) for n, text in enumerate(texts)], schema(COLUMNS))
    pq.write_table(table, file, row_group_size=group)
    return file.getvalue()


def place(address: str, number: int, group: int = 2) -> Place:
    return Place(address, number // group, number % group, "audio")


@pytest.mark.usefixtures("quick")
def test_a_remote_file_is_fetched_once_through_faults_for_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = parquet(TEXTS)
    monkeypatch.setattr(remote, "RANGE_BYTES", len(content) // 5 + 1)
    with FlakyServer({"a.parquet": content}) as server:
        server.faults.extend([None, "drop", None, "truncated", "500", None, "short", "reset"])
        cache = FileCache(str(tmp_path / "cache"))
        for number, text in enumerate(TEXTS):
            assert sounds_right(
                RowSource(Recording(str(number), text), place(f"{server.url}/a.parquet", number), cache)
            )
        ranges = [asked for method, _, asked in server.requests if method == "GET" and asked]
    assert len(set(ranges)) == 5
    (copy,) = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".parquet"]
    assert copy.read_bytes() == content


def test_concurrent_requests_fetch_a_file_once(tmp_path: Path) -> None:
    content = parquet(TEXTS)
    with FlakyServer({"a.parquet": content}) as server, ThreadPoolExecutor(8) as pool:
        cache = FileCache(str(tmp_path))
        opened = list(pool.map(lambda _: cache.open(f"{server.url}/a.parquet").read(), range(8)))
        fetched = [asked for method, _, asked in server.requests if method == "GET" and asked]
    assert opened == [content] * 8
    assert len(fetched) == 1


@pytest.mark.usefixtures("quick")
def test_an_interrupted_fetch_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = parquet(TEXTS)
    monkeypatch.setattr(remote, "RANGE_BYTES", len(content) // 4)
    cache = FileCache(str(tmp_path))
    with FlakyServer({"a.parquet": content}) as server:
        server.faults.extend([None, None, None])
        server.always = "503"
        with pytest.raises(UserError, match=r"a.parquet: failed 4 times; .* run the same command again"):
            cache.open(f"{server.url}/a.parquet")
        assert not [path for path in tmp_path.iterdir() if path.suffix == ".parquet"]
        server.always, before = None, len(server.requests)
        assert cache.open(f"{server.url}/a.parquet").read() == content
        again = [asked for method, _, asked in server.requests[before:] if method == "GET" and asked]
    assert again and "bytes=0-" not in " ".join(again)


@pytest.mark.usefixtures("quick")
def test_a_bounded_cache_keeps_the_files_used_last(tmp_path: Path) -> None:
    files = {f"{name}.parquet": parquet([TEXTS[0], text]) for name, text in zip("abcd", TEXTS[:4], strict=True)}
    cache = FileCache(str(tmp_path), limit=int(2.5 * max(map(len, files.values()))))
    with FlakyServer(files) as server:
        kept = cache.open(f"{server.url}/a.parquet")
        for name in "bcd":
            cache.open(f"{server.url}/{name}.parquet")
        assert kept.read() == files["a.parquet"]  # even after its removal from the cache
    names = sorted(path.name[17:] for path in tmp_path.iterdir() if path.suffix == ".parquet")
    assert names == ["c.parquet", "d.parquet"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("status", "message"), [("403", "access denied .*hf auth login"), ("404", "no such file")])
def test_a_forbidden_or_missing_file_is_an_error_without_retries(tmp_path: Path, status: str, message: str) -> None:
    with FlakyServer({"a.parquet": b""}) as server:
        server.always = status
        with pytest.raises(UserError, match=message):
            FileCache(str(tmp_path)).open(f"{server.url}/a.parquet")
        assert len(server.requests) <= 3


@pytest.mark.usefixtures("quick")
def test_only_small_ranges_of_a_remote_file_are_fetched_to_list_it() -> None:
    noise = [row(n, TEXTS[0]) for n in range(40)]
    for number, entry in enumerate(noise):
        entry["audio"] = {"bytes": random.Random(number).randbytes(400_000), "path": f"{number}.flac"}
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(noise, schema(COLUMNS)), file, row_group_size=20)
    with FlakyServer({"a.parquet": file.getvalue()}) as server:
        server.faults.extend([None, "drop", "truncated"])
        table = read_columns(f"{server.url}/a.parquet", ["id", "text", "audio.path"])
        assert table["audio.path"].to_pylist() == [f"{number}.flac" for number in range(40)]
        assert table["group"].to_pylist() == [0] * 20 + [1] * 20
        spans = [asked.removeprefix("bytes=").split("-") for method, _, asked in server.requests if asked]
    assert 0 < sum(int(last) - int(first) + 1 for first, last in spans) < len(file.getvalue()) / 2


@pytest.mark.usefixtures("quick")
def test_a_damaged_remote_file_is_not_reported_as_a_network_error() -> None:
    with FlakyServer({"a.parquet": b"not what it says" * 100}) as server:
        with pytest.raises(UserError, match=r"a.parquet: cannot be read as Parquet"):
            read_schema(f"{server.url}/a.parquet")
        assert len(server.requests) < 6


# --- damage


def read_all(path: Path) -> None:
    """Read like `sources` and the workers; each recording is correct or an error."""
    address = str(path)
    columns = find_columns(HuggingFaceSettings("x"), read_schema(address), address)
    table = read_columns(address, sorted({name for kind, name in columns.items() if kind != "audio" and name}))
    assert len(table) <= MAX_ROWS
    for entry in table.to_pylist()[:100]:
        where = Place(address, entry["group"], entry["row"], columns["audio"])
        try:
            RowSource(Recording("r"), where, FileCache("")).load(FEATURES).waveform  # noqa: B018
        except UserError as error:
            assert address in str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".parquet", ".arrow"]))
def test_fuzzed_tables_give_recordings_or_one_error(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    valid = tmp_path / f"valid{suffix}"
    if not valid.is_file():
        rows = [mls_row(1, 2, n, TEXTS[1]) for n in range(3)]
        if suffix == ".parquet":
            write_parquet(valid, rows, MLS)
        else:
            table = pa.Table.from_pylist(rows, schema(MLS))
            with pa.OSFile(str(valid), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    path = put(tmp_path / f"x{suffix}", data.draw(damaged(valid.read_bytes())))
    _arrow_table.cache_clear()
    try:
        read_all(path)
    except UserError as error:
        assert str(path) in str(error)


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    """Found by fuzzing: Parquet does not check text when it is read."""
    path = dataset(tmp_path) / "data/train-00000-of-00001.parquet"
    write_parquet(path, [row(0, "das alte haus")], COLUMNS)
    broken = pq.read_table(path)
    bad = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(broken.set_column(1, "text", bad), path)
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet: cannot be read as Parquet .*UTF"):
        listed(tmp_path)


def test_a_file_that_announces_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.corpora.parquet_rows.MAX_ROWS", 4)
    with pytest.raises(UserError, match="declares 5 rows; at most 4"):
        listed(dataset(tmp_path))
