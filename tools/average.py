"""Export of a training run from a checkpoint, or from the mean of its newest or its best checkpoints.

    python -m tools.average runs/base-120m-ctc --best 5 --out exports/ctc-best-5
    python -m tools.average runs/base-120m --last 3 --out exports/base-120m-last-3
    python -m tools.average runs/base-120m-rnnt/checkpoints/step-00100000 --out exports/rnnt-100000

The first argument is a run folder of pretrain.py, finetune_ctc.py or finetune_rnnt.py, or one of its checkpoints.
Without --last and --best, the newest checkpoint is exported. `evaluate.py --export` and `finetune.init` read the
result. The mean is computed in float64; counters, the quantizer and the settings are those of the newest checkpoint.

A checkpoint does not hold the dev figures of its step, so --best takes them from the run's metrics.jsonl (kind "dev"):
dev_loss of a pretraining, and dev_wer or dev_cer of a fine-tuning, according to validation.best_by. Only checkpoints
that are still on disk can be averaged: see checkpoint.keep_last.

config.json of the export has the steps, their dev figures and the choice, as `averaged`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt

from bestrq.pretraining.export import export_encoder
from bestrq.training.checkpoint import load_checkpoint
from bestrq.training.export import write_export
from bestrq.training.export_reading import Export, read_export
from bestrq.training.process import World
from common.config import from_dict, parse, run_main
from common.errors import UserError
from data.loading.augment import SupervisedSettings
from data.tokenizer import tokenizer_files
from pipelines.finetuning import TITLES, statistics_of
from pipelines.run_weights import (
    TrainingRun,
    Weights,
    choose_checkpoints,
    dev_figures,
    read_checkpoints,
    read_run,
    run_of_checkpoint,
)


@dataclass
class Config:
    """Export from checkpoints of a run."""

    run: str = ""
    """run folder, or one checkpoint of it (RUN_FOLDER/checkpoints/step-...); may be given as the first argument"""
    out: str = ""
    """folder of the export; must not exist"""
    last: NonNegativeInt = 0
    """number of newest checkpoints to average"""
    best: NonNegativeInt = 0
    """number of checkpoints with the lowest dev figure to average"""
    weights: Weights = "auto"
    """'step': weights of the steps; 'average': their moving averages (averaging.ema_decay); 'auto': those that the run
    validates and exports"""

    def __post_init__(self) -> None:
        for name in ("run", "out"):
            if not getattr(self, name):
                raise UserError(f"{name} is missing: give python -m tools.average RUN_FOLDER --out FOLDER")
        if self.last and self.best:
            raise UserError(f"last is {self.last} and best is {self.best}: give one of them")
        if self.is_checkpoint and (self.last or self.best):
            raise UserError(f"run = {self.run} is one checkpoint: give the run folder with --last or --best")

    @property
    def is_checkpoint(self) -> bool:
        """Whether `run` is a checkpoint and not a run folder."""
        return (Path(self.run) / "state.json").exists()


def average(config: Config) -> None:
    """Write the export and print its steps."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out = {out}: already exists; choose another folder")
    if config.is_checkpoint:
        run, choice = read_run(run_of_checkpoint(Path(config.run))), "one checkpoint"
        checkpoints = [Path(config.run).resolve()]
    else:
        run = read_run(config.run)
        choice = f"lowest {run.rate} in metrics.jsonl" if config.best else "newest"
        checkpoints = choose_checkpoints(run, config.best or config.last or 1, bool(config.best))
    export = read_checkpoints(run, checkpoints, config.weights)
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints]
    figures = dev_figures(run)
    averaged = {
        "run": str(run.folder.path), "steps": steps, "choice": choice, "weights": config.weights,
        "dev": [figures.get(step, {}) for step in steps],
    }  # fmt: skip
    write(run, export, averaged, out)
    print(f"{choice}: {'mean of the weights of steps' if len(steps) > 1 else 'step'} {', '.join(map(str, steps))}")
    print(f"export: {out}", flush=True)


def write(run: TrainingRun, export: Export, averaged: dict[str, Any], out: Path) -> None:
    """Write the export with the extra files of its kind and, as `averaged`, the origin of the weights.

    The dev error rates are those of the step; a mean has none, because it was not validated.
    """
    steps, config = averaged["steps"], export.config | {"averaged": averaged}
    origin = f"Mean of the weights of steps {', '.join(map(str, steps))}" if len(steps) > 1 else f"Step {steps[0]}"

    def card(title: str, command: str) -> str:
        return f"# {title}\n\n{origin} of the run `{run.folder.path}`. To use it: `python {command}`.\n"

    if run.kind == "pretrained":
        extra = load_checkpoint(export.path, None, None, World()).extra_tensors
        targets = {name: tensor for name, tensor in extra.items() if name.startswith(("quantizer.", "teacher."))}
        text = card("Conformer encoder, pretrained with BEST-RQ", "finetune_ctc.py --finetune.init THIS_FOLDER")
        export_encoder(out, export.tensors, targets, config, text)
        return
    folder = run.folder.path / "tokenizer"
    files = {name: (folder / name).read_bytes() for name in tokenizer_files(folder)}
    config |= normalisation_of_training(run)
    if len(steps) == 1 and averaged["weights"] == "auto":
        config |= averaged["dev"][0]
    text = card(TITLES[run.kind], "evaluate.py --export THIS_FOLDER --data.dataset DATASET")
    write_export(out, export.tensors, config, text, files)


def normalisation_of_training(run: TrainingRun) -> dict[str, Any]:
    """Entries `statistics` and `std_floor` of config.json: from the run's own export, else from its dataset.

    Raises UserError if neither can be read, or the dataset is not that of the training.
    """
    try:
        config = read_export(run.folder.export).config
        return {name: config[name] for name in ("statistics", "std_floor") if name in config}
    except UserError as missing:
        if run.normalisation == "recording":
            return {}
        try:
            dataset = from_dict(SupervisedSettings, run.values["data"]).open()
            starts = run.folder.starts()
            trained = starts[-1].get("fingerprints", {}).get("dataset") if starts else None
            if trained != dataset.fingerprint:
                raise UserError(
                    f"{dataset.location} has fingerprint {dataset.fingerprint}, that of the run is {trained}"
                )
        except UserError as error:
            raise UserError(
                f"data.normalisation is 'dataset', and its statistics are neither in an export of the run ({missing}) "
                f"nor in its dataset ({error}): restore one of them"
            ) from error
        return statistics_of(dataset, "dataset")


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--run")
    average(parse(Config, words, description=__doc__))


if __name__ == "__main__":
    run_main(main)
