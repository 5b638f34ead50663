"""Table of experiments/context_effect.sh from constructed results, and arguments of the script."""

import json
import subprocess
from pathlib import Path

import pytest

from bestrq.report.result_files import FORMAT_VERSION
from bestrq.scoring.word_errors import score_recording
from common.errors import UserError
from experiments import context_effect_table as script
from tests.made_results import completed
from tests.paths import REPOSITORY

REFERENCES = ["peter finds the flour", "the leek is old and the dough", "peter finds the pear and the tea"]


def write_results(folder: Path, model: str, seconds: float, hypotheses: list[str]) -> None:
    """Write the results of a model at a context in seconds."""
    rows = [
        score_recording(f"r{number}", reference, hypothesis, "en", 3.0).row()
        for number, (reference, hypothesis) in enumerate(zip(REFERENCES, hypotheses, strict=True))
    ]
    results = {"format_version": FORMAT_VERSION, "scores": {}, "recordings": rows}
    results |= {"export": f"runs/{model}/export", "context_seconds": seconds}
    evaluation = folder / f"{model}-{seconds:g}"
    evaluation.mkdir(parents=True)
    (evaluation / "results.json").write_text(json.dumps(completed(results)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    guessed = [text.replace("flour", "flower").replace("tea", "tee") for text in REFERENCES]
    write_results(tmp_path, "short", 4, guessed)
    write_results(tmp_path, "short", 0, guessed)
    write_results(tmp_path, "long", 4, ["peter finds", *guessed[1:]])
    write_results(tmp_path, "long", 32, [*REFERENCES[:2], REFERENCES[2].replace("peter", "robert")])
    write_results(tmp_path, "long", 0, REFERENCES)
    return tmp_path


def test_homophones_and_other_words_have_separate_error_rates(folder: Path) -> None:
    """5 of 18 words are homophones; two of these are misspelled, and one hypothesis lacks two words."""
    cells = script.read_cells(folder)
    scores = {cell: script.score_homophones(rows, 100) for cell, rows in cells.items()}
    misspelled, missed = scores[("short", 4.0)], scores[("long", 4.0)]
    assert misspelled.wer == pytest.approx(2 / 18)
    assert misspelled.homophone_errors == pytest.approx(2 / 5)
    assert misspelled.other_errors == 0
    assert missed.wer == pytest.approx(3 / 18)
    assert missed.homophone_errors == pytest.approx(2 / 5), "one deleted, one misspelled"
    assert missed.other_errors == pytest.approx(1 / 13)


def test_the_models_are_compared_at_their_own_and_at_all_common_contexts(folder: Path) -> None:
    effect = script.effect(script.read_cells(folder), script.parse_own(["short=4", "long=32"]), 100)
    assert effect["own"]["wer"]["difference"] == pytest.approx((1 - 2) / 18)
    assert effect["own"]["first"] == ("long", 32.0) and effect["own"]["second"] == ("short", 4.0)
    assert {seconds: test["wer"]["difference"] for seconds, test in effect["differences"].items()} == {
        "4": pytest.approx(1 / 18),
        "0": pytest.approx(-2 / 18),
    }
    assert script.verdict(effect).startswith("long at 32 s minus short at 4 s: -5.6 points of WER (")


def test_the_table_has_a_row_per_context_with_whole_recordings_last(folder: Path) -> None:
    effect = script.effect(script.read_cells(folder), script.parse_own(["short=4", "long=32"]), 100)
    lines = script.table(effect).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 4 s", "| 32 s", "| whole recording"]
    assert len({line.count("|") for line in lines}) == 1
    assert "11.1 %" in lines[2] and "| - | - | - |" in lines[3] + " |"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["short=4", "long"], "--own long: write NAME=SECONDS"),
        (["short=5", "long=32"], "--own short=5 was not evaluated"),
    ],
)
def test_an_invalid_own_context_is_an_error(folder: Path, own: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script.effect(script.read_cells(folder), script.parse_own(own), 100)


def test_results_of_another_corpus_are_refused(folder: Path) -> None:
    cells = script.read_cells(folder)
    with pytest.raises(UserError, match="no homophones"):
        script.score_homophones(cells[("short", 4.0)][:0], 100)


@pytest.mark.parametrize(("arguments", "status", "text"), [(["--help"], 0, "context_effect.sh"), (["--x"], 2, "'--x'")])
def test_the_script_prints_help_and_refuses_unknown_arguments(arguments: list[str], status: int, text: str) -> None:
    done = subprocess.run(
        ["bash", REPOSITORY / "experiments/context_effect.sh", *arguments], capture_output=True, text=True
    )
    assert done.returncode == status and text in done.stdout + done.stderr
