"""Jobs of the experiment on pretraining, from the table of stages.

A cell is a language, an amount of labels and a seed. Jobs are listed in the order in which results matter: first all
systems with the main amount of labels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_json
from common.json_checks import read_number
from experiments.jobs import Job, Records
from experiments.learning.choices import (
    arguments,
    cer_of_results,
    choose,
    dev_cer_of_export,
    mean,
    script,
    write_overlay,
)
from experiments.learning.setup import Cell, Setup
from experiments.learning.stages import (
    BY_NAME,
    PRETRAINED,
    PRETRAINING,
    SCRATCH,
    FineTuning,
    Pretraining,
    PseudoLabels,
    Settings,
    Speech,
    fine_tuning,
)

CHECKPOINTS = 8
"""checkpoints of the pretraining, at equal distances"""
KEPT_CHECKPOINTS = 4 * CHECKPOINTS
"""checkpoints kept: the curve needs the first ones, and every stop adds one, as do steps that 8 does not divide"""
SYNTHETIC_LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "cs")
"""languages of `data.prepare synthetic`"""
TEXT_ORDER = 5
"""order of the character n-gram"""


class Plan:
    """Jobs by name, in an order in which every job comes after those that it needs."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.size, self.folder = setup, setup.size, setup.folder
        self.jobs: dict[str, Job] = {}
        self.records = Records(setup.folder)
        self.choices: dict[str, Callable[[], None]] = {}

    # ---- Names of jobs and paths ----

    def run(self, name: str) -> Path:
        """Run folder of a job."""
        return self.folder / "runs" / name

    def results(self, system: str, cell: Cell, decoding: str) -> Path:
        return self.folder / "results" / system / str(cell) / decoding

    def choice_file(self, name: str) -> Path:
        return self.folder / "choices" / f"{name}.yaml"

    # ---- Jobs of the stages ----

    def pretraining(self, stage: Pretraining, cell: Cell | None) -> str:
        """Name of the pretraining job; the same for all cells without a teacher."""
        name = f"{stage.name}/{cell}" if stage.teacher else stage.name
        if name in self.jobs:
            return name
        if stage.name == PRETRAINING and self.setup.pretrained:
            return self._add_pretrained(name, self.setup.pretrained)
        needs: list[str] = []
        values: dict[str, Any] = {}
        if stage.teacher:
            assert cell is not None
            teacher = self.fine_tuned(fine_tuning(stage.teacher), cell)
            needs.append(teacher)
            values = {"targets.source": "teacher", "targets.export": self.run(teacher) / "export"}
        steps = max(1, round(stage.steps * self.size.pretraining_steps))
        values |= {"run.folder": self.run(name), "run.steps": steps, "data.dataset": self.setup.dataset}
        values |= {"checkpoint.every_steps": max(1, steps // CHECKPOINTS), "checkpoint.keep_last": KEPT_CHECKPOINTS}
        values |= {**stage.settings, **self.size.settings, **self.setup.settings}
        command = script("pretrain.py", "configs/learning-pretrain.yaml", [], values)
        share = 1 if stage.teacher else len(self.setup.languages)
        return self._train(name, command, needs, "pretrain", steps, 0.4, share)

    def initial(self, stage_name: str, cell: Cell) -> tuple[str, Path]:
        """Job and folder of the encoder of a stage."""
        stage = BY_NAME[stage_name]
        if isinstance(stage, Pretraining):
            name = self.pretraining(stage, cell)
        else:
            name = self.fine_tuned(fine_tuning(stage_name), cell)
        return name, self.jobs[name].output.parent

    def fine_tuned(
        self, stage: FineTuning, cell: Cell, candidate: int | None = None, checkpoint: int | None = None
    ) -> str:
        """Name of a fine-tuning job.

        Args:
            candidate: number in the grid, for a trial; None takes the choice.
            checkpoint: pretraining step to start from; None takes the export.
        """
        name = f"{stage.name}/{cell}"
        if candidate is not None:
            name = f"{stage.name}-grid/{candidate}/{cell}"
        elif checkpoint is not None:
            name = f"{stage.name}-curve/{checkpoint}/{cell}"
        elif stage.speech:
            name = stage.name
        if name in self.jobs:
            return name
        needs: list[str] = []
        configs: list[Path] = []
        steps = max(1, round(stage.steps * self.size.finetuning_steps))
        values: dict[str, Any] = {"run.folder": self.run(name), "run.steps": steps}
        values |= {**stage.settings, **self.size.settings}
        if stage.speech:
            speech = self.speech()
            needs.append(speech)
            values |= {"data.dataset": self.run(speech)}
        else:
            values |= {"data.dataset": self.setup.dataset, "data.seed": cell.seed, "run.seed": cell.seed}
            values |= {"finetune.language": cell.language, "finetune.label_minutes": cell.minutes}
        if stage.init:
            init_job, init = self.initial(stage.init, cell)
            needs.append(init_job)
            if checkpoint is not None:
                init = self.run(init_job) / "checkpoints" / f"step-{checkpoint:08d}"
            values |= {"finetune.init": init}
        if stage.pseudo:
            pseudo = self.pseudo_labels(stage.pseudo, cell)
            needs.append(pseudo)
            true = {"dataset": str(values.pop("data.dataset")), "weight": stage.label_share}
            guessed = {"dataset": str(self.run(pseudo)), "weight": 1 - stage.label_share, "pseudo_labels": True}
            values |= {"data.mixture": [true, guessed]}
        if candidate is not None:
            values |= stage.grid[candidate]
        else:
            choice, fixed = self.choice(fine_tuning(stage.tuned_as or stage.name))
            values |= fixed
            if choice:
                needs.append(choice)
                configs.append(self.choice_file(choice))
        size = float(steps)
        if stage.equal_cost:
            budget = self.budget()
            needs.append(budget)
            configs.append(self.choice_file(budget))
            del values["run.steps"]
            size *= self._steps_factor(self.choice_file(budget))
        if not stage.init:  # of a grid of pretrained systems
            values = {key: value for key, value in values.items() if key != "finetune.reinitialise_top_blocks"}
        command = script("finetune_ctc.py", "configs/learning-ctc.yaml", configs, values)
        share = len(self.setup.languages) if stage.speech else 1
        return self._train(name, command, needs, "finetune", size, 0.2, share)

    def pseudo_labels(self, stage_name: str, cell: Cell) -> str:
        stage = BY_NAME[stage_name]
        assert isinstance(stage, PseudoLabels)
        name = f"{stage.name}/{cell}"
        if name not in self.jobs:
            teacher = self.fine_tuned(fine_tuning(stage.teacher), cell)
            values = {
                "export": self.run(teacher) / "export",
                "data.dataset": self.setup.dataset,
                "data.language": cell.language,
                "labels.minutes": cell.minutes,
                "labels.seed": cell.seed,
                "out": self.run(name),
                **stage.settings,
            }
            command = (sys.executable, "-m", "tools.pseudo_label", *arguments(values))
            output = self.run(name) / "dataset.json"
            self._add(Job(name, command, output, (teacher,), kind="pseudo-label", guess=60.0))
        return name

    def speech(self) -> str:
        """Name of the job that synthesises speech. Languages that espeak lacks are left out; without any left, all."""
        stage = next(stage for stage in BY_NAME.values() if isinstance(stage, Speech))
        if stage.name not in self.jobs:
            known = [language for language in self.setup.languages if language in SYNTHETIC_LANGUAGES]
            values = {"languages": ",".join(known or SYNTHETIC_LANGUAGES), "train_hours": self.size.synthetic_hours}
            values |= {"test_utterances": 4, "test_long_recordings": 0, "out": self.run(stage.name)}
            command = (sys.executable, "-m", "data.prepare", "synthetic", *arguments(values))
            output = self.run(stage.name) / "dataset.json"
            share = len(self.setup.languages)
            self._add(Job(stage.name, command, output, kind="speech", guess=300.0, share=share))
        return stage.name

    # ---- Choices on dev ----

    def choice(self, stage: FineTuning) -> tuple[str, Settings]:
        """Job that chooses among the candidates of a grid, or "" and the settings that need no trial."""
        candidates = stage.grid[: self.size.candidates]
        if len(candidates) < 2:
            return "", dict(candidates[0]) if candidates else {}
        name = f"choice-{stage.name}"
        if name not in self.jobs:
            runs = [
                [self.fine_tuned(stage, cell, k) for cell in self.setup.trial_cells] for k in range(len(candidates))
            ]
            rates = [[self.run(run) / "export/config.json" for run in trials] for trials in runs]
            action = partial(choose, candidates, rates, dev_cer_of_export, self.choice_file(name))
            self._decide(name, [run for trials in runs for run in trials], candidates, action)
        return name, {}

    def beam(self, system: str) -> tuple[str, Settings]:
        """Job that chooses the settings of the beam search of a system, or "" and the settings without a trial."""
        candidates = self.size.language_models
        if len(candidates) < 2:
            return "", candidates[0]
        name = f"choice-beam-{system}"
        if name not in self.jobs:
            jobs = [
                [self._evaluation(system, cell, f"dev-beam-{k}", "dev", candidate) for cell in self.setup.trial_cells]
                for k, candidate in enumerate(candidates)
            ]
            rates = [[self.jobs[job].output for job in trials] for trials in jobs]
            action = partial(choose, candidates, rates, cer_of_results, self.choice_file(name))
            self._decide(name, [job for trials in jobs for job in trials], candidates, action)
        return name, {}

    def budget(self) -> str:
        """Job that computes the steps of scratch at the cost of the best unlabelled system, by dev CER."""
        name = "choice-equal-cost"
        if name not in self.jobs:
            cells = self.setup.cells(self.setup.main_minutes)
            systems = [system for system in self.setup.systems if fine_tuning(system).role == "unlabelled"]
            runs = {system: [self.fine_tuned(fine_tuning(system), cell) for cell in cells] for system in systems}
            scratch = [self.fine_tuned(fine_tuning(SCRATCH), cell) for cell in cells]
            out = self.choice_file(name)
            needs = [*scratch, *(run for names in runs.values() for run in names)]
            description: list[Settings] = [{"systems": systems, "longest": self.size.longest}]
            self._decide(name, needs, description, partial(self._write_budget, scratch, runs, out))
        return name

    def _write_budget(self, scratch: Sequence[str], runs: Mapping[str, Sequence[str]], out: Path) -> None:
        """Write the steps with which scratch takes the mean processor time of the best unlabelled system."""
        dev = {
            system: mean(dev_cer_of_export(self.run(name) / "export/config.json") for name in names)
            for system, names in runs.items()
        }
        best = min(dev, key=lambda system: dev[system])
        seconds = mean(self.records.cost(self.jobs[name], self.jobs) for name in runs[best])
        own = mean(self.records.processor_seconds(self.jobs[name]) for name in scratch)
        factor = max(1.0, min(seconds / own, self.size.longest))
        steps = round(factor * self.size.finetuning_steps)
        document = {"system": best, "seconds": seconds, "scratch_seconds": own, "factor": factor, "steps": steps}
        write_json(
            out.with_suffix(".json"), {**document, "is_limited": seconds / own > self.size.longest, "dev_cer": dev}
        )
        write_overlay(out, {"run.steps": steps})

    # ---- Evaluation ----

    def evaluation(self, system: str, cell: Cell, with_language_model: bool) -> str:
        """Name of the only evaluation of a system on test, greedy or with the n-gram."""
        if not with_language_model:
            return self._evaluation(system, cell, "greedy", "test", {})
        choice, beam = self.beam(system)
        return self._evaluation(system, cell, "ngram", "test", beam, choice)

    def _evaluation(self, system: str, cell: Cell, decoding: str, split: str, beam: Settings, choice: str = "") -> str:
        name = f"{system}/{cell}-{decoding}"
        if name in self.jobs:
            return name
        run = self.fine_tuned(fine_tuning(system), cell)
        needs, configs = [run], []
        values: dict[str, Any] = {"export": self.run(run) / "export", "data.dataset": self.setup.dataset}
        values |= {"data.split": split, "data.language": cell.language, "name": system}
        out = self.results(system, cell, decoding)
        values |= {"inference.context_seconds": 20, "device": "cpu", "out": out, **beam}
        if beam or choice:
            model = self.language_model(cell)
            needs.append(model)
            values |= {"decoder.language_model": self.jobs[model].output}
        if choice:
            needs.append(choice)
            configs.append(self.choice_file(choice))
        command = script("evaluate.py", "", configs, values)
        output = out / "results.json"
        kind, guess = ("decode", 15.0) if decoding == "greedy" else ("beam", 60.0)
        self._add(Job(name, command, output, tuple(needs), kind=kind, guess=guess, counted=False))
        return name

    def language_model(self, cell: Cell) -> str:
        """Name of the job that trains the character n-gram of the labels of a cell, and of nothing else."""
        run = self.fine_tuned(fine_tuning(SCRATCH), cell)
        texts, name = f"ngram/{cell}-texts", f"ngram/{cell}"
        if name not in self.jobs:
            out = self.folder / "ngram" / f"{cell}.txt"
            module = "experiments.learning.label_texts"
            command = (sys.executable, "-m", module, *arguments({"run": self.run(run), "out": out}))
            self._add(Job(texts, command, out, (run,), kind="texts", counted=False))
            values = {"export": self.run(run) / "export", "texts": out, "data.language": cell.language}
            values |= {"order": TEXT_ORDER, "out": out.with_suffix(".arpa")}
            command = (sys.executable, "-m", "tools.train_ngram", *arguments(values))
            self._add(Job(name, command, out.with_suffix(".arpa"), (texts,), kind="ngram", counted=False))
        return name

    # ---- Helpers ----

    def _add_pretrained(self, name: str, export: Path) -> str:
        """Given export in place of the shared pretraining."""
        output, seconds = export / "model.safetensors", self.setup.pretrained_seconds
        description, share = ("given", str(output), str(seconds)), len(self.setup.languages)
        self._add(Job(name, description, output, action=partial(output.stat), known_seconds=seconds, share=share))
        return name

    def _steps_factor(self, choice: Path) -> float:
        """Factor of the fine-tuning steps for equal cost; a guess until it is known."""
        try:
            return read_number(choice.with_suffix(".json"), "factor")
        except UserError:
            return min(4.0, self.size.longest)

    def _train(
        self,
        name: str,
        command: tuple[str, ...],
        needs: Iterable[str],
        kind: str,
        size: float,
        guess: float,
        share: int,
    ) -> str:
        output = self.run(name) / "export/model.safetensors"
        self._add(Job(name, command, output, tuple(needs), None, self.run(name), kind, size, guess, share=share))
        return name

    def _decide(self, name: str, needs: Sequence[str], values: Sequence[Settings], action: Callable[[], None]) -> None:
        description = ("choose", json.dumps([dict(value) for value in values]), *needs)
        self._add(Job(name, description, self.choice_file(name), tuple(needs), action, counted=False))

    def _add(self, job: Job) -> None:
        self.jobs[job.name] = job


def make_plan(setup: Setup) -> Plan:
    """All jobs: the main amount of labels first, then the curve over pretraining, then the other amounts."""
    plan = Plan(setup)
    plan.pretraining(pretraining_stage(), None)
    main = setup.main_minutes
    for minutes in sorted(setup.minutes, key=lambda minutes: minutes != main):
        for cell in setup.cells(minutes):
            for system in setup.systems:
                plan.evaluation(system, cell, with_language_model=False)
        if minutes == main:
            for cell in setup.cells(minutes) if setup.size.language_models else []:
                for system in setup.systems:
                    plan.evaluation(system, cell, with_language_model=True)
            curve_jobs(plan)
    return plan


def pretraining_stage() -> Pretraining:
    stage = BY_NAME[PRETRAINING]
    assert isinstance(stage, Pretraining)
    return stage


def curve_jobs(plan: Plan) -> dict[int, list[str]]:
    """Fine-tunings of intermediate checkpoints of the pretraining, by step; only their dev CER is used."""
    setup = plan.setup
    if setup.pretrained or PRETRAINED not in setup.systems:
        return {}
    every = max(1, setup.size.pretraining_steps // CHECKPOINTS)
    steps = [round(share * CHECKPOINTS) * every for share in setup.size.curve]
    stage = fine_tuning(PRETRAINED)
    return {step: [plan.fine_tuned(stage, cell, checkpoint=step) for cell in setup.trial_cells] for step in steps}
