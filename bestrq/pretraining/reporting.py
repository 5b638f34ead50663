"""Reports of pretraining: means of a log interval, codebook usage and collapse, pictures, model card."""

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from bestrq.training.meters import MetricsLog
from common.files import write_file

matplotlib.use("Agg")  # cluster nodes have no display
from matplotlib.figure import Figure

MASK_EXAMPLE = "mask_example.safetensors"
CODEBOOK_USAGE = "codebook_usage.safetensors"
MAX_PICTURE_FRAMES = 1500
# Counters of a log interval, for `interval_means`.
COUNTERS = ("loss", "correct", "targets", "masked_frames", "masked_runs", "frames", "row_frames", "quarantined")


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
    """Entropy, perplexity and usage of the targets since the start of the run; lists have one entry per codebook."""
    entropy = unigram_entropy(code_counts)
    return {
        "unigram_entropy": float(entropy.mean()),
        "perplexity": float(entropy.exp().min()),
        "codebook_perplexity": entropy.exp().tolist(),
        "codebook_usage": (code_counts > 0).double().mean(dim=1).tolist(),
        "targets_seen": int(code_counts[0].sum()),
    }


def warn_of_collapse(values: dict, codebook_size: int) -> None:
    """Print an alarm if the perplexity of a codebook is below 1 % of its size: the targets carry no information."""
    if values["targets_seen"] >= codebook_size and values["perplexity"] < codebook_size / 100:
        print(
            f"ALARM: a codebook has collapsed: perplexity {values['perplexity']:.1f} of {codebook_size} codes. Check "
            "that the features are normalised (data.normalisation) and that the audio is not silent",
            file=sys.stderr,
            flush=True,
        )


def save_pictures(
    folder: Path, metrics: MetricsLog, step: int, log_mel: Tensor, mask: Tensor, code_counts: Tensor, hop_ms: float
) -> None:
    """Show a row with its mask and the usage of the codes in TensorBoard, and store both for the report (rank 0).

    log_mel: `[F, M]`; mask: bool `[F]`; code_counts: int64 `[C, V]`.
    """
    if metrics.active:
        log_mel, mask = log_mel[:MAX_PICTURE_FRAMES], mask[:MAX_PICTURE_FRAMES]
        save_mask_example(folder, log_mel, mask)
        save_codebook_usage(folder, code_counts)
        metrics.picture(step, "mask", draw_mask(log_mel, mask, hop_ms))
        metrics.picture(step, "codebook_usage", draw_codebook_usage(code_counts.cpu()))


def save_mask_example(folder: Path, log_mel: Tensor, mask: Tensor) -> None:
    """Store a row, `[F, M]` and bool `[F]`, for the report, as float16 and uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"log_mel": log_mel.detach().cpu().half().contiguous(), "mask": mask.detach().cpu().byte().contiguous()}
    write_file(folder / MASK_EXAMPLE, save(tensors))


def save_codebook_usage(folder: Path, counts: Tensor) -> None:
    """Store the counts of every code as a target so far, int64 `[C, V]`, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CODEBOOK_USAGE, save({"counts": counts.detach().cpu().contiguous()}))


def draw_mask(log_mel: Tensor, mask: Tensor, hop_ms: float) -> np.ndarray:
    """Draw the spectrogram of a row with white masked frames, uint8 `[height, width, 3]`."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    seconds = log_mel.shape[0] * hop_ms / 1000
    axes.imshow(
        log_mel.float().cpu().T.numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, log_mel.shape[1])
    )
    time = np.arange(len(mask)) * hop_ms / 1000
    axes.fill_between(time, 0, log_mel.shape[1], where=mask.cpu().numpy(), step="post", color="white", alpha=0.65)
    axes.set(xlabel="seconds", ylabel="mel bin", title="input of the encoder: white frames are masked")
    return render(figure)


def draw_codebook_usage(counts: Tensor) -> np.ndarray:
    """Draw the share of every code, most frequent first, one line per codebook, uint8 `[height, width, 3]`."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    share = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    for codebook in share.sort(dim=1, descending=True).values:
        axes.plot(np.arange(1, len(codebook) + 1), codebook.numpy())
    axes.set(xlabel="code, most frequent first", ylabel="share of targets", xscale="log", yscale="log")
    return render(figure)


def render(figure: Figure) -> np.ndarray:
    """Pixels of a figure, uint8 `[height, width, 3]`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=100)
    width, height = (int(v) for v in figure.get_size_inches() * 100)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(height, width, 4)[..., :3]


def model_card(config: Mapping[str, Any], training: str) -> str:
    """README.md of an export with this config.json; `training` describes the rows of a step and the dataset."""
    encoder, features = config["encoder"], config["features"]
    return f"""# Conformer encoder, pretrained with BEST-RQ

{encoder["num_layers"]} layers of width {encoder["dim"]}; {config["step"]} optimizer steps of {training}.

`config.json` holds the settings of the encoder and of the features (16 kHz, {features["num_mels"]} log-mel bins,
normalised per {config["normalisation"]}). To fine-tune it: `python finetune_ctc.py --finetune.init THIS_FOLDER`.
"""
