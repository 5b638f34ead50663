"""Pretraining with a curriculum: resume, world sizes, lengths and positions per stage, exports, errors."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune_ctc
import pretrain
from bestrq.model.conformer import ConformerEncoder
from bestrq.pretraining import objective
from bestrq.pretraining.cost import flops_per_row
from bestrq.training.checkpoint import list_checkpoints
from bestrq.training.stop import StopRequest
from common.config import parse
from common.errors import UserError
from pipelines import curriculum
from tests.gloo import run_distributed
from tests.tiny import DATA, ENCODER, RUN, make_dataset

STEPS = 6
# The first step of a stage is 3 and 5; later stages have positions divided by 2, then by 4.
CURRICULUM = (
    "--curriculum=[{after_step: 2, row_frames: 800, max_seconds: 7, rotary_interpolation: 2}, "
    "{after_step: 4, row_frames: 1600, max_seconds: 9, rotary_interpolation: 4}]"
)
# 4 x 1,600 frames per step: up to four processes or accumulation steps in the last stage.
SIZES = ["--data.rows=16", "--quantizer.codebook_size=64", "--optimizer.learning_rate=1e-2"]
NO_DROPOUT = ["--encoder.dropout=0", "--encoder.attention_dropout=0"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


def arguments(dataset: Path, folder: Path, *more: str) -> list[str]:
    common = [*ENCODER, *DATA, *RUN, *SIZES, CURRICULUM, "--data.num_workers=0", f"--run.steps={STEPS}"]
    frequent = ["--validation.every_steps=1", "--checkpoint.every_steps=1", "--checkpoint.keep_last=9"]
    return [
        *common,
        *frequent,
        "--optimizer.warmup_steps=2",
        f"--data.dataset={dataset}",
        f"--run.folder={folder}",
        *more,
    ]


def run(dataset: Path, folder: Path, *more: str) -> None:
    pretrain.train(parse(pretrain.Config, arguments(dataset, folder, *more)))


def run_in_world(world, options: list[str]) -> None:
    pretrain.start_world = lambda settings: world  # this process has joined one already
    pretrain.train(parse(pretrain.Config, options))


def state_after(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    path = dict(list_checkpoints(folder / "checkpoints"))[step]
    optimizer = load_file(path / "optimizer.safetensors")
    return load_file(path / "model.safetensors") | {f"optimizer {name}": value for name, value in optimizer.items()}


def logged(folder: Path, kind: str, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["kind"] == kind]


def exported_interpolation(folder: Path) -> float:
    return json.loads((folder / "export/config.json").read_text())["encoder"]["rotary_interpolation"]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    answers = iter([False] * steps)
    monkeypatch.setattr(StopRequest, "noticed", lambda self: next(answers, True))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    run(dataset, folder)
    return folder


@pytest.mark.parametrize("interrupted_after", range(1, STEPS))
def test_interrupted_within_a_stage_or_at_its_border_and_continued_is_the_same_bit_for_bit(
    interrupted_after, dataset, undisturbed, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, interrupted_after)
        run(dataset, tmp_path / "run")
    assert exported_interpolation(tmp_path / "run") == [1.0, 2.0, 4.0][(interrupted_after - 1) // 2]
    run(dataset, tmp_path / "run", "--data.num_workers=2")
    first, second = state_after(tmp_path / "run"), state_after(undisturbed)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for kind, name in (("train", "loss"), ("dev", "dev_loss")):
        assert logged(tmp_path / "run", kind, name) == logged(undisturbed, kind, name)


def test_a_finished_run_exports_the_positions_of_its_last_stage_again(dataset, tmp_path):
    """The last step of the run is the last of a stage: the stage that would follow must not be exported."""
    run(dataset, tmp_path / "run", "--run.steps=4")
    run(dataset, tmp_path / "run", "--run.steps=4")
    assert exported_interpolation(tmp_path / "run") == 2.0


@pytest.mark.parametrize(
    ("world_size", "more"),
    [(1, ["--accumulation=4"]), (2, []), (2, ["--distributed.strategy=fsdp"]), (2, ["--accumulation=2"])],
    ids=["accumulation", "ddp", "fsdp", "ddp and accumulation"],
)
def test_the_stages_give_the_same_losses_on_any_number_of_processes(world_size, more, dataset, tmp_path):
    """Only the order of summation differs: a relative 2e-4 in float32 without dropout."""
    run(dataset, tmp_path / "one", *NO_DROPOUT)
    if world_size == 1:
        run(dataset, tmp_path / "spread", *NO_DROPOUT, *more)
    else:
        run_distributed(run_in_world, world_size, arguments(dataset, tmp_path / "spread", *NO_DROPOUT, *more))
    for kind, name in (("train", "loss"), ("dev", "dev_loss")):
        assert logged(tmp_path / "spread", kind, name) == pytest.approx(logged(tmp_path / "one", kind, name), rel=2e-4)
    states = [
        json.loads((tmp_path / name / f"checkpoints/step-{STEPS:08d}/state.json").read_text())["state"]["data"]
        for name in ("one", "spread")
    ]
    assert states[0] == states[1]
    assert exported_interpolation(tmp_path / "spread") == 4.0


def test_every_stage_has_its_rows_crops_and_positions_and_as_many_frames_per_step(dataset, tmp_path, monkeypatch):
    shapes, longest, phases = [], [], []
    original = curriculum.CurriculumLoader.steps
    layout_of = ConformerEncoder.layout

    def noted(self, interrupted):
        for batches in original(self, interrupted):
            shapes.append([tuple(batch.log_mel.shape[:2]) for batch in batches])
            longest.append(max(int(batch.segments.length.max()) for batch in batches))
            yield batches

    def layout(self, segments, backend=None):
        made = layout_of(self, segments, backend)
        if self.training:
            used = made.output.position == 40  # frame 40 of a segment
            phases.append(float(torch.view_as_complex(made.output.attention.rotary_phase)[used][0, 0].angle()))
        return made

    monkeypatch.setattr(curriculum.CurriculumLoader, "steps", noted)
    monkeypatch.setattr(ConformerEncoder, "layout", layout)
    run(dataset, tmp_path / "run")
    assert shapes == [[(16, 400)]] * 2 + [[(8, 800)]] * 2 + [[(4, 1600)]] * 2
    assert max(longest[:2]) <= 400 < max(longest[2:4]) <= 700 < max(longest[4:]) <= 900
    # The fastest pair turns by one radian per frame, undivided.
    turns = [torch.tensor(40.0 / divisor) for divisor in (1, 1, 2, 2, 4, 4)]
    expected = [float(torch.atan2(turn.sin(), turn.cos())) for turn in turns]
    assert phases == pytest.approx(expected, abs=1e-5)


def test_held_out_rows_and_masks_are_those_of_the_first_stage(dataset, tmp_path, monkeypatch):
    """Losses of different stages are comparable: validation has the same crops, masks and noise throughout."""
    seen = []
    validate = pretrain.validate

    def noted(model, batches, settings, world):
        rows = list(batches)
        seen.append([torch.cat([one.log_mel.flatten() for one in rows]), *(one.target_frames for one in rows)])
        return validate(model, rows, settings, world)

    monkeypatch.setattr(pretrain, "validate", noted)
    run(dataset, tmp_path / "run")
    run(dataset, tmp_path / "plain", "--curriculum=[]", "--run.steps=1")
    assert len(seen) == STEPS + 1
    for first, second in pairwise(seen):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_stage_without_positions_keeps_those_of_the_stage_before(dataset, tmp_path):
    config = parse(pretrain.Config, arguments(dataset, tmp_path / "run"))
    stages = [replace(config.curriculum[0]), replace(config.curriculum[1], rotary_interpolation=None)]
    made = curriculum.stages_of(replace(config, curriculum=stages))
    assert [stage.encoder.rotary_interpolation for stage in made] == [1.0, 2.0, 2.0]
    assert [replace(stage.encoder, rotary_interpolation=1.0) for stage in made] == [config.encoder] * 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--curriculum=[{after_step: 0}]"], r"curriculum\[0\].after_step is 0: give more than 0"),
        (["--curriculum=[{after_step: 2, row_frames: 700}]"], r"curriculum\[0\].row_frames is 700: .* = 6400 frames"),
        (["--curriculum=[{after_step: 2, rotary_interpolation: 0}]"], r"rotary_interpolation"),
        (["--encoder.position=relative"], r"curriculum\[0\].rotary_interpolation is 2.*encoder.position is 'relative'"),
    ],
)
def test_a_curriculum_that_does_not_fit_is_refused_before_training(more, message, dataset, tmp_path):
    with pytest.raises(UserError, match=message):
        run(dataset, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_a_later_stage_that_the_processes_cannot_share_is_refused_with_its_number(dataset, tmp_path):
    with pytest.raises(UserError, match=r"curriculum\[1\]: data.rows is 4: .*accumulation 8 = 8"):
        run(dataset, tmp_path / "run", "--accumulation=8")
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_fine_tuning_trains_and_exports_with_the_positions_of_its_stages(dataset, undisturbed, tmp_path):
    options = [*ENCODER, *DATA, *RUN, "--data.num_workers=0", "--run.steps=3", "--validation.every_steps=3"]
    stages = "--curriculum=[{after_step: 1, row_frames: 400, max_seconds: 4, rotary_interpolation: 3}]"
    places = [f"--data.dataset={dataset}", f"--finetune.init={undisturbed / 'export'}"]
    for name, more in (("staged", [stages]), ("plain", [])):
        options_of_run = [*options, *places, f"--run.folder={tmp_path / name}", *more]
        finetune_ctc.train(parse(finetune_ctc.Config, options_of_run))
    assert exported_interpolation(tmp_path / "staged") == 3.0 and exported_interpolation(tmp_path / "plain") == 1.0
    losses = [logged(tmp_path / name, "train", "loss") for name in ("staged", "plain")]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


@pytest.mark.parametrize(("row_frames", "segment_frames"), [(1600, 390), (1600, 800), (800, 800), (804, 800)])
def test_the_operations_of_a_row_are_counted_for_rows_of_several_segments(row_frames, segment_frames):
    """Segments have the gaps of the loader between them, without which the layout refuses the row."""
    config = parse(pretrain.Config, [*ENCODER, "--quantizer.codebook_size=64"])
    model = objective.BestRQ(config.encoder, config.quantizer)
    assert flops_per_row(model, row_frames, segment_frames, torch.device("cpu")) > 0
