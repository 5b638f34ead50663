"""The BEST-RQ objective: predict the code of every fully masked stack of mel frames from its surroundings.

Targets are computed outside the model, in float32, from the clean features; the model sees the masked ones only.
Target t belongs to encoder frame t by construction: both are counted from the segment's start, which is a multiple
of the subsampling factor.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.masking import fill_with_noise
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer, stack_frames
from common.segments import Segments


@dataclass
class MaskedRows:
    """What the encoder sees of a batch, and what it must predict."""

    log_mel: Tensor
    """float32 [R, F, M], masked frames replaced by noise"""
    segments: Segments
    """in mel frames"""
    target_frames: Tensor
    """int64 [N]: row * T + t of every encoder frame with a target, ascending"""
    targets: Tensor
    """int64 [N, C] codes"""


def target_frame_mask(mask: Tensor, segments: Segments, stride: int) -> Tensor:
    """Encoder frames that have a target, bool `[R, T]`: all mel frames of their stack lie in a segment and are masked.

    A segment's last, incomplete stack has no target. Gaps are never masked, so they never have one.
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
    """Codes of the clean features, and the features with their masked frames replaced by noise.

    Args:
        log_mel: clean normalised features, float32 `[R, F, M]`.
        mask: bool `[R, F]`.
        segments: in mel frames, with seeds.
    """
    has_target = target_frame_mask(mask, segments, stride)
    target_frames = has_target.flatten().nonzero().squeeze(1)
    stacks = stack_frames(log_mel, stride).flatten(0, 1)[target_frames]
    noisy = fill_with_noise(log_mel, mask, segments, noise_std)
    return MaskedRows(noisy, segments, target_frames, quantizer(stacks))


class BestRQ(nn.Module):
    """Encoder and one softmax head a codebook, which run on the frames with a target only."""

    def __init__(self, encoder: EncoderSettings, quantizer: QuantizerSettings) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(encoder)
        self.num_codebooks = quantizer.num_codebooks
        self.heads = nn.Linear(encoder.dim, quantizer.num_codebooks * quantizer.codebook_size)

    def forward(
        self, log_mel: Tensor, segments: Segments, target_frames: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies in nats over N targets x C codebooks, and how many were predicted right.

        Returns sums and not means: the step divides by the number of targets on all ranks. See `MaskedRows` for the
        arguments. Both results are scalars, float32 (float64 for a float64 model) and int64.
        """
        hidden = self.encoder(log_mel, self.encoder.layout(segments)).flatten(0, 1)[target_frames]
        logits = self.heads(hidden).unflatten(1, (self.num_codebooks, -1)).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = targets.flatten()
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            num_correct = (logits.argmax(dim=-1) == labels).sum()
        return loss_sum, num_correct
