"""Reports of pretraining: means of a log interval, codebook usage, pictures, model card; settings of the probe."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import save
from torch import Tensor

from bestrq.training.meters import MetricsLog
from common.files import write_file

CODEBOOK_USAGE = "codebook_usage.safetensors"
MAX_PICTURE_FRAMES = 1500
# Counters of a log interval, for `interval_means`.
COUNTERS = ("loss", "correct", "targets", "masked_frames", "masked_runs", "frames", "row_frames", "quarantined")


@dataclass
class ProbeSettings:
    """Probe of the frozen features during pretraining; training is the same bit for bit with and without it."""

    every_steps: NonNegativeInt = 0
    """optimizer steps between probes, whose labelled recordings are those of the dataset; 0 disables them"""
    minutes: PositiveFloat = 10.0
    """labelled audio that a probe is trained on"""
    evaluation_minutes: PositiveFloat = 4.0
    """labelled audio that it is evaluated on, with other texts: of split dev, or else a fifth of the texts"""
    steps: PositiveInt = 300
    """optimizer steps of a probe; with fewer, log-mel is still on CTC's plateau"""
    language: str = ""
    """language of the labelled recordings; empty takes all"""
    alarm_after: NonNegativeInt = 2000
    """optimizer steps of pretraining after which alarms judge the features: text, rank, slowness"""


def interval_means(totals: dict[str, float]) -> dict[str, float]:
    """Means over a log interval and all ranks. The loss is in nats per target; mask_share excludes padding."""
    targets, frames = max(totals["targets"], 1), max(totals["frames"], 1)
    return {
        "quarantined": int(totals["quarantined"]),
        "loss": totals["loss"] / targets,
        "accuracy": totals["correct"] / targets,
        "mask_share": totals["masked_frames"] / frames,
        "mask_run_frames": totals["masked_frames"] / max(totals["masked_runs"], 1),
        "row_fill": totals["frames"] / max(totals["row_frames"], 1),
    }


def count_codes(code_counts: Tensor, targets: Tensor) -> None:
    """Add targets int64 `[N, C]` to the counts int64 `[C, V]`, in place and without waiting for the device."""
    codes = targets.T
    code_counts.scatter_add_(1, codes, torch.ones_like(codes))  # bincount would read its maximum on the host


def unigram_entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of the code frequencies, `[..., V]` -> float64 `[...]`; 0 without counts.

    This is the cross-entropy of predicting each target by its frequency: a pretraining loss that is not below it shows
    that the model does not use the context.
    """
    frequency = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(frequency).sum(dim=-1)


def codebook_figures(code_counts: Tensor) -> dict[str, float | list[float]]:
    """Entropy, perplexity and usage of the targets since the start of the run; lists have one entry per codebook.

    unigram_accuracy is that of always predicting the most frequent code.
    """
    entropy = unigram_entropy(code_counts)
    return {
        "unigram_entropy": float(entropy.mean()),
        "unigram_accuracy": float((code_counts.amax(dim=1) / code_counts.sum(dim=1).clamp(min=1)).mean()),
        "perplexity": float(entropy.exp().min()),
        "codebook_perplexity": entropy.exp().tolist(),
        "codebook_usage": (code_counts > 0).double().mean(dim=1).tolist(),
        "targets_seen": int(code_counts[0].sum()),
    }


def save_pictures(
    folder: Path, metrics: MetricsLog, step: int, log_mel: Tensor, mask: Tensor, code_counts: Tensor, hop_ms: float
) -> None:
    """Show a row with its mask and the usage of the codes in TensorBoard, and store both for the report (rank 0).

    log_mel: `[F, M]`; mask: bool `[F]`; code_counts: int64 `[C, V]`.
    """
    if metrics.active:
        from bestrq.pretraining.pictures import draw_codebook_usage, draw_mask, save_mask_example  # slow: matplotlib

        log_mel, mask = log_mel[:MAX_PICTURE_FRAMES], mask[:MAX_PICTURE_FRAMES]
        save_mask_example(folder, log_mel, mask)
        save_codebook_usage(folder, code_counts)
        metrics.picture(step, "mask", draw_mask(log_mel, mask, hop_ms))
        metrics.picture(step, "codebook_usage", draw_codebook_usage(code_counts.cpu()))


def save_codebook_usage(folder: Path, counts: Tensor) -> None:
    """Store the counts of every code as a target so far, int64 `[C, V]`, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CODEBOOK_USAGE, save({"counts": counts.detach().cpu().contiguous()}))


def model_card(config: Mapping[str, Any], training: str) -> str:
    """README.md of an export with this config.json; `training` describes the rows of a step and the dataset."""
    encoder, features = config["encoder"], config["features"]
    return f"""# Conformer encoder, pretrained with BEST-RQ

{encoder["num_layers"]} layers of width {encoder["dim"]}; {config["step"]} optimizer steps of {training}.

`config.json` holds the settings of the encoder and of the features (16 kHz, {features["num_mels"]} log-mel bins,
normalised per {config["normalisation"]}). To fine-tune it: `python finetune_ctc.py --finetune.init THIS_FOLDER`.
"""
