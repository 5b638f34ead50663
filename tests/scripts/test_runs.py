"""Training loops: resume, world sizes, accumulation. All tests run the real scripts."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.pretraining.objective import mask_rows
from bestrq.training.checkpoint import list_checkpoints
from bestrq.training.stop import StopRequest
from common.config import parse
from common.errors import UserError
from data.tokenizer import CharTokenizer
from pipelines import curriculum, pretraining
from tests.gloo import run_distributed
from tests.paths import REPOSITORY
from tests.patience import wait_until
from tests.tiny import DATA, ENCODER, RUN, make_dataset

STEPS = 5
SCRIPTS = {"pretrain": pretrain, "finetune_ctc": finetune_ctc, "finetune_rnnt": finetune_rnnt}
FINE_TUNING = ["--validation.every_steps=2", "--finetune.freeze_encoder_steps=1", "--checkpoint.keep_last=9"]
SPECIAL = {
    "pretrain": ["--quantizer.codebook_size=64", "--quantizer.num_codebooks=2", "--checkpoint.every_steps=2"],
    "finetune_ctc": FINE_TUNING,
    "finetune_rnnt": [
        *FINE_TUNING,
        *("--transducer.prediction=lstm", "--transducer.prediction_dim=12", "--transducer.joint_dim=10"),
        *("--transducer.ctc_weight=0.3", "--transducer.prune_range=6", "--transducer.slice_bytes=20000"),
        "--curriculum=[{after_step: 2, row_frames: 200, max_seconds: 2}, {after_step: 3, row_frames: 400}]",
    ],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


def arguments(script: str, dataset: Path, folder: Path, *more: str) -> list[str]:
    common = [*ENCODER, *DATA, *RUN, *SPECIAL[script], "--data.num_workers=0", f"--run.steps={STEPS}"]
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}"]
    return [*common, "--optimizer.learning_rate=1e-2", "--optimizer.warmup_steps=2", *places, *more]


def run(script: str, dataset: Path, folder: Path, *more: str) -> None:
    module = SCRIPTS[script]
    module.train(parse(module.Config, arguments(script, dataset, folder, *more)))


def stop_after(monkeypatch, steps: int) -> None:
    """Make the next run stop after a number of steps, as after a request to stop."""
    answers = iter([False] * steps)
    monkeypatch.setattr(StopRequest, "noticed", lambda self: next(answers, True))


def final_weights(folder: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    step, path = list_checkpoints(folder / "checkpoints")[-1]
    assert step == steps
    return load_file(path / "model.safetensors") | {
        f"optimizer {name}": tensor for name, tensor in load_file(path / "optimizer.safetensors").items()
    }


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert differing == []


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> dict[str, Path]:
    folders = {script: tmp_path_factory.mktemp("runs") / script for script in SCRIPTS}
    for script, folder in folders.items():
        run(script, dataset, folder)
    return folders


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("interrupted_after", range(1, STEPS))
def test_interrupted_at_any_step_and_continued_is_the_same_bit_for_bit(
    script, interrupted_after, dataset, undisturbed, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, interrupted_after)
        run(script, dataset, folder)
    assert (folder / "REQUEUE").exists()
    assert list_checkpoints(folder / "checkpoints")[-1][0] == interrupted_after
    run(script, dataset, folder)
    assert not (folder / "REQUEUE").exists()
    assert_identical(final_weights(folder), final_weights(undisturbed[script]))
    assert losses(folder) == losses(undisturbed[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_twice_and_continued_with_other_workers_is_the_same(
    script, dataset, undisturbed, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    for steps, workers in ((2, 0), (1, 2)):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            run(script, dataset, folder, f"--data.num_workers={workers}")
    run(script, dataset, folder, "--data.num_workers=1")
    assert_identical(final_weights(folder), final_weights(undisturbed[script]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_without_warning_and_continued_is_the_same(script, dataset, undisturbed, tmp_path):
    """SIGKILL as soon as the second checkpoint is complete, at any point of the next step."""
    folder = tmp_path / "run"
    command = [sys.executable, f"{script}.py", *arguments(script, dataset, folder, "--checkpoint.every_steps=1")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "checkpoints/step-00000002/COMPLETE").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    run(script, dataset, folder)
    assert_identical(final_weights(folder), final_weights(undisturbed[script]))
    assert losses(folder) == losses(undisturbed[script])


def test_sigterm_saves_and_leaves_a_requeue_marker(dataset, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "pretrain.py", *arguments("pretrain", dataset, folder, "--data.num_workers=1")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0
    assert "stopped after step" in rest and "SIGTERM" in rest
    assert (folder / "REQUEUE").exists()
    run("pretrain", dataset, folder)
    assert_identical(final_weights(folder), final_weights(undisturbed["pretrain"]))


def run_in_world(world, script: str, options: list[str]) -> None:
    module = SCRIPTS[script]
    module.start_world = lambda settings: world  # this process has joined one already
    module.train(parse(module.Config, options))


NO_DROPOUT = ["--encoder.dropout=0", "--encoder.attention_dropout=0"]
NOT_FROZEN = "--finetune.freeze_encoder_steps=0"
EXACT = {
    "pretrain": [*NO_DROPOUT, "--run.steps=10"],
    "finetune_ctc": [*NO_DROPOUT, "--run.steps=10", NOT_FROZEN],
    "finetune_rnnt": [*NO_DROPOUT, "--run.steps=10", NOT_FROZEN, "--transducer.dropout=0"],
}


@pytest.fixture(scope="module")
def without_dropout(dataset, tmp_path_factory) -> dict[str, Path]:
    """Runs of one process without accumulation."""
    folders = {script: tmp_path_factory.mktemp("exact") / script for script in SCRIPTS}
    for script, folder in folders.items():
        run(script, dataset, folder, *EXACT[script])
    return folders


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("world_size", "more"),
    [(1, ["--accumulation=4"]), (2, []), (2, ["--distributed.strategy=fsdp"]), (2, ["--accumulation=2"])],
    ids=["accumulation", "ddp", "fsdp", "ddp and accumulation"],
)
def test_the_same_global_batch_gives_the_same_losses_however_it_is_spread(
    script, world_size, more, dataset, without_dropout, tmp_path
):
    """Losses of ten steps agree to a relative 2e-4 in float32 without dropout: only the summation order differs."""
    reference, folder = without_dropout[script], tmp_path / "spread"
    if world_size == 1:
        run(script, dataset, folder, *EXACT[script], *more)
    else:
        run_distributed(run_in_world, world_size, script, arguments(script, dataset, folder, *EXACT[script], *more))
    assert losses(folder) == pytest.approx(losses(reference), rel=2e-4)
    weights, expected = final_weights(folder, 10), final_weights(reference, 10)
    for name in expected:
        torch.testing.assert_close(
            weights[name], expected[name], rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
def test_fsdp_in_bfloat16_trains_and_validates(script, dataset, tmp_path):
    """The blocks' weights are bfloat16, in validation too."""
    steps = ["--distributed.precision=bfloat16", "--run.steps=1"]
    options = arguments(script, dataset, tmp_path / "run", *steps, "--distributed.strategy=fsdp")
    run_distributed(run_in_world, 2, script, options)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [1]


def test_a_run_continues_in_another_world_with_the_same_batches(dataset, undisturbed, tmp_path, monkeypatch):
    reference, folder = tmp_path / "one", tmp_path / "moved"
    run("pretrain", dataset, reference, *NO_DROPOUT)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run("pretrain", dataset, folder, *NO_DROPOUT)
    options = arguments("pretrain", dataset, folder, *NO_DROPOUT, "--distributed.strategy=fsdp")
    run_distributed(run_in_world, 2, "pretrain", options)
    assert losses(folder) == pytest.approx(losses(reference), rel=2e-4)
    states = [json.loads((f / "checkpoints/step-00000005/state.json").read_text()) for f in (reference, folder)]
    assert states[0]["state"]["data"] == states[1]["state"]["data"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_configuration_in_the_same_folder_is_refused(script, dataset, undisturbed):
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0.01, is 0.5"):
        run(script, dataset, undisturbed[script], "--optimizer.learning_rate=0.5")


def test_a_run_goes_on_after_an_upgrade_that_brought_new_settings(dataset, undisturbed, tmp_path):
    """New settings have their defaults; another value is another configuration."""
    copy = shutil.copytree(undisturbed["pretrain"], tmp_path / "run")
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    del settings["guard"], settings["encoder"]["rotary_interpolation"]
    settings["run"]["folder"] = str(copy)
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"encoder.rotary_interpolation was 1.0, is 2"):
        run("pretrain", dataset, copy, "--encoder.rotary_interpolation=2")
    with pytest.raises(UserError, match=r"guard.spike_sigma was 6.0, is 3"):
        run("pretrain", dataset, copy, "--guard.spike_sigma=3")
    run("pretrain", dataset, copy)
    assert yaml.safe_load((copy / "config.yaml").read_text())["guard"]["spike_sigma"] == 6.0


def test_fine_tuning_refuses_an_export_that_does_not_fit(dataset, undisturbed, tmp_path):
    export = f"--finetune.init={undisturbed['pretrain'] / 'export'}"
    with pytest.raises(UserError, match=r"encoder.kernel_size is 7, in the export 5"):
        run("finetune_ctc", dataset, tmp_path / "a", export, "--encoder.kernel_size=7")
    with pytest.raises(UserError, match=r"data.normalisation: 'dataset' != 'recording'"):
        run("finetune_ctc", dataset, tmp_path / "b", export, "--data.normalisation=dataset")


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_features_are_refused_by_name(script, undisturbed, tmp_path):
    other = make_dataset(tmp_path / "other", recordings=30, low_hz=50.0)
    copy = tmp_path / "run"
    shutil.copytree(undisturbed[script], copy)
    config = (copy / "config.yaml").read_text()  # the same path, other features
    (copy / "config.yaml").write_text(re.sub(r"(?m)^  dataset: .*", f"  dataset: {other}", config))
    with pytest.raises(UserError, match=r"features.low_hz 20.0, and now it is 50.0"):
        run(script, other, copy)
    with pytest.raises(UserError, match=r"low_hz: 50.0 != 20.0"):
        run("finetune_ctc", other, tmp_path / "new", f"--finetune.init={undisturbed['pretrain'] / 'export'}")


def test_non_finite_losses_update_nothing_name_the_samples_and_end_the_run(dataset, tmp_path, monkeypatch, capfd):
    with pytest.raises(RuntimeError, match="5 steps in a row"):
        monkeypatch.setattr(pretraining, "mask_rows", poisoned_rows)
        run("pretrain", dataset, tmp_path / "run", "--run.steps=9")
    assert "step 1 skipped on all ranks" in capfd.readouterr().err
    checkpoints = tmp_path / "run/checkpoints"
    wait_until(lambda: len(list_checkpoints(checkpoints)) == 2)  # the second was being written when the run ended
    assert_identical(*(load_file(path / "model.safetensors") for _, path in list_checkpoints(checkpoints)))


def poisoned_rows(*arguments):
    rows = mask_rows(*arguments)
    rows.log_mel[0, 0, 0] = float("nan")
    return rows


def test_rows_that_the_processes_cannot_share_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match=r"rows is 4: .* accumulation 3 = 3; nearest: 3 or 6"):
        run("pretrain", dataset, tmp_path / "run", "--accumulation=3")


def test_labels_outside_the_tokenizer_are_refused_before_training(dataset, tmp_path):
    run("finetune_ctc", dataset, tmp_path / "run")
    tokenizer = tmp_path / "other/tokenizer"
    CharTokenizer(" abcdefgh").save(tokenizer)
    with pytest.raises(UserError, match="characters unknown to the tokenizer"):
        run("finetune_ctc", dataset, tmp_path / "other")
    assert not (tmp_path / "other/checkpoints").exists()


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
@pytest.mark.parametrize("start", ["export", "checkpoints/step-00000005"])
def test_fine_tuning_starts_from_the_pretrained_encoder(script, start, dataset, undisturbed, tmp_path):
    """At a negligible learning rate the encoder equals the export, except for the re-initialised top block."""
    init = undisturbed["pretrain"] / start
    options = [f"--finetune.init={init}", "--finetune.reinitialise_top_blocks=1", "--optimizer.learning_rate=1e-12"]
    run(script, dataset, tmp_path / "run", *options)
    before, after = load_file(undisturbed["pretrain"] / "export/model.safetensors"), final_weights(tmp_path / "run")
    for name, tensor in before.items():
        is_fresh = name.startswith("encoder.blocks.1.")
        assert torch.allclose(after[name], tensor, atol=1e-6) != is_fresh, name


def test_a_checkpoint_without_its_run_is_refused_with_what_to_give(dataset, undisturbed, tmp_path):
    shutil.copytree(undisturbed["pretrain"] / "checkpoints/step-00000005", tmp_path / "loose")
    with pytest.raises(UserError, match=r"loose is a checkpoint, .*; give .* in its run folder, or an export"):
        run("finetune_ctc", dataset, tmp_path / "run", f"--finetune.init={tmp_path / 'loose'}")


def test_stages_of_a_curriculum_have_their_rows_and_as_many_frames_an_update(dataset, tmp_path, monkeypatch):
    shapes, longest = [], []
    original = curriculum.CurriculumLoader.steps

    def noted(self, interrupted):
        for batches in original(self, interrupted):
            shapes.append([tuple(batch.log_mel.shape[:2]) for batch in batches])
            longest.append(max(int(batch.segments.length.max()) for batch in batches))
            yield batches

    monkeypatch.setattr(curriculum.CurriculumLoader, "steps", noted)
    stages = "[{after_step: 1, row_frames: 800, max_seconds: 7}, {after_step: 3, row_frames: 1600, max_seconds: 9}]"
    run("finetune_ctc", dataset, tmp_path / "run", f"--curriculum={stages}", "--accumulation=1")
    assert shapes == [[(4, 400)]] + [[(2, 800)]] * 2 + [[(1, 1600)]] * 2
    assert longest[0] <= 400 and max(longest[1:3]) <= 700 and max(longest[3:]) > 700


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{after_step: 0}]", r"curriculum\[0\].after_step is 0: give more than 0"),
        ("[{after_step: 2, row_frames: 800}, {after_step: 2}]", r"curriculum\[1\].after_step is 2: give more than 2"),
        ("[{after_step: 2, row_frames: 700}]", r"curriculum\[0\].row_frames is 700: .* = 1600 frames"),
    ],
)
def test_a_curriculum_that_does_not_fit_is_refused_before_training(stages, message, dataset, tmp_path):
    with pytest.raises(UserError, match=message):
        run("finetune_ctc", dataset, tmp_path / "run", f"--curriculum={stages}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("script", "mode"), [("finetune_ctc", "streaming"), ("finetune_rnnt", "averaged")])
def test_a_mode_that_validation_has_not_is_refused_before_training(script, mode, dataset, tmp_path):
    with pytest.raises(UserError, match=f"inference.mode is '{mode}'"):
        run(script, dataset, tmp_path / "run", f"--inference.mode={mode}")
    assert not (tmp_path / "run").exists()


def test_a_resumed_fine_tuning_needs_what_it_started_from_no_more(dataset, undisturbed, tmp_path, monkeypatch):
    init = shutil.copytree(undisturbed["pretrain"] / "export", tmp_path / "export")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run("finetune_ctc", dataset, tmp_path / "run", f"--finetune.init={init}")
    shutil.rmtree(init)
    run("finetune_ctc", dataset, tmp_path / "run", f"--finetune.init={init}")
    assert list_checkpoints(tmp_path / "run/checkpoints")[-1][0] == STEPS
    with pytest.raises(UserError, match="there is no export at"):
        run("finetune_ctc", dataset, tmp_path / "new", f"--finetune.init={init}")


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
def test_a_validation_is_saved_before_it_is_printed(script, dataset, tmp_path, monkeypatch):
    def broken(*values, **options) -> None:
        if "hypothesis" in str(values):
            raise OSError("no console")

    monkeypatch.setattr(SCRIPTS[script], "print", broken, raising=False)
    with pytest.raises(OSError, match="no console"):
        run(script, dataset, tmp_path / "run")
    assert [step for step, _ in list_checkpoints(tmp_path / "run/checkpoints")] == [2]
    assert json.loads((tmp_path / "run/export/config.json").read_text())["step"] == 2


def start_run(script, places: list[str], folder: Path, monkeypatch, *more: str) -> None:
    """Run the first two steps."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        continue_run(script, places, folder, *more)


def continue_run(script, places: list[str], folder: Path, *more: str) -> None:
    options = [one for one in arguments(script, Path(), folder, *more) if not one.startswith("--data.dataset")]
    SCRIPTS[script].train(parse(SCRIPTS[script].Config, [*options, *places]))


def mixture(*parts: tuple[Path | str, float]) -> list[str]:
    return ["--data.mixture=" + json.dumps([{"dataset": str(place), "weight": weight} for place, weight in parts])]


@pytest.mark.parametrize("script", SCRIPTS)
def test_moved_data_continue_a_run_bit_for_bit_and_other_data_are_refused(
    script, dataset, undisturbed, tmp_path, monkeypatch
):
    moved, run_folder = tmp_path / "scratch" / "corpus", tmp_path / "run"
    shutil.copytree(dataset, moved)
    start_run(script, [f"--data.dataset={dataset}"], run_folder, monkeypatch)
    other = make_dataset(tmp_path / "other", recordings=30, seed=9)
    before = (run_folder / "run.json").read_text()
    with pytest.raises(UserError, match=r"started with dataset \w+, and now it is \w+ \(data.dataset was .*other'\)"):
        continue_run(script, [f"--data.dataset={other}"], run_folder)
    assert (run_folder / "run.json").read_text() == before
    monkeypatch.chdir(tmp_path)
    for place in (f"{dataset}/", "scratch/corpus"):
        start_run(script, [f"--data.dataset={place}"], run_folder, monkeypatch)
    continue_run(script, [f"--data.dataset={moved}/"], run_folder)
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["data"]["dataset"] == f"{moved}/"
    assert_identical(final_weights(run_folder), final_weights(undisturbed[script]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mixture_may_move_but_its_parts_order_and_weights_may_not_change(script, dataset, tmp_path, monkeypatch):
    second = make_dataset(tmp_path / "second", recordings=30, seed=1)
    third = make_dataset(tmp_path / "third", recordings=30, seed=2)
    moved, folder = shutil.copytree(second, tmp_path / "moved"), tmp_path / "run"
    start_run(script, mixture((dataset, 1.0), (second, 2.0)), folder, monkeypatch)
    refused = [
        (mixture((dataset, 1.0), (moved, 3.0)), r"data.mixture\[1\].weight was 2.0, is 3.0"),
        (mixture((dataset, 1.0), (third, 2.0)), r"started with data.mixture\[1\].dataset \w+, and now it is .*third"),
        (mixture((moved, 1.0), (dataset, 2.0)), r"started with data.mixture\[0\].dataset"),
        (mixture((moved, 2.0), (dataset, 1.0)), r"data.mixture\[0\].weight was 1.0, is 2.0"),
        (mixture((dataset, 1.0)), r"data.mixture was \["),
        ([f"--data.dataset={dataset}"], r"data.mixture was \["),
    ]
    for places, message in refused:
        with pytest.raises(UserError, match=message):
            continue_run(script, places, folder)
    continue_run(script, mixture((f"{dataset}/", 1.0), (moved, 2.0)), folder)
    final_weights(folder)


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
def test_the_pretrained_encoder_may_move_and_another_one_is_refused(
    script, dataset, undisturbed, tmp_path, monkeypatch
):
    data, folder, pretrained = [f"--data.dataset={dataset}"], tmp_path / "run", undisturbed["pretrain"]
    init = shutil.copytree(pretrained / "export", tmp_path / "export")
    start_run(script, data, folder, monkeypatch, f"--finetune.init={init}")
    (folder / "tokenizer/.ipynb_checkpoints").mkdir()
    init.rename(tmp_path / "moved")
    earlier = pretrained / "checkpoints/step-00000004"
    with pytest.raises(UserError, match=r"started with finetune.init \w+, and now it is \w+ \(finetune.init was"):
        continue_run(script, data, folder, f"--finetune.init={earlier}")
    with pytest.raises(UserError, match=r"finetune.init is .*nowhere, .* cannot be compared"):
        continue_run(script, data, folder, f"--finetune.init={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"finetune.init was .*export', is ''"):
        continue_run(script, data, folder)
    continue_run(script, data, folder, f"--finetune.init={tmp_path / 'moved'}")
    assert (folder / "export/config.json").is_file()


def test_without_a_recorded_fingerprint_a_moved_place_is_another_configuration(dataset, tmp_path, monkeypatch):
    """A run from before fingerprints were recorded: the data cannot be compared."""
    moved, folder = shutil.copytree(dataset, tmp_path / "moved"), tmp_path / "run"
    start_run("pretrain", [f"--data.dataset={dataset}"], folder, monkeypatch)
    (folder / "run.json").write_text(json.dumps({"starts": [{"time": "2020"}]}))
    with pytest.raises(UserError, match=r"another configuration: data.dataset was"):
        continue_run("pretrain", [f"--data.dataset={moved}"], folder)
    continue_run("pretrain", [f"--data.dataset={dataset}/"], folder)


def test_a_budget_too_small_for_a_frame_is_refused_before_training_and_the_one_it_names_works(dataset, tmp_path):
    with pytest.raises(UserError, match=r"transducer.slice_bytes is 100: .*; give \d+ or more") as found:
        run("finetune_rnnt", dataset, tmp_path / "run", "--transducer.slice_bytes=100")
    assert not (tmp_path / "run/checkpoints").exists()
    smallest = re.search(r"give (\d+) or more", str(found.value))
    assert smallest is not None
    run("finetune_rnnt", dataset, tmp_path / "run", f"--transducer.slice_bytes={smallest[1]}", "--run.steps=2")
