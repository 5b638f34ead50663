"""Reports of pretraining: means of a log interval, codebook usage; settings of the probe."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import save
from torch import Tensor

from common.files import write_file

CODEBOOK_USAGE = "codebook_usage.safetensors"
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
    """Means over a log interval and all ranks. The loss is in nats per target; mask_share excludes padding.

    Further totals, such as the losses of `MultiTarget`, are means per target too.
    """
    targets, frames = max(totals["targets"], 1), max(totals["frames"], 1)
    return {
        "quarantined": int(totals["quarantined"]),
        "loss": totals["loss"] / targets,
        "accuracy": totals["correct"] / targets,
        "mask_share": totals["masked_frames"] / frames,
        "mask_run_frames": totals["masked_frames"] / max(totals["masked_runs"], 1),
        "row_fill": totals["frames"] / max(totals["row_frames"], 1),
        **{name: total / targets for name, total in totals.items() if name not in COUNTERS},
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
    """Entropy, perplexity and usage of the targets since they last changed; lists have one entry per codebook.

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


def save_codebook_usage(folder: Path, counts: Tensor) -> None:
    """Store the counts of every code as a target so far, int64 `[C, V]`, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CODEBOOK_USAGE, save({"counts": counts.detach().cpu().contiguous()}))
