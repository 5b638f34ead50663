"""Experiment on pretraining: intervals, choices, plan, collected numbers, page, corpus, and a tiny run end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bestrq.pretraining.multi_target import make_tasks
from bestrq.report.result_files import FORMAT_VERSION
from bestrq.scoring.word_errors import score_corpus, score_recording
from bestrq.training.checkpoint import CheckpointSettings, prune_checkpoints
from bestrq.training.checkpoint_saving import take_snapshot, write_checkpoint
from bestrq.training.process import World
from common.config import parse
from common.errors import UserError
from common.files import write_json
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from experiments.jobs import Record
from experiments.learning.__main__ import whole_command
from experiments.learning.choices import choose, dev_cer_of_export, write_overlay
from experiments.learning.corpus import check_texts, choose_languages, preparation, usable_minutes
from experiments.learning.intervals import Errors, mean_rate, rate_with_interval
from experiments.learning.label_texts import label_texts
from experiments.learning.pack import pack, packing_order
from experiments.learning.page import END, START, figure, replace_results, tables
from experiments.learning.plan import Plan, make_plan
from experiments.learning.results import collect
from experiments.learning.setup import Setup
from experiments.learning.stages import SIZES, STAGES, SYSTEMS, FineTuning, Pretraining, fine_tuning
from pipelines import pretraining
from tests.made_datasets import verify
from tests.made_results import completed
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

# ---- Intervals ----


def errors(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Errors:
    return Errors(np.array(rows), np.array(lengths))


def test_rates_are_means_over_languages_not_over_characters() -> None:
    """(5 / 10 + 100 / 1000) / 2, and two seeds with 4 and 6 errors of 10."""
    assert mean_rate([errors([[5]], [10]), errors([[60, 40]], [500, 500])]) == pytest.approx(0.3)
    assert mean_rate([errors([[4], [6]], [10])]) == pytest.approx(0.5)


def test_the_interval_is_that_of_the_enumerated_resamples() -> None:
    """Two recordings have the draws (2, 0), (1, 1), (0, 2) with rates 0, 1/2 and 1; so have two seeds."""
    for rows, lengths in (([[0, 10]], [10, 10]), ([[0], [10]], [10])):
        assert rate_with_interval([errors(rows, lengths)], 2000) == (0.5, 0.0, 1.0)


def test_languages_are_resampled_separately() -> None:
    """With the same draws in both, rates of 0 and 1 would always add up to 1/2."""
    first, second = errors([[0, 10]], [10, 10]), errors([[10, 0]], [10, 10])
    _, low, high = rate_with_interval([first, second], 2000)
    assert low < 0.5 < high


# ---- Choices ----


def test_the_candidate_with_the_lowest_mean_dev_cer_is_chosen_and_the_others_are_recorded(tmp_path: Path) -> None:
    rates = {"a": (0.5, 0.25), "b": (0.25, 0.25), "c": (0.125, 0.375)}  # means 0.375, 0.25, 0.25
    for name, values in rates.items():
        for place, value in enumerate(values):
            write_json(tmp_path / f"{name}{place}.json", {"dev_cer": value})
    candidates = [{"optimizer.learning_rate": rate, "encoder.dropout": 0.1} for rate in (1.0, 2.0, 3.0)]
    paths = [[tmp_path / f"{name}{place}.json" for place in (0, 1)] for name in rates]
    choose(candidates, paths, dev_cer_of_export, tmp_path / "out.yaml")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["chosen"] == 1
    assert [entry["dev_cer"] for entry in document["candidates"]] == [0.375, 0.25, 0.25]
    chosen = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert chosen == {"optimizer": {"learning_rate": 2.0}, "encoder": {"dropout": 0.1}}


def test_an_overlay_overrides_the_recipe(tmp_path: Path) -> None:
    import finetune_ctc

    write_overlay(tmp_path / "o.yaml", {"optimizer.learning_rate": 7e-4, "run.steps": 12})
    files = ["--config", str(REPOSITORY / "configs/learning-ctc.yaml"), "--config", str(tmp_path / "o.yaml")]
    config = parse(finetune_ctc.Config, files)
    assert (config.optimizer.learning_rate, config.run.steps, config.optimizer.warmup_steps) == (7e-4, 12, 200)


# ---- Plan ----


def setup_of(folder: Path, **changed: Any) -> Setup:
    size = replace(SIZES["tiny"], **changed.pop("size", {}))
    values = {"languages": ("cs", "nl"), "minutes": (10.0, 30.0), "seeds": (0, 1), "systems": SYSTEMS, **changed}
    return Setup(folder, folder / "dataset", size=size, **values)


def settings_of(command: Sequence[str]) -> dict[str, str]:
    """Last value of every argument."""
    return dict(word[2:].split("=", 1) for word in command if word.startswith("--"))


def test_every_stage_needs_only_earlier_ones_and_grids_have_the_same_size() -> None:
    known: set[str] = set()
    for stage in STAGES:
        for name in ("init", "pseudo", "speech", "teacher", "tuned_as"):
            assert getattr(stage, name, "") in {"", *known}, (stage.name, name)
        known.add(stage.name)
    assert len({len(stage.grid) for stage in STAGES if isinstance(stage, FineTuning) and stage.grid}) == 1


def test_systems_differ_in_what_they_learn_from_not_in_labels_seeds_or_steps(tmp_path: Path) -> None:
    plan = make_plan(setup_of(tmp_path))
    for system in SYSTEMS:
        values = settings_of(plan.jobs[f"{system}/nl-30min-s1"].command)
        assert values["finetune.language"] == "nl" and values["finetune.label_minutes"] == "30.0"
        assert values["data.seed"] == values["run.seed"] == "1"
        steps = "4" if fine_tuning(system).pseudo else "2"  # twice as many with pseudo-labels
        assert values.get("run.steps") == (None if fine_tuning(system).equal_cost else steps)
        assert ("finetune.init" in values) == bool(fine_tuning(system).init)


def test_only_dev_takes_part_in_choices_and_test_is_decoded_once_per_decoding(tmp_path: Path) -> None:
    plan = make_plan(setup_of(tmp_path, size={"language_models": ({"decoder.beam": 2}, {"decoder.beam": 3})}))
    tests = [job for job in plan.jobs.values() if settings_of(job.command).get("data.split") == "test"]
    outs = [settings_of(job.command)["out"] for job in tests]
    assert len(outs) == len(set(outs)) == len(SYSTEMS) * (8 + 4), "greedy in 8 cells, n-gram in the 4 of 30 minutes"
    choices = [job for job in plan.jobs.values() if job.name.startswith("choice-")]
    assert len(choices) == 2 + len(SYSTEMS) + 1
    for job in choices:
        assert not {test.name for test in tests}.intersection(job.needs)
        assert all("-s0" in name for name in job.needs) or "equal-cost" in job.name


def test_a_guided_encoder_and_pseudo_labels_come_from_the_labels_of_the_same_cell(tmp_path: Path) -> None:
    """Targets from the labels of another seed would be more labels."""
    plan = make_plan(setup_of(tmp_path))
    cell = "cs-10min-s1"
    guided, pseudo = (settings_of(plan.jobs[f"{name}/{cell}"].command) for name in ("guided-encoder", "scratch-labels"))
    teacher = str(plan.run(f"scratch/{cell}") / "export")
    assert guided["targets.export"] == pseudo["export"] == teacher
    assert (pseudo["labels.minutes"], pseudo["labels.seed"], pseudo["data.language"]) == ("10.0", "1", "cs")
    mixture = json.loads(settings_of(plan.jobs[f"self-training/{cell}"].command)["data.mixture"])
    assert [part.get("pseudo_labels", False) for part in mixture] == [False, True]


def test_the_settings_of_every_pretraining_fit_together(tmp_path: Path) -> None:
    jobs = [job for job in make_plan(setup_of(tmp_path)).jobs.values() if job.kind == "pretrain"]
    assert {job.name.split("/")[0] for job in jobs} == {
        stage.name for stage in STAGES if isinstance(stage, Pretraining)
    }
    for job in jobs:
        config = parse(pretraining.Config, job.command[2:])
        make_tasks(config.encoder, config.quantizer, config.targets, classes=8)


def test_without_trials_the_first_candidate_is_taken(tmp_path: Path) -> None:
    plan = make_plan(
        setup_of(tmp_path, size={"candidates": 1, "language_models": ()}, systems=("scratch", "pretrained"))
    )
    assert not [name for name in plan.jobs if "choice" in name or "grid" in name]
    values = settings_of(plan.jobs["scratch/cs-30min-s0"].command)
    assert values["optimizer.learning_rate"] == "0.002" and "finetune.reinitialise_top_blocks" not in values


def test_a_given_pretraining_replaces_the_own_one_with_its_cost(tmp_path: Path) -> None:
    given = tmp_path / "elsewhere/export"
    plan = make_plan(setup_of(tmp_path, pretrained=given, pretrained_seconds=100.0))
    assert settings_of(plan.jobs["pretrained/cs-30min-s0"].command)["finetune.init"] == str(given)
    assert not [name for name in plan.jobs if "-curve/" in name], "its checkpoints are not known"
    assert plan.records.cost(plan.jobs["pretrained/cs-30min-s0"], plan.jobs) == 50.0, "two languages share it"


def test_curve_points_start_from_kept_checkpoints(tmp_path: Path) -> None:
    plan = make_plan(setup_of(tmp_path, size={"pretraining_steps": 800, "curve": (0.125, 0.5)}))
    values = settings_of(plan.jobs["bestrq"].command)
    assert values["checkpoint.every_steps"] == "100"
    init = settings_of(plan.jobs["pretrained-curve/400/cs-30min-s0"].command)["finetune.init"]
    assert init == str(plan.run("bestrq") / "checkpoints/step-00000400")


def test_checkpoints_of_the_curve_survive_stops_and_steps_that_8_does_not_divide(tmp_path: Path) -> None:
    """A stop saves a checkpoint too, which would push out the first one if just 8 were kept."""
    plan = make_plan(setup_of(tmp_path, size={"pretraining_steps": 801, "curve": (0.125, 0.5)}))
    values = settings_of(plan.jobs["bestrq"].command)
    stops = {150, 333, 710}
    folder, model = plan.run("bestrq") / "checkpoints", torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    for step in range(1, 802):
        if step % int(values["checkpoint.every_steps"]) == 0 or step in stops or step == 801:
            write_checkpoint(folder, take_snapshot(step, model, optimizer, {}, World()))
            prune_checkpoints(folder, CheckpointSettings(keep_last=int(values["checkpoint.keep_last"])))
    curve = [job for name, job in plan.jobs.items() if name.startswith("pretrained-curve/")]
    assert len(curve) == 4 and all(Path(settings_of(job.command)["finetune.init"]).is_dir() for job in curve)


# ---- Collected numbers ----

REFERENCE = "abcdefghij"


def finish(plan: Plan, name: str, seconds: float, dev_cer: float) -> None:
    """Record a fine-tuning as done."""
    job = plan.jobs[name]
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text("")
    write_json(job.output.parent / "config.json", {"dev_cer": dev_cer, "step": 2})
    plan.records.write(job, Record("done", plan.records.key(job), 1, seconds))


def score(plan: Plan, name: str, wrong: Mapping[str, int], language: str) -> None:
    """Record an evaluation as done, with this number of wrong characters of ten by recording."""
    rows = [score_recording(id, REFERENCE, "x" * count + REFERENCE[count:], language) for id, count in wrong.items()]
    job = plan.jobs[name]
    results = {"format_version": FORMAT_VERSION, "recordings": [row.row() for row in rows]}
    job.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.output, completed({**results, "scores": {"all": score_corpus(rows, 100).summary()}}))
    plan.records.write(job, Record("done", plan.records.key(job)))


@pytest.fixture
def measured(tmp_path: Path) -> Plan:
    """scratch has 6 of 10 characters wrong in Czech and 4 in Dutch, pretrained 3, self-training 2 but worse on dev."""
    systems = ("scratch", "pretrained", "self-training", "scratch-long")
    plan = make_plan(setup_of(tmp_path, systems=systems, size={"language_models": (), "candidates": 1}))
    plan.records.write(plan.jobs["bestrq"], Record("done", processor_seconds=100.0))
    wrong = {"scratch": {"cs": 6, "nl": 4}, "pretrained": {"cs": 3, "nl": 3}, "self-training": {"cs": 2, "nl": 2}}
    wrong["scratch-long"] = {"cs": 5, "nl": 4}
    for system in systems:
        for language in ("cs", "nl"):
            for seed in (0, 1):
                name = f"{system}/{language}-30min-s{seed}"
                dev = {"scratch": 0.6, "scratch-long": 0.5, "pretrained": 0.3, "self-training": 0.35}[system]
                finish(plan, name, 40.0 if system == "scratch-long" else 10.0, dev)
                count = wrong[system][language]
                score(plan, f"{name}-greedy", {"r0": count - 1, "r1": count + 1}, language)
    return plan


def test_reductions_are_those_of_hand_computed_rates(measured: Plan) -> None:
    """scratch (.6 + .4) / 2, pretrained .3, scratch-long (.5 + .4) / 2. self-training is better on test, not on dev."""
    document = collect(measured, {}, "command", 500)
    assert document["cer_reduction_pretrained"] == pytest.approx(1 - 0.3 / 0.5)
    assert document["cer_reduction_unlabelled_systems"] == ["scratch", "pretrained"]
    assert document["cer_reduction_unlabelled"] == pytest.approx(0.4)
    assert document["cer_reduction_equal_compute"] == pytest.approx(1 - 0.3 / 0.45)
    assert document["cer_reduction_equal_compute_systems"] == ["scratch-long", "pretrained"]
    assert document["cer_reduction_pretrained_low"] < 0.4 < document["cer_reduction_pretrained_high"]
    assert document["cer_reduction_pretrained_seeds"] == document["seeds"] == 2
    mean = next(e for e in document["means"] if e["system"] == "scratch" and e["minutes"] == 30)
    assert mean["greedy_cer"][0] == pytest.approx(0.5) and mean["greedy_wer"][0] == pytest.approx(1.0)


def test_costs_include_the_share_of_the_pretraining(measured: Plan) -> None:
    rows = {(row["system"], row["language"], row["seed"]): row for row in collect(measured, {}, "", 100)["runs"]}
    assert rows["pretrained", "cs", 0]["processor_seconds"] == 10
    assert rows["pretrained", "cs", 0]["total_processor_seconds"] == 10 + 100 / 2
    assert rows["self-training", "nl", 1]["total_processor_seconds"] == 10 + 10, "and that of the teacher"


def test_the_steps_at_equal_cost_are_in_proportion_to_the_measured_time(measured: Plan) -> None:
    """pretrained is the best on dev: 60 s against 10 s of scratch, so 6 times 2 steps; at most 3 times if limited."""
    for longest, steps, is_limited in ((16.0, 12, False), (3.0, 6, True)):
        measured.size = replace(measured.size, longest=longest)
        cells = measured.setup.cells(30.0)
        runs = {s: [f"{s}/{cell}" for cell in cells] for s in ("pretrained", "self-training")}
        out = measured.choice_file("choice-equal-cost")
        out.parent.mkdir(parents=True, exist_ok=True)
        measured._write_budget([f"scratch/{cell}" for cell in cells], runs, out)
        assert yaml.safe_load(out.read_text()) == {"run": {"steps": steps}}
        document = json.loads(out.with_suffix(".json").read_text())
        assert (document["system"], document["seconds"], document["is_limited"]) == ("pretrained", 60.0, is_limited)


def test_keys_without_results_are_absent_and_pending(measured: Plan) -> None:
    for seed in (0, 1):
        measured.jobs[f"scratch-long/cs-30min-s{seed}-greedy"].output.unlink()
    measured.jobs["pretrained/nl-30min-s1-greedy"].output.unlink()
    document = collect(measured, {}, "", 100)
    assert not [key for key in document if key.startswith("cer_reduction_")]
    pending = {line.split(":")[0]: line.split(": ")[1] for line in document["pending"]}
    assert pending["cer_reduction_pretrained"] == "results of fewer than 2 seeds in a language"
    assert pending["cer_reduction_pretrained_10min"] == pending["cer_reduction_pretrained"]
    assert pending["cer_reduction_equal_compute"] == pending["cer_reduction_unlabelled_10min"] == "no results yet"


def test_systems_on_different_recordings_are_not_compared(measured: Plan) -> None:
    score(measured, "pretrained/cs-30min-s1-greedy", {"r0": 1, "r2": 1}, "cs")
    with pytest.raises(UserError, match="pretrained and scratch were evaluated on different recordings"):
        collect(measured, {}, "", 100)


def test_the_recorded_command_is_that_of_all_jobs() -> None:
    part = ["--size", "night", "--only", "a/*", "--workers", "2", "--only=b/*", "--part", "0/2", "--set", "x=1"]
    assert whole_command(part) == ["--size", "night", "--workers", "2", "--set", "x=1"]


def test_means_of_fewer_runs_than_those_of_others_are_not_shown(measured: Plan) -> None:
    """They would be means over other languages and seeds."""
    document = collect(measured, {}, "the command", 100)
    entry = next(entry for entry in document["means"] if entry["system"] == "pretrained" and entry["runs"])
    whole = next(line for line in tables(document).splitlines() if "| pretrained:" in line)
    entry["runs"] -= 1
    partial = next(line for line in tables(document).splitlines() if "| pretrained:" in line)
    assert " % " in whole and " % " not in partial and partial.count("|") == whole.count("|")


def test_tables_and_figure_show_all_systems_and_replace_only_the_results_of_the_page(
    measured: Plan, tmp_path: Path
) -> None:
    document = collect(measured, {}, "the command", 100)
    text = tables(document)
    assert "| 40.0 % (" in text and "pretrained against scratch" in text
    for system in measured.setup.systems:
        assert system in text and system in figure(document)
    widths = {block: {line.count("|") for line in block.splitlines()} for block in text.split("\n\n") if "|" in block}
    assert all(len(counts) == 1 for counts in widths.values())
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    replace_results(page, text)
    replace_results(page, text)
    content = page.read_text()
    assert content.startswith("before\n") and content.endswith("after\n") and "old" not in content
    assert content.count("the command") == 1
    with pytest.raises(UserError, match="expected the lines"):
        (tmp_path / "other.md").write_text("no markers")
        replace_results(tmp_path / "other.md", text)


# ---- Corpus ----


def make_corpus(folder: Path, changed: Mapping[str, Recording] | None = None, languages: str = "cs nl") -> Dataset:
    """20 recordings of 3 s in train and 8 in dev and in test, in every language; all texts differ."""
    words = "ana bela cid dora eva fabio gil hugo ida jan".split()
    features = FeatureSettings()
    generator = np.random.default_rng(0)
    with DatasetWriter(folder, features) as writer:
        for language in languages.split():
            for number in range(36):
                split = "train" if number < 20 else "dev" if number < 28 else "test"
                text = f"{words[number % 10]} {words[number // 10]} {words[(number * 3 + 1) % 10]}"
                recording = Recording(f"{language}-{number:02d}", text, language=language, speaker="s", split=split)
                recording = (changed or {}).get(recording.id, recording)
                writer.add(recording, generator.normal(-5, 3, (300, 80)).astype(np.float32))
        writer.finish()
    return open_dataset(folder)


def test_languages_with_labels_dev_and_test_are_found(tmp_path: Path) -> None:
    more = Recording("nl-00", None, language="nl", split="train")
    dataset = make_corpus(tmp_path / "d", {"nl-00": more})
    languages = choose_languages(dataset, (), 0.5)
    assert list(languages) == ["cs", "nl"], "most labels first"
    assert languages["nl"].train_minutes == pytest.approx(19 * 3 / 60)
    assert (languages["cs"].dev_recordings, languages["cs"].shared_speakers) == (8, 1)
    assert usable_minutes((0.5, 0.96, 2.0), languages) == (0.5,)
    assert list(choose_languages(dataset, ("nl",), 0.5)) == ["nl"]
    with pytest.raises(UserError, match="--languages de: .*0 recordings in dev"):
        choose_languages(dataset, ("de",), 0.5)
    with pytest.raises(UserError, match=r"has no language for the experiment \(cs: 1.0 minutes"):
        choose_languages(dataset, (), 5.0)


def test_a_text_of_test_in_another_split_is_refused(tmp_path: Path) -> None:
    dataset = make_corpus(tmp_path / "d", {"cs-30": Recording("cs-30", "Ana, ANA bela!", language="cs", split="test")})
    with pytest.raises(UserError, match="1 texts of test are also in train .*'ana ana bela' of 'cs-30'.*shards split"):
        check_texts(dataset, "cs")
    check_texts(dataset, "nl")


def test_a_test_recording_without_a_transcript_is_refused(tmp_path: Path) -> None:
    dataset = make_corpus(tmp_path / "d", {"nl-30": Recording("nl-30", None, language="nl", split="test")})
    with pytest.raises(UserError, match="recording 'nl-30' of test has no transcript"):
        check_texts(dataset, "nl")


def test_the_corpus_is_a_dataset_a_manifest_a_folder_or_the_default(tmp_path: Path) -> None:
    make_corpus(tmp_path / "d")
    assert preparation(str(tmp_path / "d"), (), tmp_path, False) == (None, tmp_path / "d")
    (tmp_path / "m.json").write_text("")
    job, out = preparation(str(tmp_path / "m.json"), (), tmp_path, False)
    assert job is not None and out == tmp_path / "dataset"
    assert settings_of(job.command)["manifest"] == str(tmp_path / "m.json") and "folder" in job.command
    job, _ = preparation("", (), tmp_path, False)
    assert job is not None and settings_of(job.command)["held_out_languages"] == "cs,nl"
    with pytest.raises(UserError, match="--folder nothing"):
        preparation("nothing", (), tmp_path, False)
    with pytest.raises(UserError, match="--languages de: the speech of the Debian packages"):
        preparation("", ("de",), tmp_path, False)


def test_a_packed_corpus_has_the_languages_first_no_texts_and_the_given_size(tmp_path: Path) -> None:
    dataset = make_corpus(tmp_path / "d")
    order = packing_order(dataset, ["nl"], 0)
    assert [dataset.language(i) for i in order] == ["nl"] * 20 + ["cs"] * 20
    hours = pack(dataset, ["nl"], 0.45, tmp_path / "p")
    packed = open_dataset(tmp_path / "p")
    size = sum(path.stat().st_size for path in (tmp_path / "p").iterdir())
    assert 0.2e6 < size <= 0.45e6 and packed.encoding == "uint8" and hours > 0
    assert {packed.text(i) for i in range(len(packed))} == {None} and verify(packed) == []
    assert {packed.language(i) for i in range(len(packed))} == {"nl"}
    i = packed.index.find(dataset.id(order[0]))
    difference = packed.read(i, 0, 300).astype(np.float32) - dataset.read(order[0], 0, 300).astype(np.float32)
    assert np.abs(difference).max() < 0.1, "256 steps between the extremes of a bin"
    with pytest.raises(UserError, match="exists already"):
        pack(dataset, [], 1, tmp_path / "p")


# ---- The command ----


def run_experiment(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.learning", "--tiny", *map(str, arguments)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=PATIENCE)


def test_a_tiny_experiment_runs_end_to_end_and_is_not_repeated(tmp_path: Path) -> None:
    """From the dataset over pretraining, grids, curve, beams with the n-gram of the labels to numbers and figure."""
    make_corpus(tmp_path / "d", languages="cs")
    arguments = ["--folder", tmp_path / "d", "--out", tmp_path / "out", "--seeds", 0]
    arguments += ["--systems", "scratch,pretrained", "--results", tmp_path / "published/learning.json"]
    done = run_experiment(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "out/learning.json").read_text())
    assert json.loads((tmp_path / "published/learning.json").read_text()) == document
    assert document["cer_reduction_pretrained_low"] is None, "one seed has no interval"
    assert document["cer_reduction_pretrained_seeds"] == 1
    assert {row["system"] for row in document["runs"]} == {"scratch", "pretrained"}
    for row in document["runs"]:
        assert row["processor_seconds"] > 0 and row["greedy"]["cer"] > 0 and row["ngram"]["wer"] > 0
    assert [point["steps"] for point in document["curve"]] == [0, 4, 8]
    assert set(document["choices"]) == {"scratch", "pretrained"}
    labels = (tmp_path / "out/ngram/cs-0.5min-s0.txt").read_text().splitlines()
    assert len(labels) == 10, "ten recordings of 3 s are half a minute; the n-gram has nothing else"
    assert labels == label_texts(tmp_path / "out/runs/scratch/cs-0.5min-s0")
    again = run_experiment(*arguments)
    assert again.returncode == 0 and "started" not in again.stdout
    listed = run_experiment(*arguments, "--list")
    assert "0 s left" in listed.stdout and "pretrained/cs-0.5min-s0-ngram" in listed.stdout


def test_a_pretraining_runs_alone_and_is_used_elsewhere(tmp_path: Path) -> None:
    make_corpus(tmp_path / "d", languages="cs")
    pack(open_dataset(tmp_path / "d"), [], 2.0, tmp_path / "p")
    alone = run_experiment(
        "--pretrain-only", "--folder", tmp_path / "p", "--out", tmp_path / "a", "--set", "data.rows=2"
    )
    assert alone.returncode == 0 and "processor seconds" in alone.stdout, alone.stdout + alone.stderr
    config = yaml.safe_load((tmp_path / "a/runs/bestrq/config.yaml").read_text())
    assert config["data"]["rows"] == 2
    rest = ["--folder", tmp_path / "d", "--out", tmp_path / "b", "--pretrained", tmp_path / "a/runs/bestrq/export"]
    wrong = run_experiment(*rest, "--list")
    assert wrong.returncode == 2 and "--pretrained without --pretrained-seconds" in wrong.stderr
    listed = run_experiment(*rest, "--pretrained-seconds", 60, "--list")
    assert listed.returncode == 0, listed.stderr
    chosen = run_experiment(*rest, "--pretrained-seconds", 60, "--only", "pretrained-grid/0/cs-0.5min-s0")
    assert chosen.returncode == 0, chosen.stdout + chosen.stderr
    assert (tmp_path / "b/runs/pretrained-grid/0/cs-0.5min-s0/export/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "scrach"], "--systems scrach: unknown.*Did you mean 'scratch'"),
        (["--workers", "0"], "--workers 0: give 1 or more"),
        (["--part", "2/2"], "give i/n with i from 0 to n - 1"),
        (["--minutes", "0"], "give numbers above 0"),
        (["--folder", "nowhere"], "--folder nowhere: there is no such dataset"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import re

    from experiments.learning.__main__ import main

    monkeypatch.setattr(sys, "argv", ["learning", "--tiny", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises((UserError, SystemExit)) as caught:
        main()
    assert re.search(message, str(caught.value) + capsys.readouterr().err) and not (tmp_path / "out").exists()
