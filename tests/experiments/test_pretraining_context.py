"""experiments/pretraining_context.sh: from synthesis to table and figure; resume; the numbers of the table."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from bestrq.scoring.word_errors import RecordingScore, score_recording
from common.errors import UserError
from experiments import pretraining_context_table as script
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

COMMAND = ["bash", str(REPOSITORY / "experiments/pretraining_context.sh")]
REFERENCES = ["peter finds the flour", "the leek is old and the dough", "peter finds the pear and the tea"]


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
    )  # fmt: skip


def stopped(folder: Path, file: str) -> str:
    """Start the script, and stop it when a file of a run exists. Returns the output."""
    process = subprocess.Popen(
        [*COMMAND, "--tiny", "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not (folder / file).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # Ctrl-C is ignored below a background job
    return process.communicate(timeout=PATIENCE)[0]


def test_the_tiny_experiment_is_stopped_continues_and_ends_with_table_and_figure(tmp_path: Path) -> None:
    folder = tmp_path / "effect"
    output = stopped(folder, "seed-0/pretrained-64/config.yaml")  # it stays, while a first checkpoint is soon removed
    assert "Table" not in output and not (folder / "seed-0/scratch").exists()
    done = run_script("--tiny", "--folder", folder)
    assert done.returncode == 0, done.stdout[-5000:]
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in folder.glob("seed-0/*/config.yaml")}
    assert set(configs) == {
        *("pretrained-4", "pretrained-16", "pretrained-64"), *("context-4", "context-16", "context-64", "scratch")
    }  # fmt: skip
    pretrained = [configs[f"pretrained-{context}"] for context in (4, 16, 64)]
    assert len({(c["run"]["steps"], c["data"]["rows"], c["data"]["row_frames"]) for c in pretrained}) == 1
    assert [c["data"]["max_seconds"] for c in pretrained] == [3.9, 15.9, 3.9]
    assert [[stage["max_seconds"] for stage in c["curriculum"]] for c in pretrained] == [[], [], [15.9, 64.0]]
    tuned = [configs[name] for name in ("scratch", "context-4", "context-16", "context-64")]
    for config in tuned:
        del config["run"]["folder"], config["finetune"]["init"]
    assert all(config == tuned[0] for config in tuned), "the fine-tunings differ in their initial weights only"
    numbers = json.loads((folder / "pretraining_context.json").read_text())
    assert {(cell["model"], cell["context_seconds"]) for cell in numbers["cells"]} == {
        (model, seconds) for model in ("scratch", "context-4", "context-16", "context-64") for seconds in (4, 16, 64)
    }
    assert all("homophone_errors" in cell for cell in numbers["cells"])
    assert (folder / "pretraining_context.svg").read_text().startswith("<svg")
    assert "| 64 s | context-64 |" in done.stdout


def scores(hypotheses: list[str]) -> list[RecordingScore]:
    return [
        score_recording(f"r{number}", reference, hypothesis, "en", 3.0)
        for number, (reference, hypothesis) in enumerate(zip(REFERENCES, hypotheses, strict=True))
    ]


EMPTY = ["", *REFERENCES[1:]]
NO_FLOUR = ["peter finds the", *REFERENCES[1:]]


def test_the_errors_of_a_recording_are_summed_over_the_seeds() -> None:
    """Baseline: 21 of 82 characters missing with the first seed, none with the second."""
    seeds = [
        {("context-4", 4.0): scores(EMPTY), ("context-64", 4.0): scores(NO_FLOUR)},
        {("context-4", 4.0): scores(REFERENCES), ("context-64", 4.0): scores(NO_FLOUR)},
    ]
    numbers = script.effect(seeds, "context-4", homophones=False, num_resamples=200)
    base, long = sorted(numbers["cells"], key=lambda cell: len(cell["model"]))
    length = sum(map(len, REFERENCES))
    assert base["cer"] == pytest.approx(21 / (2 * length)) and long["cer"] == pytest.approx(6 / length)
    assert base["num_recordings"] == 3 and numbers["seeds"] == 2
    assert long["difference"]["cer"]["difference"] == pytest.approx((12 - 21) / (2 * length))
    assert long["difference_of_characters_by_seed"] == pytest.approx([-15 / length, 6 / length])
    assert long["difference_of_words_by_seed"] == pytest.approx([-3 / 18, 1 / 18])
    assert "difference" not in base


def test_the_interval_over_seeds_is_that_of_students_t() -> None:
    """By hand: mean 2, standard deviation 1 of three values, quantile 4.303."""
    assert script.interval_over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert script.interval_over_seeds([1.0]) is None and script.interval_over_seeds([0.0] * 8) == (0, 0)


def test_the_table_is_ordered_by_test_context_and_pretraining_context() -> None:
    names = ["scratch", "context-64", "context-16", "context-4"]
    cells = {(name, seconds): scores(NO_FLOUR) for name in names for seconds in (0.0, 64.0, 4.0)}
    lines = script.table(script.effect([cells], "context-4", False, 200)).splitlines()[2:]
    found = [tuple(line.split(" | ")[:2]) for line in lines]
    ordered = ["scratch", "context-4", "context-16", "context-64"]
    contexts = ["| 4 s", "| 64 s", "| whole recording"]
    assert found == [(context, name) for context in contexts for name in ordered]


def test_a_missing_evaluation_and_an_unknown_baseline_are_errors() -> None:
    cells = {("context-4", 4.0): scores(NO_FLOUR)}
    with pytest.raises(UserError, match="context-64 at 4 s is not in all of --results"):
        script.effect([cells, cells | {("context-64", 4.0): scores(NO_FLOUR)}], "context-4", False, 100)
    with pytest.raises(UserError, match="--baseline context-8 was not evaluated; evaluated are"):
        script.effect([cells], "context-8", False, 100)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "--dataset DIR"),
        (["--x"], 2, "unknown argument '--x'"),
        (["--seeds"], 2, "--seeds needs a value"),
        (["--pretraining-steps", "2"], 2, "at least 3 pretraining steps"),
        (["--fine-tuning-steps", "many"], 2, "steps 'many'"),
    ],
)
def test_the_script_prints_help_and_refuses_invalid_arguments(arguments: list[str], status: int, text: str) -> None:
    done = run_script(*arguments)
    assert done.returncode == status and text in done.stdout
