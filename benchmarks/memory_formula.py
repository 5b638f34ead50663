"""What training keeps in memory, as a formula: bytes of weights, of activations in every mode, of the head.

The coefficients are those of this code under bfloat16 autocast; `python -m benchmarks.activation_memory --fit` finds
them by counting, and tests/benchmarks/test_memory_formula.py checks that they are still right. docs/memory.md explains
the terms.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import torch

from bestrq.model.conformer import MODES, ConformerEncoder, EncoderSettings
from bestrq.model.cpu.attention import MAX_WEIGHTS
from bestrq.model.presets import PRESETS


@dataclass(frozen=True)
class Kept:
    """What a block keeps for the backward pass, its output included: bytes a frame, times what they are for."""

    dim: float
    """times D"""
    feedforward: float = 0.0
    """times the hidden width of the feed-forward modules"""
    heads: float = 0.0
    """times H"""
    heads_frames: float = 0.0
    """times H and the frames of the segment, where the CPU holds all attention weights of a segment at once"""
    constant: float = 0.0
    """times 1"""
    weights: float = 0.0
    """bytes of every weight matrix of the block, once: its copy in bfloat16"""


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
"""bytes an encoder frame times channels x mel bins, times D, and times mel bins, by device, kind and factor"""

WORKING = {"cpu": (8.0, 2.0), "cuda": (16.0, 4.0)}
"""gradients and copies that a block's backward pass holds at a time: bytes a frame, times D and feed-forward width.
From the peaks counted on the CPU; an imagined GPU has no backward pass, and gets twice as much, for float32 in norms"""

HEAD = 10.0
"""bytes a logit at the loss: float32 logits, their log-softmax and its bfloat16 gradient"""

BUDGET = 72e9
"""bytes of a GPU of 80 GB that tensors may take: a tenth is left to CUDA, its libraries and fragmentation"""

NUM_CODES = 4 * 8192
"""logits a target of BEST-RQ: codebooks x codes, as in configs/base-120m.yaml"""

TARGET_SHARE = 1 / 3
"""encoder frames with a target, at most"""


@dataclass(frozen=True)
class Rows:
    """A batch: so many rows of a single segment each."""

    rows: int
    """R"""
    frames: int
    """F, in mel frames"""


def num_parameters(settings: EncoderSettings) -> int:
    """Parameters of the encoder, all of whose blocks are alike."""
    with torch.device("meta"):
        encoders = [ConformerEncoder(replace(settings, num_layers=number)) for number in (1, 2)]
    one, two = (sum(p.numel() for p in encoder.parameters()) for encoder in encoders)
    return one + (settings.num_layers - 1) * (two - one)


def block_weights(settings: EncoderSettings) -> int:
    """Elements of a block's weight matrices: feed-forward twice, attention, convolution."""
    dim = settings.dim
    return 4 * dim * settings.feedforward_dim + 4 * dim**2 + 3 * dim**2 + dim * settings.kernel_size


def block_bytes(settings: EncoderSettings, batch: Rows, device: str, mode: str) -> float:
    """What one block keeps for the backward pass."""
    kept, frames = KEPT[device, mode], batch.frames // settings.stride
    at_once = settings.num_heads * frames**2 <= MAX_WEIGHTS
    a_frame = (
        kept.dim * settings.dim
        + kept.feedforward * settings.feedforward_dim
        + kept.heads * settings.num_heads
        + kept.heads_frames * settings.num_heads * frames * at_once
        + kept.constant
    )
    return batch.rows * frames * a_frame + kept.weights * block_weights(settings)


def subsampling_bytes(settings: EncoderSettings, batch: Rows, device: str) -> float:
    """What the subsampling and the dropout behind it keep, its output included; no mode changes it."""
    inner, dim, mels = SUBSAMPLING[device, settings.subsampling, settings.subsampling_factor]
    a_frame = (inner * settings.subsampling_channels + mels) * settings.num_mels + dim * settings.dim
    return batch.rows * (batch.frames // settings.stride) * a_frame


def dense_mask_bytes(settings: EncoderSettings, batch: Rows, mode: str) -> float:
    """The mask of the backend 'sdpa' on CUDA: a byte a pair of frames, and two in every layer as torch adds it.

    The modes but 'none' make the latter anew, for one layer at a time.
    """
    frames = batch.frames // settings.stride
    return batch.rows * frames**2 * (1.0 + 2.0 * (settings.num_layers if mode == "none" else 1))


def encoder_bytes(settings: EncoderSettings, batch: Rows, device: str, mode: str) -> float:
    """What the whole encoder keeps for the backward pass; but not the subsampling's weights in bfloat16."""
    blocks = settings.num_layers * block_bytes(settings, batch, device, mode)
    return blocks + subsampling_bytes(settings, batch, device)


def backward_bytes(settings: EncoderSettings, batch: Rows, device: str, mode: str) -> float:
    """What the backward pass needs above what was kept: the rest of a block, computed again, and its gradients."""
    frames = batch.rows * (batch.frames // settings.stride)
    again = block_bytes(settings, batch, device, "none") - block_bytes(settings, batch, device, mode)
    dim, feedforward = WORKING[device]
    weights = min(MAX_WEIGHTS, settings.num_heads * (batch.frames // settings.stride) ** 2) if device == "cpu" else 0
    return again + frames * (dim * settings.dim + feedforward * settings.feedforward_dim) + 6.0 * weights


def weight_bytes(settings: EncoderSettings, shards: int) -> float:
    """Float32 weights, gradients and AdamW's two moments, head included; with FSDP what is gathered at a time.

    Gathered are two blocks in bfloat16 (one ahead) and the gradients of one, in bfloat16 and to be summed in float32;
    subsampling and head in float32, with their gradients. The latter keep a bfloat16 copy either way.
    """
    blocks = settings.num_layers * block_weights(settings)
    rest = num_parameters(settings) - blocks + settings.dim * NUM_CODES
    if shards == 1:
        return 16.0 * blocks + 18.0 * rest
    return 16.0 * (blocks + rest) / shards + 10.0 * blocks / settings.num_layers + 14.0 * rest


def activation_bytes(settings: EncoderSettings, batch: Rows, mode: str, shards: int = 1, dense: bool = False) -> float:
    """Peak of BEST-RQ pretraining on one GPU beside `weight_bytes`: at the loss, or in the last block's backward pass.

    Args:
        dense: attention by the backend 'sdpa' with a mask of all pairs of frames; else flex, or a window.
    """
    kept = encoder_bytes(settings, batch, "cuda", mode)
    if mode == "none" and shards > 1:  # weights are gathered in bfloat16 and given back: no copy is kept
        kept -= settings.num_layers * KEPT["cuda", "none"].weights * block_weights(settings)
    head = HEAD * TARGET_SHARE * batch.rows * (batch.frames // settings.stride) * NUM_CODES
    mask = dense_mask_bytes(settings, batch, mode) if dense else 0.0
    return kept + mask + max(head, backward_bytes(settings, batch, "cuda", mode))


def rows_that_fit(settings: EncoderSettings, frames: int, mode: str, shards: int = 1, dense: bool = False) -> int:
    """Rows of so many mel frames on a GPU of 80 GB; at most 9,999."""
    left = BUDGET - weight_bytes(settings, shards)

    def needed(rows: int) -> float:
        return activation_bytes(settings, Rows(rows, frames), mode, shards, dense)

    return bisect.bisect_right(range(1, 10_000), left, key=needed)


def table(preset: str, dense: bool = False) -> str:
    """Markdown: rows that fit on a GPU, by their length, alone and among 8 under FSDP2, in every mode."""
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
    """The tables of docs/memory.md."""
    parts = [
        f"`{preset}`, {'`sdpa`: a dense mask' if dense else '`flex`, or a window'}:\n\n{table(preset, dense)}\n"
        for preset in ("base-120m", "large-600m")
        for dense in (False, True)
    ]
    return "\n".join(parts)
