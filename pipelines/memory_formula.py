"""Formula for the memory of training: bytes of weights, of activations in every mode, of the head.

The coefficients are those of this code under bfloat16 autocast; `python -m benchmarks.activation_memory --fit`
determines them by counting, and tests/benchmarks/test_memory_formula.py checks them. docs/memory.md explains the terms.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import torch

from bestrq.model.activation_checkpointing import MODES
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.cpu.attention import MAX_WEIGHTS
from bestrq.model.presets import PRESETS


@dataclass(frozen=True)
class Kept:
    """Bytes per frame that a block keeps for the backward pass, its output included, by factor."""

    dim: float
    """times D"""
    feedforward: float = 0.0
    """times the hidden width of the feed-forward modules"""
    heads: float = 0.0
    """times H"""
    heads_frames: float = 0.0
    """times H and the frames of the segment, if the CPU holds all attention weights of a segment at once"""
    constant: float = 0.0
    """independent of these sizes"""
    weights: float = 0.0
    """bytes per element of the weight matrices of the block, for their copy in bfloat16"""


KEPT = {
    ("cuda", "none"): Kept(dim=60, feedforward=10, heads=4, constant=56, weights=2),
    ("cuda", "selective"): Kept(dim=26, feedforward=4, heads=4),
    ("cuda", "full"): Kept(dim=4),
    ("cpu", "none"): Kept(dim=42, feedforward=10, heads_frames=4, constant=56, weights=2),
    ("cpu", "selective"): Kept(dim=22, feedforward=4),
    ("cpu", "full"): Kept(dim=2),
}
"""by device and `EncoderSettings.activation_checkpointing`"""

SUBSAMPLING = {
    ("cuda", "convolutional", 4): (3.0, 3.0, 20.0),
    ("cuda", "striding", 8): (7.5, 3.0, 40.0),
    ("cpu", "convolutional", 4): (2.5, 3.0, 20.0),
    ("cpu", "striding", 8): (7.5, 3.0, 40.0),
}
"""bytes per encoder frame, by device, kind and factor: times channels x mel bins, times D, times mel bins"""

WORKING = {"cpu": (8.0, 2.0, 0.0), "cuda": (8.0, 0.0, 6.0)}
"""gradients and copies held by the backward pass of a block: bytes per frame, times D and feed-forward width, and bytes
per element of a feed-forward matrix, for its gradient in bfloat16 and float32. From counted peaks. On CUDA the count
has at most 5 bytes per D; the fused kernels of attention sum a gradient in float32, in memory that is not counted"""

HEAD = 12.0
"""bytes per logit in the backward pass of the loss: log-softmax, its gradient and that of the logits, in float32"""

BUDGET = 72e9
"""bytes for tensors on a GPU of 80 GB: a tenth is left for CUDA, its libraries and fragmentation"""

NUM_CODES = 4 * 8192
"""logits per target of BEST-RQ: codebooks x codes, as in configs/base-120m.yaml"""

TARGET_SHARE = 1 / 3
"""maximum share of encoder frames with a target"""


@dataclass(frozen=True)
class Rows:
    """Size of a batch of rows with a single segment each."""

    rows: int
    """R"""
    frames: int
    """F, in mel frames"""


def num_parameters(settings: EncoderSettings) -> int:
    """Number of parameters of the encoder, whose blocks are all equal."""
    with torch.device("meta"):
        encoders = [ConformerEncoder(replace(settings, num_layers=number)) for number in (1, 2)]
    one, two = (sum(p.numel() for p in encoder.parameters()) for encoder in encoders)
    return one + (settings.num_layers - 1) * (two - one)


def block_weights(settings: EncoderSettings) -> int:
    """Number of elements of the weight matrices of a block: two feed-forward modules, attention, convolution."""
    dim = settings.dim
    return 4 * dim * settings.feedforward_dim + 4 * dim**2 + 3 * dim**2 + dim * settings.kernel_size


def block_bytes(settings: EncoderSettings, batch: Rows, device: str, mode: str) -> float:
    """Bytes that one block keeps for the backward pass."""
    kept, frames = KEPT[device, mode], batch.frames // settings.stride
    keeps_weights = settings.num_heads * frames**2 <= MAX_WEIGHTS
    frame_bytes = (
        kept.dim * settings.dim
        + kept.feedforward * settings.feedforward_dim
        + kept.heads * settings.num_heads
        + kept.heads_frames * settings.num_heads * frames * keeps_weights
        + kept.constant
    )
    return batch.rows * frames * frame_bytes + kept.weights * block_weights(settings)


def subsampling_bytes(settings: EncoderSettings, batch: Rows, device: str) -> float:
    """Bytes that the subsampling and its dropout keep, their output included; the same in all modes."""
    inner, dim, mels = SUBSAMPLING[device, settings.subsampling, settings.subsampling_factor]
    frame_bytes = (inner * settings.subsampling_channels + mels) * settings.num_mels + dim * settings.dim
    return batch.rows * (batch.frames // settings.stride) * frame_bytes


def dense_mask_bytes(settings: EncoderSettings, batch: Rows, mode: str) -> float:
    """Bytes of the mask of the backend 'sdpa' on CUDA: one per pair of frames, and two per layer for torch's copy.

    The copy is additive. The modes other than 'none' recompute it, for one layer at a time.
    """
    frames = batch.frames // settings.stride
    return batch.rows * frames**2 * (1.0 + 2.0 * (settings.num_layers if mode == "none" else 1))


def encoder_bytes(settings: EncoderSettings, batch: Rows, device: str, mode: str) -> float:
    """Bytes that the encoder keeps for the backward pass, without the bfloat16 weights of the subsampling."""
    blocks = settings.num_layers * block_bytes(settings, batch, device, mode)
    return blocks + subsampling_bytes(settings, batch, device)


def backward_bytes(settings: EncoderSettings, batch: Rows, device: str, mode: str) -> float:
    """Bytes that the backward pass adds: the recomputed tensors of a block, and its gradients."""
    frames = batch.rows * (batch.frames // settings.stride)
    recomputed = block_bytes(settings, batch, device, "none") - block_bytes(settings, batch, device, mode)
    dim, feedforward, matrix = WORKING[device]
    weights = min(MAX_WEIGHTS, settings.num_heads * (batch.frames // settings.stride) ** 2) if device == "cpu" else 0
    gradients = frames * (dim * settings.dim + feedforward * settings.feedforward_dim)
    return recomputed + gradients + matrix * settings.dim * settings.feedforward_dim + 6.0 * weights


def weight_bytes(settings: EncoderSettings, shards: int, num_codes: int = NUM_CODES) -> float:
    """Bytes of float32 weights, gradients and AdamW's two moments, head included, and of gathered weights with FSDP.

    FSDP gathers two blocks in bfloat16 (one is prefetched) and the gradients of one, in bfloat16 and float32, and
    subsampling and head in float32, with their gradients. The latter also keep a bfloat16 copy, with and without FSDP.
    """
    blocks = settings.num_layers * block_weights(settings)
    rest = num_parameters(settings) - blocks + settings.dim * num_codes
    if shards == 1:
        return 16.0 * blocks + 18.0 * rest
    return 16.0 * (blocks + rest) / shards + 10.0 * blocks / settings.num_layers + 14.0 * rest


def activation_bytes(
    settings: EncoderSettings,
    batch: Rows,
    mode: str,
    shards: int = 1,
    dense: bool = False,
    head_logits: float = TARGET_SHARE * NUM_CODES,
) -> float:
    """Peak of training on one GPU without `weight_bytes`: at the loss, or in the backward pass of a block.

    Args:
        dense: attention by the backend 'sdpa' with a mask of all pairs of frames, instead of flex or a window.
        head_logits: logits per encoder frame: of BEST-RQ, the share of frames with a target times codes; of CTC, the
            vocabulary.
    """
    kept = encoder_bytes(settings, batch, "cuda", mode)
    if mode == "none" and shards > 1:  # weights are gathered in bfloat16 and freed: no copy is kept
        kept -= settings.num_layers * KEPT["cuda", "none"].weights * block_weights(settings)
    head = HEAD * head_logits * batch.rows * (batch.frames // settings.stride)
    mask = dense_mask_bytes(settings, batch, mode) if dense else 0.0
    return kept + mask + max(head, backward_bytes(settings, batch, "cuda", mode))


def rows_that_fit(settings: EncoderSettings, frames: int, mode: str, shards: int = 1, dense: bool = False) -> int:
    """Number of rows of `frames` mel frames that fit on a GPU of 80 GB; at most 9,999."""
    available = BUDGET - weight_bytes(settings, shards)

    def needed(rows: int) -> float:
        return activation_bytes(settings, Rows(rows, frames), mode, shards, dense)

    return bisect.bisect_right(range(1, 10_000), available, key=needed)


def table(preset: str, dense: bool = False) -> str:
    """Markdown table of the rows that fit on a GPU, by length, on one GPU and on 8 under FSDP2, in every mode."""
    settings = PRESETS[preset]
    columns = [(shards, mode) for shards in (1, 8) for mode in MODES]
    heads = [f"{'1 GPU' if shards == 1 else 'FSDP, 8'}: {mode}" for shards, mode in columns]
    lines = [f"| Row | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for seconds in (15, 30, 60, 300, 3600):
        frames = seconds * 100 // settings.row_multiple * settings.row_multiple
        cells = [f"{rows_that_fit(settings, frames, mode, shards, dense):,}" for shards, mode in columns]
        lines.append(f"| {seconds:,} s | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> str:
    """Tables of docs/memory.md."""
    parts = [
        f"`{preset}`, {'`sdpa`: a dense mask' if dense else '`flex`, or a window'}:\n\n{table(preset, dense)}\n"
        for preset in ("base-120m", "large-600m")
        for dense in (False, True)
    ]
    return "\n".join(parts)
