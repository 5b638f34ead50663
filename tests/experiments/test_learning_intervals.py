"""Reductions over seeds from constructed results folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from experiments import learning_intervals as script
from tests.made_results import score_all, write_evaluation
from tests.paths import REPOSITORY

TEXTS = ["ahojte svete jak je", "dneska prsi a fouka", "klicenka od domu", "rybicka plave ve vode"]


def write(folder: Path, language: str, errors: int, seed: int) -> Path:
    """Results in which `errors` letters of each recording are wrong, one more in the one of the seed's number."""
    texts = {}
    for number, text in enumerate(TEXTS):
        wrong = errors + (number == seed)
        texts[f"{language}-{number}"] = text, "q" * wrong + text[wrong:]
    return write_evaluation(folder, folder.name, score_all(texts, language))


def test_the_reduction_is_over_seeds_recordings_and_languages(tmp_path: Path) -> None:
    scratch = [write(tmp_path / f"scratch-{lang}-{s}", lang, 4, s) for lang in ("cs", "nl") for s in range(3)]
    better = [
        write(tmp_path / f"better-{lang}-{s}", lang, errors, s)
        for lang, errors in (("cs", 1), ("nl", 2))
        for s in range(3)
    ]
    numbers = script.reduction(scratch, better, num_resamples=200)
    assert numbers["languages"]["cs"]["value"] == pytest.approx(1 - 5 / 17)
    assert numbers["languages"]["nl"]["value"] == pytest.approx(1 - 9 / 17)
    assert numbers["value"] == pytest.approx(1 - 14 / 34)
    assert numbers["low"] < numbers["value"] < numbers["high"] and numbers["seeds"] == 3
    words = script.reduction(scratch, better, "wer", num_resamples=200)
    assert words["rate"] == "wer" and words["value"] == 0, "the first word of each recording is wrong in both"
    json.dumps(numbers, allow_nan=False)


def test_the_command_prints_and_writes_the_numbers(tmp_path: Path) -> None:
    folders = {
        name: [str(write(tmp_path / f"{name}-{s}", "cs", n, s)) for s in range(2)] for name, n in (("a", 3), ("b", 1))
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.learning_intervals", "--baseline", *folders["a"],
            "--system", *folders["b"], "--resamples", "100", "--out", tmp_path / "x.json",
        ],
        cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    numbers = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert numbers["value"] == pytest.approx(1 - 5 / 13) and "relative reduction 61.5 %" in done.stdout


def test_different_seeds_recordings_and_languages_are_refused(tmp_path: Path) -> None:
    first = [write(tmp_path / f"a-{s}", "cs", 2, s) for s in range(2)]
    other = write(tmp_path / "other", "nl", 2, 0)
    with pytest.raises(UserError, match="results in \\['cs'\\], the system in \\['nl'\\]"):
        script.reduction(first, [other, other])
    with pytest.raises(UserError, match="2 seeds of the baseline and 1"):
        script.reduction(first, first[:1])
    fewer = write_evaluation(tmp_path / "fewer", "fewer", score_all({"cs-0": (TEXTS[0], "x")}, "cs"))
    with pytest.raises(UserError, match="recordings or references differ"):
        script.reduction(first, [first[0], fewer])
