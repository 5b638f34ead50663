"""BEST-RQ objective: predict the code of every fully masked stack of mel frames from its context.

Targets are computed outside the model, in float32, from the clean features; the model receives the masked features
only. Target t belongs to encoder frame t: both are counted from the start of the segment, a multiple of the stride.

R rows, F mel frames per row, M mel bins, T encoder frames per row, N targets, C codebooks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.masking import fill_with_noise, num_runs
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer, stack_frames
from bestrq.training.meters import IntervalSums, count_flops
from bestrq.training.process import DistributedSettings, World, autocast, unwrap
from common.segments import Segments


@dataclass
class MaskedRows:
    """Input and targets of the model for a batch."""

    log_mel: Tensor
    """float32 [R, F, M], masked frames replaced by noise"""
    mask: Tensor
    """bool [R, F], on the CPU"""
    segments: Segments
    """in mel frames"""
    target_frames: Tensor
    """int64 [N], ascending: row * T + t of every encoder frame with a target"""
    targets: Tensor
    """int64 [N, C] codes"""


def target_frame_mask(mask: Tensor, segments: Segments, stride: int) -> Tensor:
    """Encoder frames with a target, bool `[R, T]`: all mel frames of their stack are masked and in one segment.

    The incomplete last stack of a segment has no target, and neither have gaps, which are never masked.
    """
    rows, frames = mask.shape
    inside = torch.zeros_like(mask)
    for row, _, start, stop in segments.used():
        inside[row, start:stop] = True
    return (mask & inside).view(rows, frames // stride, stride).all(dim=-1)


def mask_rows(
    log_mel: Tensor,
    mask: Tensor,
    segments: Segments,
    quantizer: RandomProjectionQuantizer,
    stride: int,
    noise_std: float,
) -> MaskedRows:
    """Compute the codes of the clean features, and replace masked frames by noise.

    Args:
        log_mel: clean normalised features, float32 `[R, F, M]`, on the device.
        mask: bool `[R, F]`, on the CPU: the number of targets is then known without waiting for the device.
        segments: in mel frames, with seeds.
    """
    target_frames = target_frame_mask(mask, segments, stride).flatten().nonzero().squeeze(1)
    target_frames = target_frames.to(log_mel.device, non_blocking=True)
    stacks = stack_frames(log_mel, stride).flatten(0, 1)[target_frames]
    noisy = fill_with_noise(log_mel, mask.to(log_mel.device, non_blocking=True), segments, noise_std)
    return MaskedRows(noisy, mask, segments, target_frames, quantizer(stacks))


def frame_counts(rows: MaskedRows) -> dict[str, int]:
    """Numbers of masked frames, masked runs, frames of segments, and frames of rows."""
    counts = {"masked_frames": int(rows.mask.sum()), "masked_runs": num_runs(rows.mask)}
    return counts | {"frames": int(rows.segments.length.sum()), "row_frames": rows.mask.numel()}


class BestRQ(nn.Module):
    """Conformer encoder with one softmax head per codebook, applied to the frames with a target only."""

    def __init__(self, encoder: EncoderSettings, quantizer: QuantizerSettings) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(encoder)
        self.num_codebooks = quantizer.num_codebooks
        self.heads = nn.Linear(encoder.dim, quantizer.num_codebooks * quantizer.codebook_size)

    def forward(
        self, log_mel: Tensor, segments: Segments, target_frames: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies in nats over N targets x C codebooks, and the number of correct predictions.

        Sums, not means: the loop divides by the number of targets of all ranks and micro-batches. Arguments: see
        `MaskedRows`. Returns scalars, float32 (float64 for a float64 model) and int64.
        """
        hidden = self.encoder(log_mel, self.encoder.layout(segments)).flatten(0, 1)[target_frames]
        logits = self.heads(hidden).unflatten(1, (self.num_codebooks, -1)).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = targets.flatten()
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            num_correct = (logits.argmax(dim=-1) == labels).sum()
        return loss_sum, num_correct


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[MaskedRows], settings: DistributedSettings, world: World
) -> dict[str, float]:
    """Mean loss (nats per target) and accuracy over the held-out batches of all ranks, in eval mode.

    All ranks must call it with the same number of batches, because the forward pass of FSDP2 is a collective.
    """
    sums = IntervalSums(("loss", "correct", "targets"), world.device)
    plain = unwrap(model)
    plain.eval()
    for rows in batches:
        with autocast(world, settings):
            loss, num_correct = plain(rows.log_mel, rows.segments, rows.target_frames, rows.targets)
        sums.add(loss=loss, correct=num_correct, targets=rows.targets.numel())
    plain.train()
    totals = sums.totals(world)
    num_targets = max(totals["targets"], 1)
    return {"dev_loss": totals["loss"] / num_targets, "dev_accuracy": totals["correct"] / num_targets}


def flops_per_row(model: BestRQ, row_frames: int, segment_frames: int, device: torch.device) -> int:
    """FLOPs of a forward and backward pass of a row of `row_frames` filled with segments of `segment_frames` at most.

    A third of the frames have a target.
    """
    settings = model.encoder.settings
    segment_frames -= segment_frames % settings.row_multiple
    gap = -(-settings.row_gap // settings.row_multiple) * settings.row_multiple
    starts = torch.arange(0, row_frames - segment_frames + 1, segment_frames + gap).unsqueeze(0)
    segments = Segments(starts, torch.full_like(starts, segment_frames), row_frames)
    log_mel = torch.zeros(1, row_frames, settings.num_mels, device=device)
    target_frames = torch.arange(row_frames // settings.stride // 3, device=device)
    targets = torch.zeros(len(target_frames), model.num_codebooks, dtype=torch.int64, device=device)
    model.eval()  # counting must neither draw dropout nor update batch norm statistics
    flops = count_flops(lambda: model(log_mel, segments, target_frames, targets)[0])
    model.train()
    return flops
