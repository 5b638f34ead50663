"""Commands of `python -m data.shards`: results equal a plain count over the recordings, and sources are unchanged."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pytest

from data.format import schema
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.shards import integrity
from data.shards import stats as shards_stats
from data.shards.__main__ import main
from data.shards.derive import stored_recording
from data.shards.inspect import EDGES, totals
from data.shards.integrity import find_faults
from data.shards.select import hash_split
from data.transcripts import Word
from tests.made_datasets import FEATURES, noise, verify

TEXTS = ["Ahoj svete", "ahoj, SVETE!", "good day", "", None, "good day", "a b c d", "x"]


def write(folder: Path, recordings: list[Recording], lengths: list[int]) -> Dataset:
    with DatasetWriter(folder, FEATURES, 100_000) as writer:
        for number, recording in enumerate(recordings):
            writer.add(recording, noise(lengths[number], number))
        writer.finish()
    return open_dataset(folder)


def sample(count: int = 24) -> tuple[list[Recording], list[int]]:
    recordings = [
        Recording(
            f"r{n:02d}",
            TEXTS[n % 8],
            [Word("w", 0.0, 0.1, n / count), Word("v", 0.1, 0.2)] if n % 3 == 0 else None,
            ["en", "cs", ""][n % 3],
            f"s{n % 5}",
            ["train", "train", "dev", "test"][n % 4],
        )
        for n in range(count)
    ]
    return recordings, [26 + 37 * n for n in range(count)]  # one lasts exactly one second, an edge of the histogram


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write(tmp_path / "set", *sample())


@pytest.fixture
def original(dataset: Dataset) -> Iterator[Dataset]:
    """A dataset that must not change by a byte."""
    before = {path.name: path.read_bytes() for path in dataset.path.iterdir()}
    yield dataset
    assert {path.name: path.read_bytes() for path in dataset.path.iterdir()} == before


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def recordings_of(dataset: Dataset) -> list[Recording]:
    return [stored_recording(dataset, i) for i in range(len(dataset))]


def rewrite(path: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Change the values of a column of an Arrow file."""
    with pa.ipc.open_file(path.read_bytes()) as file:
        table = file.read_all()
    number = table.schema.get_field_index(column)
    values = pa.array(change(table[column].to_pylist()), table.schema.field(number).type)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table.set_column(number, table.schema.field(number), values))


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x40]))


def split_into_small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let several processes verify even a small dataset."""
    monkeypatch.setattr(integrity, "_CHUNK_BYTES", 60_000)
    monkeypatch.setattr(integrity, "_PROCESS_BYTES", 60_000)


# --- verify ----------------------------------------------------------------------------------------------------------


def test_faults_do_not_depend_on_the_number_of_processes(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for recording in (3, 11, 20):
        shard = dataset.path / schema.shard_name(dataset.index.shard[recording])
        flip(shard, int(dataset.index.offset[recording]) + 1000)
    alone = find_faults(dataset)
    assert [fault.id for fault in alone] == ["r03", "r11", "r20"]
    split_into_small_tasks(monkeypatch)
    assert len(integrity._chunks(dataset)) > 12
    listed = tmp_path / "bad.jsonl"
    code, out, err = run(capsys, "verify", dataset.path, "--workers", 3, "--list", listed)
    assert code == 1 and out.endswith("3 of 24 recordings are damaged\n") and not err
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert lines == [{"id": fault.id, "file": fault.file, "problem": fault.problem} for fault in alone]
    # The listed recordings can be excluded.
    assert run(capsys, "filter", dataset.path, "--exclude-ids", listed, "--out", tmp_path / "whole")[0] == 0
    rest = open_dataset(tmp_path / "whole")
    assert len(rest) == 21 and not verify(rest)


def test_ctrl_c_ends_all_processes(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> NoReturn:
        raise KeyboardInterrupt

    split_into_small_tasks(monkeypatch)
    monkeypatch.setattr(integrity, "as_completed", interrupted)
    code, _, err = run(capsys, "verify", dataset.path, "--workers", 2)
    assert code == 130 and err == "\ninterrupted\n" and not multiprocessing.active_children()


def test_a_killed_process_is_one_error(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(_: object) -> NoReturn:
        raise integrity.BrokenProcessPool

    split_into_small_tasks(monkeypatch)
    monkeypatch.setattr(integrity, "as_completed", killed)
    code, _, err = run(capsys, "verify", dataset.path, "--workers", 2)
    assert code == 2 and "use fewer workers" in err


def swap_words(values: list[Any]) -> list[Any]:
    values[6] = values[6][::-1]
    return values


def late_words(values: list[Any]) -> list[Any]:
    values[6][1]["end"] = 99.0
    return values


CHANGES: dict[str, tuple[str, str, Callable[[list[Any]], list[Any]]]] = {
    "text": ("recordings.arrow", "fingerprint", lambda values: ["other", *values[1:]]),
    "speaker": ("index.arrow", "fingerprint", lambda values: ["s4", *values[1:]]),
    "split": ("index.arrow", "fingerprint", lambda values: ["dev", *values[1:]]),
    "id": ("recordings.arrow", "are not sorted", lambda values: [values[1], values[0], *values[2:]]),
    "words": ("recordings.arrow", "'r06', word 1 'w' .* sort the words", swap_words),
    "words ": ("recordings.arrow", "'r06', word 1 'v' .* ends beyond the recording", late_words),
    "offset": ("index.arrow", "'r00'", lambda values: [values[0] + 160, *values[1:]]),
}


@pytest.mark.parametrize("column", CHANGES)
def test_a_changed_index_is_found(dataset: Dataset, column: str) -> None:
    file, message, change = CHANGES[column]
    rewrite(dataset.path / file, column.strip(), change)
    problems = "\n".join(verify(open_dataset(dataset.path)))
    assert re.search(message, problems), problems


@pytest.mark.parametrize(
    ("field", "value"), [("mean", [0.0] * 80), ("std", [9.0] * 80), ("hours", 1), ("shards", 99), ("fingerprint", "x")]
)
def test_wrong_totals_are_found(dataset: Dataset, field: str, value: object) -> None:
    path = dataset.path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    (fault,) = find_faults(open_dataset(dataset.path))
    assert fault.file == "dataset.json" and field in fault.problem


def test_wrong_statistics_of_a_recording_are_found(dataset: Dataset) -> None:
    path = dataset.path / "statistics.safetensors"
    content = bytearray(path.read_bytes())
    values = np.frombuffer(content, np.float32, offset=256).reshape(24, 2, 80)
    values[5, 0, 7] += 0.02
    values[9, 1, 0] *= 1.01
    path.write_bytes(content)
    assert [fault.id for fault in find_faults(open_dataset(dataset.path))] == ["r05", "r09"]


@pytest.mark.parametrize("size", [0, 100, 256 + 24 * 640 - 1])
def test_missing_statistics_are_one_fault_and_shards_are_still_checked(dataset: Dataset, size: int) -> None:
    os.truncate(dataset.path / "statistics.safetensors", size)
    flip(dataset.path / "shard-00001.safetensors", -1 + (dataset.path / "shard-00001.safetensors").stat().st_size)
    faults = find_faults(open_dataset(dataset.path))
    assert [fault.file for fault in faults] == ["statistics.safetensors", "shard-00001.safetensors"]


def test_statistics_with_another_header_or_trailing_bytes_are_found(dataset: Dataset) -> None:
    path = dataset.path / "statistics.safetensors"
    content = path.read_bytes()
    for changed in (content.replace(b"F32", b"F64"), content + b"\0"):
        path.write_bytes(changed)
        assert [fault.file for fault in find_faults(open_dataset(dataset.path))] == [path.name]


@pytest.mark.parametrize("place", ["size", "{", "F16", "shape", "data_offsets", "[0,"])
def test_a_damaged_header_of_a_shard_is_found(dataset: Dataset, place: str) -> None:
    path = dataset.path / "shard-00002.safetensors"
    flip(path, 1 if place == "size" else path.read_bytes().index(place.encode()))
    (fault,) = find_faults(open_dataset(dataset.path))
    assert fault.file == "shard-00002.safetensors" and "header" in fault.problem


# --- inspect and stats -----------------------------------------------------------------------------------------------


def test_totals_are_those_of_a_plain_count(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    fields, recordings, seconds = totals(dataset), recordings_of(dataset), dataset.frames / 100
    groups = {
        (g["split"], g["language"]): (g["recordings"], round(g["hours"], 9), g["speakers"]) for g in fields["groups"]
    }
    for (split, language), group in groups.items():
        members = [n for n, r in enumerate(recordings) if (r.split, r.language) == (split, language)]
        speakers = {recordings[n].speaker for n in members}
        assert group == (len(members), round(float(seconds[members].sum()) / 3600, 9), len(speakers))
    assert sum(count for count, *_ in groups.values()) == 24
    below = 0.0
    for edge, count in zip([*EDGES, np.inf], fields["durations"].values(), strict=True):
        assert count == sum(below < s <= edge for s in seconds)
        below = edge
    confidences = [w.confidence for r in recordings for w in r.words or [] if w.confidence is not None]
    assert fields["mean_confidence"] == pytest.approx(np.mean(confidences), abs=1e-6)
    assert fields["with_text"] == sum(r.text is not None for r in recordings)
    assert fields["with_words"] == sum(r.words is not None for r in recordings)
    assert fields["bytes"] == sum(path.stat().st_size for path in dataset.path.glob("shard-*"))
    code, out, _ = run(capsys, "inspect", dataset.path, "--json")
    assert code == 0 and json.loads(out) == fields
    code, out, _ = run(capsys, "inspect", dataset.path)
    assert code == 0 and "24 recordings" in out and "#" in out and "cs" in out


def test_unknown_speakers_are_not_counted_and_missing_shards_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = write(tmp_path / "set", [Recording("a"), Recording("b", speaker="s")], [700, 700])
    assert [group["speakers"] for group in totals(result)["groups"]] == [1]
    (result.path / "shard-00001.safetensors").unlink()
    assert "1 MISSING" in run(capsys, "inspect", result.path)[1]


def test_a_passage_of_a_long_recording_is_drawn_with_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [Word(f"w{n}$^$", n * 1.0, n + 0.5) for n in range(100)]
    long = write(tmp_path / "set", [Recording("long", words=words, excluded=[(41.0, 43.0)])], [10_000])
    picture = tmp_path / "a.png"
    options = ["--id", "long", "--start", 40, "--seconds", 5]
    code, out, _ = run(capsys, "inspect", long.path, *options, "--png", picture, "--json")
    described = json.loads(out)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert [word["word"] for word in described["words"]] == [f"w{n}$^$" for n in range(40, 45)] and described[
        "word times"
    ] == 100
    for wrong in (["--start", 100], ["--seconds", 0], ["--seconds", 601], ["--start", -1], ["--start", "x"]):
        code, _, err = run(capsys, "inspect", long.path, "--id", "long", *wrong, "--png", picture)
        assert code == 2 and err.startswith("error: ") and str(wrong[0]).strip("-") in err


@pytest.mark.parametrize("by", [None, "language", "speaker", "split"])
def test_the_table_is_that_of_a_plain_count(
    dataset: Dataset,
    by: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shards_stats, "_MAX_PENDING", 1)
    options = ["--by", by] if by else []
    code, out, _ = run(capsys, "stats", dataset.path, *options, "--csv", tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == 0 and len(out.splitlines()) == len(rows) + 1
    recordings = recordings_of(dataset)
    names = sorted({getattr(r, by) for r in recordings}) if by else ["all"]
    assert [row[by or ""] for row in rows] == [name or "-" for name in names]
    for name, row in zip(names, rows, strict=True):
        members = [n for n, r in enumerate(recordings) if not by or getattr(r, by) == name]
        seconds = dataset.frames[members] / 100
        with_text = [n for n in members if recordings[n].text is not None]
        words = [word for n in with_text for word in (recordings[n].text or "").split()]
        letters = "".join(words)
        rate = float(dataset.frames[with_text].sum()) / 100
        expected: list[float] = [
            len(members),
            seconds.sum() / 3600,
            seconds.min(),
            float(np.median(seconds)),
            seconds.max(),
        ]
        expected += [len(with_text), len(words), len(letters), len(set(words)), len(set(letters))]
        expected += [len(words) / rate, len(letters) / rate]
        assert [float(cell) for cell in list(row.values())[1:]] == pytest.approx(expected, abs=0.00501)


# --- split, filter, merge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["text", "speaker", "recording"])
def test_new_splits_are_disjoint_and_reproducible(
    original: Dataset, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = ["--dev-share", 0.3, "--test-share", 0.3, "--by", by]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, "split", original.path, "--out", tmp_path / name, *shares, "--seed", seed)[0] == 0
    a, b, c = (open_dataset(tmp_path / name) for name in "abc")
    assert a.fingerprint == b.fingerprint != c.fingerprint and not verify(a)
    assert {r.split for r in recordings_of(a)} == {"train", "dev", "test"}
    splits_of: dict[str, set[str]] = {}
    for r in recordings_of(a):
        text = "".join(filter(str.isalnum, r.text or "")).lower() or r.id
        splits_of.setdefault({"text": text, "speaker": r.speaker, "recording": r.id}[by], set()).add(r.split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    # The split of a recording does not depend on the other recordings.
    assert run(capsys, "filter", original.path, "--out", tmp_path / "few", "--language", "cs")[0] == 0
    assert run(capsys, "split", tmp_path / "few", "--out", tmp_path / "d", *shares, "--seed", 1)[0] == 0
    split_by_id = {r.id: r.split for r in recordings_of(a)}
    assert all(split_by_id[r.id] == r.split for r in recordings_of(open_dataset(tmp_path / "d")))


def test_case_and_punctuation_do_not_separate_texts() -> None:
    for n in range(40):
        first, second = Recording("a", f"Text, number {n}."), Recording("b", f"text NUMBER {n}")
        assert hash_split(first, "text", 0, 0.3, 0.3) == hash_split(second, "text", 0, 0.3, 0.3)


def test_shares_are_approximately_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = write(tmp_path / "set", [Recording(f"{n}") for n in range(1000)], [2] * 1000)
    assert run(capsys, "split", result.path, "--out", tmp_path / "a", "--dev-share", 0.1, "--test-share", 0.2)[0] == 0
    counts = {name: count for name, (count, _) in open_dataset(tmp_path / "a").totals("split").items()}
    assert abs(counts["dev"] - 100) < 40 and abs(counts["test"] - 200) < 50


CONDITIONS: dict[str, Callable[[Recording, float], bool]] = {
    "--language cs": lambda r, s: r.language == "cs",
    "--language en --language cs --split dev": lambda r, s: r.language != "" and r.split == "dev",
    "--speaker s1": lambda r, s: r.speaker == "s1",
    "--min-seconds 2.85 --max-seconds 5.81": lambda r, s: 2.85 <= s <= 5.81,
    "--has-text": lambda r, s: r.text is not None,
    "--no-has-text": lambda r, s: r.text is None,
    "--has-words --split test": lambda r, s: r.words is not None and r.split == "test",
    "--no-has-words": lambda r, s: r.words is None,
    "--min-confidence 0.5": lambda r, s: r.words is not None and (r.words[0].confidence or 0) >= 0.5,
    "--ids IDS": lambda r, s: r.id in ("r01", "r02", "r23"),
    "--exclude-ids IDS --has-words": lambda r, s: r.id not in ("r01", "r02", "r23") and r.words is not None,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_filter_keeps_recordings_that_meet_all_conditions(
    original: Dataset, condition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids").write_text('r01\n\n{"id": "r23", "problem": "x"}\n  r02 \n{"id": null}\nr01\n')
    options = condition.replace("IDS", str(tmp_path / "ids")).split()
    assert run(capsys, "filter", original.path, "--out", tmp_path / "out", *options)[0] == 0
    seconds = original.frames / 100
    wanted = [r for n, r in enumerate(recordings_of(original)) if CONDITIONS[condition](r, seconds[n])]
    result = open_dataset(tmp_path / "out")
    assert 0 < len(wanted) < 24 and recordings_of(result) == wanted and not verify(result)


def test_merged_datasets_keep_all_recordings_under_distinct_ids(
    original: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", [Recording("r05", "another"), Recording("a")], [70, 80])
    code, _, err = run(capsys, "merge", original.path, other.path, "--out", tmp_path / "out")
    assert code == 2 and f"'r05' is in {original.path} and in {other.path}: --prefix" in err
    assert run(capsys, "merge", original.path, other.path, "--out", tmp_path / "out", "--prefix")[0] == 0
    result = open_dataset(tmp_path / "out")
    assert len(result) == 26 and not verify(result) and result.text(result.index.find("other/r05") or 0) == "another"
    assert np.array_equal(result.read(result.index.find("set/r05") or 0), original.read(5))
    code, _, err = run(capsys, "merge", original.path, original.path, "--out", tmp_path / "two", "--prefix")
    assert code == 2 and "called 'set'" in err


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "verfy DIR": "no command 'verfy'.*Did you mean 'verify'",
    "verify DIR --worker 2": "'--worker'.*Did you mean '--workers'",
    "verify DIR --workers 0": "--workers.*'0'.*from 1",
    "verify DIR --workers two": "--workers.*'two'",
    "verify DIR --list /nowhere/x": "/nowhere/x.*cannot be written",
    "inspect DIR --idd=3": "'--idd'.*Did you mean '--id'",
    "inspect DIR --id r99": "no recording 'r99'",
    "stats DIR --by colour": "--by.*'colour'.*'language'",
    "stats": "required: DIR",
    "split DIR": "required: --out",
    "split DIR --out OUT --dev-share 1.5": "--dev-share.*'1.5'.*0 to 1",
    "split DIR --out OUT --dev-share nan": "--dev-share.*'nan'",
    "split DIR --out OUT --dev-share 0.6 --test-share 0.6": "more than 1",
    "split DIR --out DIR": "exists already",
    "filter DIR --out OUT --language cz": "--language is 'cz'.*Did you mean 'cs'",
    "filter DIR --out OUT --min-seconds 99": "none of 24 recordings",
    "filter DIR --out OUT --min-seconds x": "--min-seconds.*'x'",
    "filter DIR --out OUT --ids /nowhere/ids": "/nowhere/ids: cannot be read",
    "filter DIR --out OUT --ids BAD": "line 2: a JSON line must have a field id",
    "filter DIR --out OUT --ids UNKNOWN": "no recording 'unknown-id'.*1 are unknown",
    "filter DIR --out OUT --ids EMPTY": "lists no ids",
    "merge DIR /nowhere --out OUT": "/nowhere is not a dataset",
    "merge --out OUT": "required: DIR",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_user_mistake_is_one_line_with_the_fix(
    original: Dataset, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_text('r01\n{"name": "r02"}\n')
    (tmp_path / "unknown").write_text("r01\nunknown-id\n")
    (tmp_path / "empty").write_text("\n")
    places = {"DIR": original.path, "OUT": tmp_path / "out"}
    places |= {name.upper(): tmp_path / name for name in ("bad", "unknown", "empty")}
    existing = sorted(tmp_path.iterdir())
    code, _, err = run(capsys, *[places.get(word, word) for word in command.split()])
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(MISTAKES[command], err), err
    assert sorted(tmp_path.iterdir()) == existing


def test_recordings_without_a_speaker_are_not_split_by_speaker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = write(tmp_path / "set", [Recording("a"), Recording("b", speaker="s")], [30, 40])
    code, _, err = run(capsys, "split", result.path, "--out", tmp_path / "out", "--by", "speaker")
    assert code == 2 and "1 recordings have no speaker; use --by text" in err


@pytest.mark.parametrize("command", ["verify", "inspect", "stats", "split", "filter", "merge"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "DIR" in out and f"data.shards {command}" in out
