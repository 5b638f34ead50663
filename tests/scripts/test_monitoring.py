"""Monitoring of the three scripts: training is unchanged, and docs/monitoring.md names every curve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.training.metrics_file import read_metrics
from bestrq.training.stop import StopRequest
from common.config import parse
from tests.gloo import run_distributed
from tests.paths import REPOSITORY
from tests.tiny import DATA, ENCODER, RUN, make_dataset
from tests.training.test_tracking import make_tracker

STEPS = 4
SCRIPTS: dict[str, ModuleType] = {
    "pretrain": pretrain,
    "finetune_ctc": finetune_ctc,
    "finetune_rnnt": finetune_rnnt,
}
OPTIONS = {
    "pretrain": ["--quantizer.codebook_size=32", "--targets.inner_layers=[1]", "--validation.every_steps=2",
                 "--probe.every_steps=2", "--probe.steps=4", "--probe.minutes=0.3"],
    "finetune_ctc": ["--validation.every_steps=2", "--averaging.last=2", "--finetune.freeze_encoder_steps=1"],
    "finetune_rnnt": ["--validation.every_steps=2", "--averaging.last=2", "--transducer.prediction_dim=12",
                      "--transducer.joint_dim=10", "--transducer.ctc_weight=0.3"],
}  # fmt: skip
OBSERVED = ["--norms.every_steps=2", "--profile.first_step=2", "--profile.steps=2", "--tracking.name=trackio"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=60)


def arguments(script: str, dataset: Path, folder: Path, *more: str) -> list[str]:
    common = [*ENCODER, *DATA, *RUN, *OPTIONS[script], "--run.log_every=3", "--checkpoint.every_steps=2"]
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0", f"--run.steps={STEPS}"]
    return [*common, *places, "--encoder.dropout=0.3", *more]


def run(script: str, dataset: Path, folder: Path, *more: str) -> None:
    module = SCRIPTS[script]
    module.train(parse(module.Config, arguments(script, dataset, folder, *more)))


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {script: tmp_path_factory.mktemp("plain") / script for script in SCRIPTS}
    for script, folder in folders.items():
        run(script, dataset, folder)
    return folders


@pytest.fixture(scope="module")
def observed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with norms, a trace and a tracker, stopped after steps 1 (no periodic checkpoint) and 2 (which has one)."""
    folders = {script: tmp_path_factory.mktemp("observed") / script for script in SCRIPTS}
    with pytest.MonkeyPatch.context() as patch:
        make_tracker(folders["pretrain"].parent, "trackio", patch)
        for script, folder in folders.items():
            for _ in range(2):
                with pytest.MonkeyPatch.context() as stop:
                    answers = iter([False])
                    stop.setattr(StopRequest, "noticed", lambda self, answers=answers: next(answers, True))
                    run(script, dataset, folder, *OBSERVED)
            run(script, dataset, folder, *OBSERVED)
    return folders


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": value
        for name in ("model", "optimizer", "extra")
        for key, value in load_file(folder / f"checkpoints/step-{STEPS:08d}/{name}.safetensors").items()
    }


def assert_identical(first: Path, second: Path) -> None:
    expected, found = tensors(first), tensors(second)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_norms_traces_and_trackers_change_no_bit_of_training(
    script: str, plain: dict[str, Path], observed: dict[str, Path]
) -> None:
    assert_identical(plain[script], observed[script])
    names = {path.name for path in (observed[script] / "profile").iterdir()}
    assert names == {"steps-2-2-rank-0", "steps-3-3-rank-0"}  # of the second start and the third
    assert not (plain[script] / "profile").exists() and not (plain[script] / "tracking.json").exists()
    kinds = {row["kind"] for row in read_metrics(plain[script] / "metrics.jsonl")}
    assert "norms" not in kinds


@pytest.mark.parametrize("script", SCRIPTS)
def test_squares_of_the_gradient_norms_sum_to_that_of_the_model(script: str, observed: dict[str, Path]) -> None:
    rows = read_metrics(observed[script] / "metrics.jsonl")
    norms = {row["step"]: row for row in rows if row["kind"] == "norms"}
    (total,) = [row["grad_norm"] for row in rows if row["kind"] == "train" and row["step"] == STEPS]
    assert sorted(norms) == [2, 4]
    parts = {name: value for name, value in norms[STEPS].items() if name.startswith("gradient/")}
    assert sum(value**2 for value in parts.values()) ** 0.5 == pytest.approx(total, rel=1e-5)
    assert {"gradient/encoder.blocks.0", "gradient/encoder.blocks.1", "gradient/encoder.subsampling"} < parts.keys()
    assert {"activation/encoder.blocks.0", "activation/encoder.blocks.1"} < norms[STEPS].keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_totals_of_a_stopped_run_are_those_of_one_that_was_not(
    script: str, plain: dict[str, Path], observed: dict[str, Path]
) -> None:
    through, stopped = (read_metrics(folders[script] / "metrics.jsonl") for folders in (plain, observed))
    last = [[row for row in rows if "audio_hours" in row][-1] for rows in (through, stopped)]
    assert last[0]["step"] == last[1]["step"] == STEPS
    assert last[0]["audio_hours"] == pytest.approx(last[1]["audio_hours"], rel=1e-12)
    assert 0 < last[0]["audio_hours"] <= STEPS * 4 * 400 / 100 / 3600  # rows of the step, as full as they can be
    assert (last[0]["starts"], last[1]["starts"]) == (1, 3)
    checkpoints = [[row["step"] for row in rows if row["kind"] == "checkpoint"] for rows in (through, stopped)]
    assert checkpoints == [[2], [1, 2]]  # the last one has a line of kind "train"
    seconds = [row["run_seconds"] for row in stopped if "run_seconds" in row]
    assert seconds == sorted(seconds)
    places = [(row["step"], row["kind"]) for row in stopped]
    assert len(places) == len(set(places))


def run_in_world(world: Any, script: str, options: list[str]) -> None:
    module = SCRIPTS[script]
    module.start_world = lambda settings: world  # type: ignore[attr-defined]
    module.train(parse(module.Config, options))


@pytest.mark.parametrize(("script", "strategy"), [("pretrain", "ddp"), ("finetune_ctc", "fsdp")])
def test_two_processes_train_the_same_with_norms_and_traces(
    script: str, strategy: str, dataset: Path, plain: dict[str, Path], tmp_path: Path
) -> None:
    for name, more in (("plain", []), ("observed", [*OBSERVED[:3], "--profile.all_ranks=true"])):
        strategy_of_run = [f"--distributed.strategy={strategy}", "--encoder.dropout=0"]
        strategy_of_run += ["--probe.every_steps=0"] if script == "pretrain" else []
        run_distributed(run_in_world, 2, script, arguments(script, dataset, tmp_path / name, *strategy_of_run, *more))
    assert_identical(tmp_path / "plain", tmp_path / "observed")
    traces = {path.name for path in (tmp_path / "observed/profile").iterdir()}
    assert traces == {"steps-2-3-rank-0", "steps-2-3-rank-1"}
    two, one = (read_metrics(folder / "metrics.jsonl")[-1] for folder in (tmp_path / "observed", plain[script]))
    hours = [[row["audio_hours"] for row in read_metrics(folder / "metrics.jsonl") if "audio_hours" in row][-1]
             for folder in (tmp_path / "observed", plain[script])]  # fmt: skip
    assert hours[0] == pytest.approx(hours[1], rel=1e-12) and two["step"] == one["step"]


def documented_names() -> list[str]:
    """Names in the first column of the table of docs/monitoring.md."""
    page = (REPOSITORY / "docs/monitoring.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## Names")[2], re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_every_curve_and_picture_is_in_the_table_of_the_docs(
    observed: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    run_distributed(run_in_world, 2, "finetune_ctc", arguments("finetune_ctc", dataset, tmp_path / "two"))
    documented = documented_names()
    patterns = {name: re.sub("NAME|MODULE", r"[\\w.]+", name.replace(".", r"\\.")) for name in documented}
    written = set()
    for folder in (*observed.values(), tmp_path / "two"):
        tags = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()
        written |= {*tags["scalars"], *tags["images"]}
    unknown = [name for name in written if not any(re.fullmatch(p, name) for p in patterns.values())]
    assert sorted(unknown) == [], "add them to docs/monitoring.md"
    unused = [name for name, pattern in patterns.items() if not any(re.fullmatch(pattern, tag) for tag in written)]
    assert unused == [], "no script writes them"
    assert len(documented) == len(set(documented)) > 40


def test_lines_that_tensorboard_does_not_show_are_in_the_docs(observed: dict[str, Path]) -> None:
    page = (REPOSITORY / "docs/monitoring.md").read_text(encoding="utf-8")
    for folder in observed.values():
        for row in read_metrics(folder / "metrics.jsonl"):
            for name, value in row.items():
                if isinstance(value, (bool, list, str)) and name != "kind":
                    assert f"`{name}`" in page, json.dumps(row)
