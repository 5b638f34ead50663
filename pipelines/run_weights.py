"""Weights of a training run, from its checkpoints: of one, or the mean of several, with the settings of an export.

The description of the model comes from the files of the run folder: `config.yaml`, `tokenizer/`, and `state.json` of
the checkpoint. `tools/average.py` writes it as an export; `finetune.init` and other readers of a pretrained encoder
take a checkpoint in place of an export.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.objective import TargetSettings
from bestrq.pretraining.quantizer import QuantizerSettings
from bestrq.recognition.transducer import TransducerSettings
from bestrq.training.averaging import PREFIX, AveragingSettings, mean_of_files
from bestrq.training.checkpoint import COMPLETE, list_checkpoints, load_checkpoint, verify_checkpoint
from bestrq.training.export_reading import Export, read_export
from bestrq.training.metrics_file import read_metrics
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder
from bestrq.training.tensor_reading import group_files
from common.config import from_dict, load_yaml, to_dict
from common.errors import UserError
from common.files import as_object, hash_of_file
from common.json_checks import LARGEST
from data.features import FeatureSettings
from data.format.dataset import STD_FLOOR
from data.loading.loader import CurriculumStage
from data.tokenizer import load_tokenizer
from pipelines.recogniser import build_recogniser, check_shapes

Kind = Literal["pretrained", "ctc", "rnnt"]
Weights = Literal["auto", "step", "average"]


@dataclass
class _ModelSettings:
    """Sections of config.yaml that describe the model of a run, of any kind."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)
    targets: TargetSettings = field(default_factory=TargetSettings)
    transducer: TransducerSettings = field(default_factory=TransducerSettings)
    averaging: AveragingSettings = field(default_factory=AveragingSettings)
    curriculum: list[CurriculumStage] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingRun:
    """Run folder of pretrain.py, finetune_ctc.py or finetune_rnnt.py, and the settings of its model."""

    folder: RunFolder
    kind: Kind
    settings: _ModelSettings
    normalisation: str
    rate: str
    """name in metrics.jsonl of the dev figure by which checkpoints are compared; the lowest is the best"""
    values: dict[str, Any]
    """content of config.yaml"""

    def encoder_at(self, step: int) -> EncoderSettings:
        """Settings of the encoder after a step: a curriculum may change its positions."""
        stages = [stage for stage in self.settings.curriculum if step > stage.after_step]
        factors = [stage.rotary_interpolation for stage in stages if stage.rotary_interpolation]
        return replace(self.settings.encoder, **({"rotary_interpolation": factors[-1]} if factors else {}))


def read_run(folder: str | Path) -> TrainingRun:
    """Read the settings of a run. Raises UserError, which names the file, if they are missing or invalid."""
    run = RunFolder(folder)
    values = load_yaml(run.config)
    kind: Kind = "pretrained" if "finetune" not in values else "rnnt" if "transducer" in values else "ctc"
    sections = {name: values[name] for name in to_dict(_ModelSettings()) if name in values}
    try:
        if "encoder" not in values or (kind == "pretrained" and "quantizer" not in values):
            raise UserError("not the settings of pretrain.py, finetune_ctc.py or finetune_rnnt.py")
        settings = from_dict(_ModelSettings, sections)
        normalisation = as_object(values.get("data"), "data").get("normalisation")
        if normalisation not in ("recording", "dataset"):
            raise UserError(f"data.normalisation is {normalisation!r}, expected 'recording' or 'dataset'")
        best_by = as_object(values.get("validation", {}), "validation").get("best_by", "wer")
        if best_by not in ("wer", "cer"):
            raise UserError(f"validation.best_by is {best_by!r}, expected 'wer' or 'cer'")
    except UserError as error:
        raise UserError(f"{run.config}: {error}") from error
    rate = "dev_loss" if kind == "pretrained" else f"dev_{best_by}"
    return TrainingRun(run, kind, settings, normalisation, rate, values)


def dev_figures(run: TrainingRun) -> dict[int, dict[str, float]]:
    """Finite dev figures of metrics.jsonl, by step: of the validated weights, not of `averaging.last`."""
    rows = [row for row in read_metrics(run.folder.metrics) if row.get("kind") == "dev"]
    return {
        row["step"]: {
            name: float(value)
            for name, value in row.items()
            if name.startswith("dev_") and type(value) in (int, float) and abs(value) < LARGEST
        }
        for row in rows
    }


def choose_checkpoints(run: TrainingRun, number: int, best: bool) -> list[Path]:
    """Folders of the newest or the best complete checkpoints, ascending by step.

    The best have the lowest `run.rate` in metrics.jsonl at their step; of equal ones, the newer. Checkpoints that were
    not validated are not among them. Raises UserError if there are fewer than `number`.
    """
    complete = [(step, path) for step, path in list_checkpoints(run.folder.checkpoints) if (path / COMPLETE).exists()]
    candidates, figures = complete, dev_figures(run)
    if best:
        rates = {step: figures[step][run.rate] for step, _ in complete if run.rate in figures.get(step, {})}
        candidates = sorted((c for c in complete if c[0] in rates), key=lambda c: (-rates[c[0]], c[0]))
    if len(candidates) < number or not number:
        of_those = f", of which {len(candidates)} have a {run.rate} in metrics.jsonl" if best else ""
        raise UserError(
            f"{run.folder.path} has {len(complete)} checkpoints{of_those}, not {number}: give fewer; a run keeps those "
            "of checkpoint.keep_last"
        )
    return [path for _, path in sorted(candidates[-number:])]


def read_checkpoints(run: TrainingRun, checkpoints: Sequence[Path], weights: Weights = "auto") -> Export:
    """Export of a checkpoint of a run, or of the mean of several (`mean_of_files`), the newest one last.

    Settings and features are those of the newest checkpoint. The tensors are the whole model; an export of pretraining
    holds those of the encoder alone.

    Args:
        weights: 'step', those of the optimizer steps; 'average', the moving averages of `averaging.ema_decay`; 'auto',
            those that the run validates and exports: the averages if it has them.

    Raises:
        UserError: a file is damaged, tensors do not fit the settings or each other, or are not finite.
    """
    for path in checkpoints:
        if problem := verify_checkpoint(path):
            raise UserError(f"{path} cannot be used: {problem}; choose another checkpoint of the run")
    newest = load_checkpoint(checkpoints[-1], None, None, World())
    averaged = weights == "average" or (weights == "auto" and run.settings.averaging.ema_decay > 0)
    name, prefix = ("extra", PREFIX) if averaged else ("model", "")
    tensors = mean_of_files([group_files(path, name) for path in checkpoints], prefix)
    if not tensors:
        raise UserError(f"{newest.path} has no moving average of the weights: give --weights step")
    encoder = run.encoder_at(newest.step)
    features = _features(newest.state, newest.path / "state.json")
    config: dict[str, Any] = {
        "kind": run.kind,
        "step": newest.step,
        "encoder": to_dict(encoder),
        "features": features.to_dict(),
        "feature_hash": features.hash(),
        "normalisation": run.normalisation,
        "std_floor": STD_FLOOR,
    }
    if run.kind == "pretrained":
        config |= {"quantizer": to_dict(run.settings.quantizer), "targets": to_dict(run.settings.targets)}
    else:
        config["vocab_size"] = load_tokenizer(run.folder.path / "tokenizer").vocab_size
    transducer = run.settings.transducer if run.kind == "rnnt" else None
    if transducer:
        config["transducer"] = to_dict(transducer)
    export = Export(newest.path, tensors, config)
    settings = str(run.folder.config)
    if run.kind == "pretrained":
        part = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
        check_shapes(replace(export, tensors=part), encoder, partial(_encoder_alone, encoder), settings)
    else:
        check_shapes(export, encoder, partial(build_recogniser, encoder, transducer, config["vocab_size"]), settings)
    return export


def read_trained(folder: str | Path) -> Export:
    """Read an export, or a checkpoint (RUN_FOLDER/checkpoints/step-...) with the settings of its run.

    Raises UserError that names the missing or damaged file.
    """
    folder = Path(folder)
    if not (folder / "state.json").exists():
        return read_export(folder)
    try:
        run = read_run(run_of_checkpoint(folder))
    except UserError as error:
        raise UserError(
            f"{folder} is a checkpoint, and its settings are read from config.yaml two folders above: {error}; give a "
            "checkpoint in its run folder, or an export"
        ) from error
    return read_checkpoints(run, [folder])


def hash_of_weights(folder: str | Path) -> str:
    """SHA-256 (hex) of the weights of an export or a checkpoint: of its file, or of the hashes of several.

    Raises UserError or OSError if there are none.
    """
    hashes = [hash_of_file(path) for path in group_files(Path(folder), "model")]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def run_of_checkpoint(folder: Path) -> Path:
    """Run folder of a checkpoint."""
    return folder.resolve().parent.parent


def _features(state: Any, place: Path) -> FeatureSettings:
    try:
        return FeatureSettings.from_dict(as_object(state, "state").get("features", {}))
    except (UserError, TypeError) as error:
        raise UserError(f"{place}: {error}") from error


def _encoder_alone(settings: EncoderSettings) -> nn.Module:
    return nn.ModuleDict({"encoder": ConformerEncoder(settings)})
