"""Pictures of pretraining: a row with its mask, and the usage of the codes. Imported on rank 0 only."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from safetensors.torch import save
from torch import Tensor

from common.files import write_file

matplotlib.use("Agg")  # cluster nodes have no display
from matplotlib.figure import Figure

MASK_EXAMPLE = "mask_example.safetensors"


def save_mask_example(folder: Path, log_mel: Tensor, mask: Tensor) -> None:
    """Store a row, `[F, M]` and bool `[F]`, for the report, as float16 and uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"log_mel": log_mel.detach().cpu().half().contiguous(), "mask": mask.detach().cpu().byte().contiguous()}
    write_file(folder / MASK_EXAMPLE, save(tensors))


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
