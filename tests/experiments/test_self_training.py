"""experiments/self_training.sh: two rounds on a tiny dataset, finished steps skipped; arguments."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bestrq.report.reports import NUMBERS
from data.format.dataset import STD_FLOOR, open_dataset
from tests.paths import REPOSITORY
from tests.tiny import DATA, ENCODER, make_dataset
from tools.pseudo_label import SUMMARY


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "experiments/self_training.sh", *map(str, arguments)], cwd=REPOSITORY, encoding="utf-8",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def summary_of(pseudo: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((pseudo / SUMMARY).read_text(encoding="utf-8"))
    return summary


def test_rounds_train_on_labels_and_pseudo_labels_of_the_other_recordings_and_finished_steps_are_skipped(
    tmp_path: Path,
) -> None:
    dataset = make_dataset(tmp_path / "data")
    out = tmp_path / "out"
    data = [argument for argument in DATA if "seed" not in argument]  # --seed gives the seed
    command = [
        "--dataset", dataset, "--language", "en", "--minutes", "0.3", "--keep", "0.9", "--seed", "5", "--folder", out,
        "--decoder", "--decoder.beam 2", "--student", "--optimizer.warmup_steps 1", "--tiny", "--", *ENCODER, *data,
        "--encoder.num_layers=1", "--data.num_workers=0", "--distributed.device=cpu", "--distributed.precision=float32",
    ]  # fmt: skip
    done = run("--rounds", "1", *command)
    assert done.returncode == 0, done.stdout[-5000:]

    labelled, pseudo, summary = open_dataset(dataset), open_dataset(out / "pseudo-1"), summary_of(out / "pseudo-1")
    assert summary["decoder"].startswith("CTC, beam of 2") and summary["choice"]["labels"]["seed"] == 5
    train = {labelled.id(int(i)) for i in labelled.select("train")}
    decoded = summary["decoded"]["recordings"]
    assert 0 < len(pseudo) <= decoded < len(train), "some recordings of the split are labelled"
    assert {pseudo.id(i) for i in range(len(pseudo))} <= train
    config = yaml.safe_load((out / "round-1/config.yaml").read_text(encoding="utf-8"))
    assert config["optimizer"]["warmup_steps"] == 1 and config["data"]["mixture"][1]["pseudo_labels"] is True
    assert config["finetune"]["label_minutes"] == 0.3 and config["data"]["seed"] == 5
    assert json.loads((out / "round-1/export/config.json").read_text(encoding="utf-8"))["std_floor"] == STD_FLOOR

    steps = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoints/*/COMPLETE")}
    again = run("--rounds", "2", *command)
    assert again.returncode == 0, again.stdout[-5000:]
    assert again.stdout.count("already holds these pseudo-labels") == 1
    assert again.stdout.count("already holds this evaluation") == 2
    assert {path: path.stat().st_mtime_ns for path in steps} == steps
    second = summary_of(out / "pseudo-2")
    assert second["export"] == str(out / "round-1/export") and second["export_hash"] != summary["export_hash"]
    numbers = json.loads((out / "results/compare" / NUMBERS).read_text(encoding="utf-8"))
    assert [entry["system"] for entry in numbers["comparisons"]] == ["round-1", "round-2"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "Self-training: a seed model"),
        (["--x"], 2, "unknown argument '--x'"),
        ([], 2, "--dataset is missing"),
        (["--dataset", "d", "--rounds", "0"], 2, "--rounds is '0'"),
        (["--dataset", "d", "--minutes", "0.0"], 2, "uses the labels of all recordings"),
        (["--dataset", "d", "--config", "x.yaml"], 2, "must end in -ctc.yaml"),
        (["--dataset"], 2, "--dataset needs a value"),
    ],
)
def test_the_script_prints_help_and_refuses_invalid_arguments(arguments: list[str], status: int, text: str) -> None:
    done = run(*arguments)
    assert done.returncode == status and text in done.stdout
