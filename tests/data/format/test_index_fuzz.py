"""Fuzzing: a damaged dataset gives correct results or one UserError that names a file; no crash, bounded memory.

python -m tests.data.format.test_index_fuzz SECONDS [FIRST_SEED]     runs longer
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.errors import UserError
from data.format import schema
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.shards.__main__ import main
from data.shards.derive import stored_recording
from data.shards.integrity import find_faults
from data.transcripts import Word
from tests.made_datasets import FEATURES, noise

LENGTHS = [30, 70, 4100, 25, 60]
EXTRA_MEMORY = 1 << 30  # bytes of address space beyond the initial size of the process
MAX_SECONDS = 60


def recordings(kind: int) -> list[Recording]:
    """Recordings of two kinds with equal lengths and all kinds of metadata."""
    return [
        Recording(
            f"{'ab'[kind]}/{n}",
            None if n == 3 else f"text {n} \u010d {kind}",
            [Word("text", 0.0, 0.1, 0.5), Word(f"w{n}", 0.1, 0.2)] if n % 2 == 0 else None,
            ["en", "cs"][(n + kind) % 2],
            f"s{n % 3}",
            ["train", "dev", "test"][n % 3],
            [(0.1, 0.2)] if n == 4 else None,
        )
        for n in range(len(LENGTHS))
    ]


def write(folder: Path, kind: int, finish: bool, encoding: schema.Encoding) -> None:
    with DatasetWriter(folder, FEATURES, 20_000, name="name", encoding=encoding) as writer:
        for n, recording in enumerate(recordings(kind)):
            if not writer.finished and recording.id not in writer.done_ids:
                writer.add(recording, noise(LENGTHS[n], n + 10 * kind))
        if finish:
            writer.finish()


def write_all(folder: Path) -> None:
    """Write finished and unfinished datasets of both kinds in every encoding."""
    for encoding in get_args(schema.Encoding):
        for kind in (0, 1):
            write(folder / encoding / f"whole{kind}", kind, True, encoding)
            write(folder / encoding / f"partial{kind}", kind, False, encoding)


@pytest.fixture(scope="module")
def datasets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        write_all(Path(folder))
        yield Path(folder)


# --- damage ----------------------------------------------------------------------------------------------------------

NASTY = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\x01\0\0\0",
]
NASTY_JSON = [b"null", b"-1", b"1e999", b"NaN", b"9" * 400, b'"x"', b"[]", b"{}", b"[" * 5000, b"true", b"\xff", b"0.5"]


def damaged(content: bytes, rng: random.Random, other: bytes, text: bool) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(len(data) + 1)
        kind = rng.choice(["flip", "flip", "set", "set", "delete", "insert", "repeat", "zero", "cut", "swap", "splice"])
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "set":
            value = rng.choice([*NASTY, struct.pack("<q", rng.choice([1, 2, 5, 1 << 20, 1 << 33, 1 << 62, -2]))])
            at = place // 8 * 8 if rng.random() < 0.7 else place
            data[at : at + len(value)] = value
        elif kind == "delete":
            del data[place : place + rng.choice([1, 2, 8, 64, 1000])]
        elif kind == "insert":
            data[place:place] = rng.choice(NASTY_JSON if text else NASTY)
        elif kind == "repeat":
            data[place:place] = data[place : place + rng.choice([8, 64, 1000])]
        elif kind == "zero":
            end = min(len(data), place + rng.choice([4, 8, 64]))
            data[place:end] = bytes(end - place)
        elif kind == "cut":
            del data[place:]
        elif kind == "swap" and rng.random() < 0.3:
            data = bytearray(other)
        elif kind == "splice":
            end = min(len(data), len(other), place + rng.choice([8, 64, 4096]))
            data[place:end] = other[place:end]
    return bytes(data)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Replace or remove the value of a field."""
    fields = json.loads(content)
    holder = fields["features"] if rng.random() < 0.3 else fields
    name = rng.choice(sorted(holder))
    if rng.random() < 0.2:
        del holder[name]
    else:
        values = [
            None,
            -1,
            0,
            1,
            2,
            3,
            1e308,
            10**30,
            float("nan"),
            "x",
            [],
            {},
            [1],
            True,
            "../../x",
            [[1.0]],
            80 * [0],
            1e-320,
        ]
        holder[name] = rng.choice(values)
    return json.dumps(fields).encode()


def damage_table(content: bytes, rng: random.Random, checked: bool) -> bytes:
    """Replace a cell of an Arrow file by a value of the same type or null. checked: the file ends in a checksum."""
    with pa.ipc.open_file(content[:-4] if checked else content) as file:
        table = file.read_all()
    number = rng.randrange(table.num_columns)
    column = table.schema.field(number)
    values = table[number].to_pylist()
    row = rng.randrange(len(values))
    values[row] = another(column.type, values[row], rng)
    if rng.random() < 0.1:
        values.reverse()
    changed = table.set_column(number, column, pa.chunked_array([pa.array(values, column.type)]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(changed.combine_chunks(), max_chunksize=rng.choice([None, None, None, 2]))
    data = sink.getvalue().to_pybytes()
    return data + zlib.crc32(data).to_bytes(4, "little") if checked else data


def another(kind: pa.DataType, value: Any, rng: random.Random) -> Any:
    """Value of an Arrow type that is wrong in its place."""
    if rng.random() < 0.15:
        return None
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_fixed_size_list(kind):
        return [another(kind.value_type, 0.0, rng)] + value[1:]
    if pa.types.is_list(kind):
        value = list(value or [])
        changes = ["empty", "more", "change"] if value else ["empty", "more"]
        change = rng.choice(changes)
        if change == "change":
            place = rng.randrange(len(value))
            value[place] = another(kind.value_type, value[place], rng)
        return [] if change == "empty" else [*value, another(kind.value_type, None, rng)] if change == "more" else value
    if pa.types.is_struct(kind):
        return {kind.field(n).name: another(kind.field(n).type, 0, rng) for n in range(kind.num_fields)}
    if pa.types.is_string(kind):
        return rng.choice(["", " ", "a/2", "b/0", "../../x", "__metadata__", "a\nb", "x" * 70000, "\u200b", "test"])
    if pa.types.is_floating(kind):
        return rng.choice(
            [0.0, -1.0, 0.15, 1e30, float("nan"), float("inf"), 5e-324 if kind == pa.float64() else 1e-40]
        )
    least, bits = -(2 ** (kind.bit_width - 1)), kind.bit_width
    if kind == pa.uint32():
        return rng.choice([0, 1, 2**32 - 1])
    return rng.choice([0, 1, 2, 3, -1, 30, 65536, 1 << 20, 2 ** (bits - 1) - 1, least, 2 ** (bits - 2)])


def damage_folder(folder: Path, other: Path, rng: random.Random) -> bool:
    """Damage one or two files. Returns whether the result may be a valid dataset with other content."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
    plausible = False
    for name in rng.sample(names, rng.choice([1, 1, 1, 2])):
        path = folder / name
        if rng.random() < 0.03:
            path.unlink()
            continue
        counterpart = (other / name).read_bytes() if (other / name).is_file() else b""
        content = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_bytes(damage_json(content, rng))
        elif path.suffix == ".arrow" and rng.random() < 0.5:
            path.write_bytes(damage_table(content, rng, checked=name.startswith("rows-")))
            plausible |= name.startswith("rows-")
        else:
            path.write_bytes(damaged(content, rng, counterpart, path.suffix == ".json"))
            plausible |= name.startswith("rows-") and path.read_bytes() == counterpart
    return plausible


# --- expected results ------------------------------------------------------------------------------------------------


def everything(dataset: Dataset) -> list[Any]:
    """All content of a dataset."""
    answers: list[Any] = [len(dataset), dataset.fingerprint, dataset.total_frames, dataset.features]
    answers += [dataset.totals(label) for label in schema.LABELS] + [dataset.identity()]
    for i in range(len(dataset)):
        answers += [stored_recording(dataset, i), dataset.excluded(i), dataset.index.find(dataset.id(i)) == i]
        answers += [dataset.read(i, verify=True).tobytes()]
        for normalisation in ("recording", "dataset"):
            dataset.read_normalised(i, normalisation=normalisation)
    return answers


def statistics(dataset: Dataset) -> np.ndarray:
    """Statistics, compared within a tolerance relative to the standard deviation."""
    rows = [torch.stack(dataset.statistics(0, "dataset")).numpy()]
    return np.stack(rows + [dataset.mean_std(i) for i in range(len(dataset))])


def check_message(error: UserError, folder: Path) -> None:
    """Check that the message is one line that names the dataset."""
    message = str(error)
    assert "\n" not in message.strip() and (str(folder) in message), f"names no file: {message}"


Right = tuple[list[Any], np.ndarray]


def use(folder: Path, right: Right | None) -> str:
    """Open, read, verify and inspect a damaged dataset. Returns the outcome."""
    command_line(folder)
    try:
        dataset = open_dataset(folder, check=False)
    except UserError as error:
        check_message(error, folder)
        return "rejected"
    for method in (
        dataset.id,
        dataset.text,
        dataset.words,
        dataset.excluded,
        dataset.mean_std,
        dataset.read,
        lambda number: stored_recording(dataset, number),
    ):
        for i in range(len(dataset)):
            try:
                method(i)
            except UserError as error:
                check_message(error, folder)
    faults = find_faults(dataset)
    try:
        answers, numbers = everything(open_dataset(folder)), statistics(dataset)
    except UserError as error:
        check_message(error, folder)
        assert faults, f"verify found nothing, but: {error}"
        return "found"
    same = right is None or answers == right[0] and np.allclose(numbers, right[1], 5e-3, 5e-3)
    assert faults or same, "wrong results, and verify found nothing"
    return "found" if faults else "harmless"


def command_line(folder: Path) -> None:
    for command in (
        "inspect",
        "inspect --id a/2",
        "verify",
        "stats --by speaker",
        "split --out OUT",
        "filter --out OUT",
    ):
        name, *rest = command.replace("OUT", str(folder.parent / "out")).split()
        output = StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            code = main([name, str(folder), *rest])
        assert code in (0, 1, 2) and (code != 2 or output.getvalue().startswith("error: ")), (command, code)
        if (folder.parent / "out").exists():
            shutil.rmtree(folder.parent / "out")
        assert {path.name for path in folder.parent.iterdir()} == {folder.name}, "leftover files"


def continue_writing(folder: Path, right: Right | None, encoding: schema.Encoding) -> str:
    """Continue a damaged, unfinished dataset. Returns the outcome."""
    try:
        write(folder, 0, True, encoding)
    except UserError as error:
        check_message(error, folder)
        return "rejected"
    return use(folder, right)


# --- child processes -------------------------------------------------------------------------------------------------


def try_seed(datasets: Path, seed: int, right: dict[schema.Encoding, Right]) -> str:
    rng = random.Random(seed)
    encoding, whole = rng.choice(sorted(right)), rng.random() < 0.6
    kind = "whole" if whole else "partial"
    with tempfile.TemporaryDirectory(prefix=f"seed{seed}-") as place:
        folder = Path(place, "set")
        shutil.copytree(datasets / encoding / f"{kind}0", folder)
        plausible = damage_folder(folder, datasets / encoding / f"{kind}1", rng)
        expected = None if plausible else right[encoding]
        return use(folder, expected) if whole else continue_writing(folder, expected, encoding)


def in_a_child(work: Callable[[Callable[[object], None]], None]) -> list[str]:
    """Run in a process with limited memory and time. Returns the lines that it printed, and last how it ended."""
    read, written = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            work(lambda line: (signal.alarm(MAX_SECONDS), os.write(written, f"{line}\n".encode()))[0])
            os.write(written, b"end\n")
        except BaseException as error:  # shown by the parent
            os.write(written, f"{type(error).__name__}: {error}\n{traceback.format_exc()}".encode())
            raise
        finally:
            os._exit(0)
    os.close(written)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        lines = pipe.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return lines if code == 0 else [*lines, f"ended by signal {-code}"]  # SIGALRM: the process hung


def fuzz(datasets: Path, seeds: range) -> list[str]:
    """Failures, each with its seed."""
    failures, first = [], seeds.start
    right: dict[schema.Encoding, Right] = {}
    for encoding in get_args(schema.Encoding):
        whole = open_dataset(datasets / encoding / "whole0")
        right[encoding] = everything(whole), statistics(whole)
    while first < seeds.stop:

        def work(report: Callable[[object], None], first: int = first) -> None:
            for seed in range(first, seeds.stop):
                report(f"seed {seed}")
                report(try_seed(datasets, seed, right))

        lines = in_a_child(work)
        if lines[-1] == "end":
            break
        last = max(n for n, line in enumerate(lines) if line.startswith("seed "))
        seed = int(lines[last].split()[1])
        failures.append("\n".join(lines[last:]))
        first = seed + 1
    return failures


def test_a_crash_and_a_large_allocation_are_reported_with_their_seed() -> None:
    def crash(report: Callable[[object], None]) -> None:
        report("seed 7")
        faulthandler.disable()  # pytest would print a traceback
        os.kill(os.getpid(), signal.SIGBUS)

    def fill(report: Callable[[object], None]) -> None:
        report("seed 8")
        bytearray(2 * EXTRA_MEMORY)

    assert in_a_child(crash) == ["seed 7", "ended by signal 7"]
    assert in_a_child(fill)[:2] == ["seed 8", "MemoryError: "]


def test_random_damage_is_found_or_harmless(datasets: Path) -> None:
    failures = fuzz(datasets, range(80))
    assert not failures, "\n\n".join(failures)


# --- regressions -----------------------------------------------------------------------------------------------------


def write_complete(tmp_path: Path, encoding: schema.Encoding = "plain") -> Path:
    write(tmp_path / "set", 0, True, encoding)
    return tmp_path / "set"


def set_cell(path: Path, column: str, row: int, value: object) -> None:
    """Replace a value in an Arrow file, and update its checksum."""
    content, checked = path.read_bytes(), path.name.startswith("rows-")
    with pa.ipc.open_file(content[:-4] if checked else content) as file:
        table = file.read_all()
    number = table.schema.get_field_index(column)
    kind = table.schema.field(number).type
    values = table[column].to_pylist()
    values[row] = value
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table.set_column(number, table.schema.field(number), pa.array(values, kind)))
    data = sink.getvalue().to_pybytes()
    path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little") if checked else data)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mean", "x"), ("std", [[1.0]] * 80), ("mean", [10**30] * 80), ("std", 80 * [float("nan")]), ("mean", 79 * [0.0])],
)
def test_totals_that_are_not_numbers_are_refused_by_file(tmp_path: Path, field: str, value: object) -> None:
    path = write_complete(tmp_path) / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=rf"dataset\.json: {field} must be 80 numbers"):
        open_dataset(path.parent)


@pytest.mark.parametrize("value", ["x", None, float("nan"), 1e308, [], {}])
@pytest.mark.parametrize("name", ["sample_rate", "hop_ms", "mel_scale", "num_mels"])
def test_invalid_features_are_refused_by_folder(tmp_path: Path, name: str, value: object) -> None:
    for folder, file in ((write_complete(tmp_path), "dataset.json"), (tmp_path / "partial", "preparing.json")):
        if file == "preparing.json":
            write(folder, 0, False, "plain")
        fields = json.loads((folder / file).read_text())
        fields["features"][name] = value
        (folder / file).write_text(json.dumps(fields))
        with pytest.raises(UserError, match=str(folder)):
            write(folder, 0, True, "plain")


@pytest.mark.parametrize("encoding", get_args(schema.Encoding))
@pytest.mark.parametrize("crc32", [[], [1, None], [0] * 9, None])
def test_too_few_or_missing_checksums_are_found(tmp_path: Path, crc32: object, encoding: schema.Encoding) -> None:
    folder = write_complete(tmp_path, encoding)
    set_cell(folder / "recordings.arrow", "crc32", 2, crc32)
    dataset = open_dataset(folder)
    if crc32 == [0] * 9 or crc32 == []:
        with pytest.raises(UserError, match="'a/2' .* checksum of block 0"):
            dataset.read(2, verify=True)
    else:
        with pytest.raises(UserError, match=r"recordings\.arrow: .*crc32 with nulls"):
            dataset.read(2, verify=True)
    assert find_faults(dataset)


@pytest.mark.parametrize(
    "word", [None, {"word": None, "start": 0.0, "end": 1.0}, {"word": "a", "start": None, "end": 1.0}]
)
def test_words_with_nulls_are_refused_by_file(tmp_path: Path, word: object) -> None:
    folder = write_complete(tmp_path)
    set_cell(folder / "recordings.arrow", "words", 0, [word])
    with pytest.raises(UserError, match=r"recordings\.arrow: .*words with nulls"):
        open_dataset(folder).words(0)


@pytest.mark.parametrize("id", ["__metadata__", "a\nb", " "])
def test_an_invalid_id_is_refused_by_dataset(tmp_path: Path, id: str) -> None:
    folder = write_complete(tmp_path)
    set_cell(folder / "recordings.arrow", "id", 0, id)
    with pytest.raises(UserError, match=f"{folder}: recording id"):
        stored_recording(open_dataset(folder), 0)


@pytest.mark.parametrize("column", ["id", "frames", "mean", "language", "crc32", "offset"])
def test_rows_with_nulls_are_refused_before_they_are_merged(tmp_path: Path, column: str) -> None:
    write(tmp_path, 0, False, "plain")
    set_cell(tmp_path / "rows-00000.arrow", column, 1, None)
    with pytest.raises(UserError, match=r"rows-00000\.arrow: .*nulls"):
        write(tmp_path, 0, True, "plain")


def test_rows_with_a_repeated_recording_are_refused_by_folder(tmp_path: Path) -> None:
    write(tmp_path, 0, False, "plain")
    set_cell(tmp_path / "rows-00000.arrow", "id", 1, "a/2")
    with pytest.raises(UserError, match=f"^{tmp_path}: .* recordings"):
        write(tmp_path, 0, True, "plain")


def test_a_changed_text_among_the_rows_of_an_unfinished_dataset_is_found(tmp_path: Path) -> None:
    write(tmp_path, 0, False, "plain")
    path = tmp_path / "rows-00001.arrow"
    content = path.read_bytes()
    assert content.count(b"text 2") == 1
    path.write_bytes(content.replace(b"text 2", b"next 2"))
    with pytest.raises(UserError, match=r"rows-00001\.arrow: .*checksum is wrong"):
        write(tmp_path, 0, True, "plain")


if __name__ == "__main__":
    end, first = time.monotonic() + float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        write_all(Path(root))
        while time.monotonic() < end:
            for failure in fuzz(Path(root), range(first, first + 100)):
                print(failure, flush=True)
            first += 100
            print(f"-- seeds below {first} are done", flush=True)
