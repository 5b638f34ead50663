"""Error rates of several configurations on the same recordings: contexts, overlaps, modes, decoders and exports.

    python -m tools.sweep --export runs/ctc/export --data.dataset datasets/calls --out results/sweep \\
        --grid.contexts '[5, 20, 80, 0]' --grid.modes '[buffered, averaged]'
    torchrun --nproc-per-node 8 -m tools.sweep --export runs/a/export --grid.exports '[runs/b/export]' \\
        --data.dataset datasets/calls --out results/sweep

Evaluates each combination of the listed values like evaluate.py, each in its own subfolder of --out. All other settings
are those of evaluate.py. Equivalent combinations, such as whole recordings with different overlaps, are evaluated once.
After Ctrl-C the same command continues, and a larger sweep reuses all finished evaluations in --out.

When all evaluations are finished, writes into --out: report.html, with all configurations side by side; report.json,
with the numbers; and, for two or more contexts, curve.svg, the error rate against the context. Appends a row per
evaluation to rows.jsonl in the parent folder of --out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeFloat

from bestrq.long_form.decoders import DecoderSettings
from bestrq.long_form.inference import Mode
from bestrq.model.conformer import EncoderSettings
from bestrq.report.reports import write_comparison
from bestrq.report.result_files import REPORT
from bestrq.report.text import comparison_table
from bestrq.training.export_reading import Export
from bestrq.training.process import World
from common.config import from_dict, parse, run_main
from common.errors import UserError
from data.format.dataset import Dataset
from pipelines import evaluation_settings
from pipelines.evaluation import (
    References,
    check_evaluations,
    is_finished,
    open_export,
    read_references,
    run_evaluation,
)
from pipelines.evaluation_settings import Evaluation, evaluation_of, run_name
from pipelines.recogniser import start_inference

GridMode = Literal[Mode, "windowed"]


@dataclass
class GridSettings:
    """Lists of values; each combination is evaluated. An empty list means the single value of evaluate.py's field."""

    exports: list[str] = field(default_factory=list)
    """further exports, such as those of models trained with other contexts"""
    contexts: list[NonNegativeFloat] = field(default_factory=list)
    """values of inference.context_seconds; 0 for whole recordings"""
    overlaps: list[float] = field(default_factory=list)
    """values of inference.overlap"""
    modes: list[GridMode] = field(default_factory=list)
    """values of inference.mode; also 'windowed': one pass with windowed attention as wide as the context (encoder.mask
    window)"""
    decoders: list[DecoderSettings] = field(default_factory=list)
    """values of decoder, such as '[{beam: 1}, {beam: 8, language_model: lm.arpa}]'"""
    part: str = ""
    """'i/n' with i from 0 runs every n-th evaluation from the i-th on, for job arrays; the part that finishes last
    writes the report of all"""

    def __post_init__(self) -> None:
        if self.part and not (re.fullmatch(r"\d+/\d+", self.part) and self._index() < self._num_parts()):
            raise UserError(f"grid.part = {self.part!r}: give i/n, i from 0 to n - 1, such as 0/4")

    def _index(self) -> int:
        return int(self.part.split("/")[0])

    def _num_parts(self) -> int:
        return int(self.part.split("/")[1])

    def select_part(self, evaluations: Sequence[Evaluation]) -> Sequence[Evaluation]:
        """Evaluations of this part."""
        return evaluations[self._index() :: self._num_parts()] if self.part else evaluations


@dataclass
class Config(evaluation_settings.Config):
    """Evaluation of several configurations on whole recordings."""

    grid: GridSettings = field(default_factory=GridSettings)
    """lists of values to combine"""

    def __post_init__(self) -> None:
        super().__post_init__()
        grid = self.grid
        if not any((grid.exports, grid.contexts, grid.overlaps, grid.modes, grid.decoders)):
            raise UserError("grid is empty: give grid.contexts or another list, or run evaluate.py")

    @property
    def exports(self) -> list[str]:
        """Folders of all exports, each once."""
        return list({Path(path).resolve(): path for path in [self.export, *self.grid.exports]}.values())


def sweep(config: Config, world: World) -> None:
    """Evaluate all configurations and write the report. All processes call it."""
    # Errors in the settings and files are raised here, before any work.
    references = read_references(config)
    evaluations = prepare_evaluations(config, references.dataset, world)

    part = config.grid.select_part(evaluations)
    for number, evaluation in enumerate(part, 1):
        if world.is_main:
            print(f"\n== {number} of {len(part)}: {evaluation.name}, {evaluation.label}", flush=True)
        run_evaluation(evaluation, references, config, world)
    if world.is_main:
        report(evaluations, references, config)
    world.barrier()


def prepare_evaluations(config: Config, dataset: Dataset, world: World) -> list[Evaluation]:
    """All evaluations with their keys and folders. Raises UserError for settings that do not fit an export."""
    evaluations: list[Evaluation] = []
    for path in config.exports:
        export, recogniser = open_export(path, dataset)
        configurations = evaluations_of(config, export, dataset.features.frames_per_second)
        evaluations += check_evaluations(configurations, export, recogniser, config, dataset, world)
    evaluations = in_folders(evaluations)
    # Only rank 0 lists --out: on a network file system, other ranks may get an outdated list.
    placed = in_earlier_folders(evaluations, Path(config.out)) if world.is_main else evaluations
    folders = world.broadcast([evaluation.folder for evaluation in placed])
    return [replace(e, folder=folder) for e, folder in zip(evaluations, folders, strict=True)]


def evaluations_of(config: Config, export: Export, frames_per_second: float) -> list[Evaluation]:
    """Distinct evaluations of an export, without keys and folders.

    Raises UserError for a change that the encoder does not allow, or a context shorter than one encoder frame.
    """
    grid = config.grid
    trained = from_dict(EncoderSettings, export.config["encoder"])
    rate = frames_per_second / trained.subsampling_factor  # of the first stage, in whose frames a window is given
    name = f"{config.name} {run_name(export.path)}" if config.name and len(config.exports) > 1 else config.name
    evaluations: dict[Evaluation, None] = {}
    for mode, context, overlap, decoder in product(
        grid.modes or [config.inference.mode],
        grid.contexts or [config.inference.context_seconds],
        grid.overlaps or [config.inference.overlap],
        grid.decoders or [config.decoder],
    ):
        encoder = config.encoder
        if mode == "windowed" and context > 0:
            encoder = replace(encoder, mask="window", window=max(1, round(context * rate / 2)))
        inference = replace(
            config.inference,
            mode="whole" if mode == "windowed" else mode,
            context_seconds=float(context),
            overlap=float(overlap),
        )
        settings = replace(config, name=name, inference=inference, encoder=encoder, decoder=decoder)
        evaluation = evaluation_of(settings, export, frames_per_second)
        if mode == "windowed":
            evaluation = replace(evaluation, context_seconds=float(context))
        evaluations[evaluation] = None
    return list(evaluations)


def in_folders(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations with distinct system names and folders.

    A folder is named by run, label and key, so an evaluation has the same folder in every sweep.
    """
    names = distinct_names(dict.fromkeys((e.name, e.export) for e in evaluations))
    placed = []
    for evaluation in evaluations:
        label = re.sub(r"[^\w.-]+", "-", f"{run_name(evaluation.export)}-{evaluation.label}").strip("-.")[:150]
        name = names[evaluation.name, evaluation.export]
        placed.append(replace(evaluation, name=name, folder=f"{label}-{evaluation.key[:8]}"))
    return placed


def in_earlier_folders(evaluations: Sequence[Evaluation], out: Path) -> list[Evaluation]:
    """Evaluations with their existing folders in `out`, even if a folder has another name.

    A folder name starts with the run's name, which changes if the export is moved, and ends with the key, which does
    not.
    """
    placed, taken = [], {evaluation.folder for evaluation in evaluations}
    for evaluation in evaluations:
        pattern = f"*-{evaluation.key[:8]}"
        earlier = [] if (out / evaluation.folder).is_dir() else sorted(path.name for path in out.glob(pattern))
        free = [name for name in earlier if name not in taken]
        placed.append(replace(evaluation, folder=free[0]) if free else evaluation)
        taken.add(placed[-1].folder)
    return placed


def distinct_names(systems: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Distinct names of systems (name, export); equal names are replaced by the last parts of the run folder's path."""
    systems = list(systems)
    names = {}
    for name, export in systems:
        others = [Path(path).resolve().parent.parts for other, path in systems if other == name and path != export]
        parts = Path(export).resolve().parent.parts
        length = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        names[name, export] = name if not others else "-".join(parts[-max(length, 2) :])
    return names


def report(evaluations: Sequence[Evaluation], references: References, config: Config) -> None:
    """Write the report of all evaluations if all are finished."""
    out = Path(config.out)
    num_finished = sum(is_finished(out / e.folder, e.key) for e in evaluations)
    if num_finished < len(evaluations):
        print(f"\n{num_finished} of {len(evaluations)} evaluations are finished; the last part writes the report")
        return
    names = Counter(evaluation.name for evaluation in evaluations)
    labels = [e.label if len(names) == 1 else f"{e.name}, {e.label}" for e in evaluations]
    # Labels can be equal, such as those of two language models with the same file name.
    systems = {
        label if labels.count(label) == 1 else f"{label} ({e.key[:6]})": out / e.folder
        for label, e in zip(labels, evaluations, strict=True)
    }
    numbers = write_comparison(out, systems, references.audio, config.resamples)
    print(f"\n{comparison_table(numbers)}\nall {len(evaluations)} evaluations: {out / REPORT}")


def main() -> None:
    config = parse(Config, description=__doc__)
    world = start_inference(config.device, config.threads, config.inference)
    sweep(config, world)
    world.close()


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
