"""Changed results.json and transcripts.jsonl: an error with file and field, or a report; never another exception."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from bestrq.report.reports import write_comparison, write_evaluation_report
from bestrq.report.result_files import RESULTS, TRANSCRIPTS, read_results, read_transcripts
from bestrq.report.text import comparison_table, rates_table
from common.errors import UserError
from pipelines.evaluation import collect_decoded, is_finished
from pipelines.evaluation_results import append_row, row_of, transcript_of
from tests.made_results import make_results, score_all, write_evaluation
from tests.wrong_json import refused, variants
from tools import compare

TEXTS = {"r0": ("a b c d", "a x c"), "r1": ("e f", "e f g"), "r2": ("h i j", "h i j"), "r3": ("k l", "")}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    scores = score_all(TEXTS, speakers={"r0": "s0", "r1": "s1"})
    extra: dict[str, Any] = {"key": "k" * 64, "decode_key": "d" * 64}
    extra["segments"] = make_results("x", scores)["scores"]
    return [write_evaluation(tmp_path / name, name, scores, context=context, **extra) for name, context in
            (("first", 20.0), ("second", 0.0))]  # fmt: skip


def report(folders: list[Path], out: Path) -> None:
    """All pages and tables of two evaluations."""
    print(comparison_table(write_comparison(out, {folder.name: folder for folder in folders}, {}, 100)))
    results = read_results(folders[0])
    write_evaluation_report(out, results, read_transcripts(folders[0]), {})
    rates_table(results)
    append_row(out / "rows.jsonl", row_of(results))


def test_every_wrong_value_in_results_is_refused_with_its_field_or_makes_a_report(
    folders: list[Path], tmp_path: Path
) -> None:
    path = folders[0] / RESULTS
    valid = json.loads(path.read_text())
    report(folders, tmp_path / "out")
    accepted = []
    for case, text in variants(valid, 1500):
        path.write_text(text)
        field = case.split(".")[0].split(" = ")[0]
        if not refused(lambda: read_results(folders[0]), case, field.replace("format_version", "format version")):
            accepted.append((case, text))
    assert 100 < len(accepted) < 1000
    # Pages take most of a second each, so these are a sample.
    for case, text in random.Random(0).sample(accepted, 4):
        path.write_text(text)
        refused(lambda: report(folders, tmp_path / "out"), case, "")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("positions", 0, "words"), float("nan"), "positions.0.words is the number nan"),
        (("recordings", 0, "cer"), None, r"recordings\[0\].cer is null"),
        (("recordings", 1, "id"), "r0", "two recordings have the same id"),
        (("scores", "all"), None, "scores.all is None, expected an object"),
        (("versions", "scoring rules"), "x", "versions.scoring rules is 'x'"),
    ],
)
def test_values_that_no_type_excludes_are_refused(
    field: tuple[str | int, ...], value: object, message: str, folders: list[Path]
) -> None:
    results = json.loads((folders[0] / RESULTS).read_text())
    inner = results
    for name in field[:-1]:
        inner = inner[name]
    inner[field[-1]] = value
    (folders[0] / RESULTS).write_text(json.dumps(results))
    with pytest.raises(UserError, match=message):
        read_results(folders[0])


def test_every_wrong_value_in_transcripts_is_refused_with_its_line_or_makes_a_report(
    folders: list[Path], tmp_path: Path
) -> None:
    path = folders[0] / TRANSCRIPTS
    lines = path.read_text().splitlines()
    valid = json.loads(lines[1])
    count, accepted = 0, []
    for case, text in variants(valid):
        path.write_text("\n".join([lines[0], text, *lines[2:]]))
        if refused(lambda: read_transcripts(folders[0]), case, f"{path}, line 2"):
            count += 1
        else:
            accepted.append(case)
            for line in read_transcripts(folders[0]):
                transcript_of(line)
            if len(accepted) % 60 == 0:
                refused(lambda: report(folders, tmp_path / "out"), case, "")
    assert count > 300 and len(accepted) > 20


def test_an_evaluation_with_changed_files_is_not_finished_and_changed_lines_are_decoded_again(
    folders: list[Path],
) -> None:
    folder, path = folders[0], folders[0] / "partial-00000.jsonl"
    assert is_finished(folder, "k" * 64)
    kept = {name: value for name, value in json.loads((folder / TRANSCRIPTS).read_text().splitlines()[0]).items()
            if name != "alignment"}  # fmt: skip
    entry = {"key": "d" * 64, **kept}
    assert collect_decoded(folder, "d" * 64, True).keys() == TEXTS.keys()
    for case, text in variants(entry, 200):
        path.write_text(text + "\n")
        assert not refused(lambda: collect_decoded(folder, "d" * 64, False), case, "")
        for line in collect_decoded(folder, "d" * 64, False).values():
            transcript_of(line)
    (folder / TRANSCRIPTS).write_text('{"id": 3}\n')
    assert not is_finished(folder, "k" * 64)


def test_a_row_is_added_to_a_file_with_any_bytes(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe{[\n")
    for _ in range(2):
        append_row(tmp_path / "rows.jsonl", row_of(read_results(folders[0])))
    assert (tmp_path / "rows.jsonl").read_bytes().count(b'"key"') == 1


@pytest.mark.parametrize("name", [RESULTS, TRANSCRIPTS])
def test_pipes_devices_and_deep_nesting_are_refused_without_waiting(
    name: str, folders: list[Path], tmp_path: Path
) -> None:
    path = folders[0] / name
    arguments = ["--results", *map(str, folders), "--out", str(tmp_path / "out"), "--resamples=100"]
    for content in (b"[" * 100_000, b"\xff", b"{}", b"null"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            compare.main(arguments)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name}: not a regular file"):
        compare.main(arguments)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}: not a regular file"):
        compare.main(arguments)
