"""FLOPs of a pretraining step, for the MFU."""

import torch
from torch import nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.layout import make_attention_mask
from bestrq.training.flops import count_flops, peak_flops
from common.segments import Segments

__all__ = ["flops_per_row", "peak_flops"]


def flops_per_row(model: nn.Module, row_frames: int, segment_frames: int, device: torch.device) -> int:
    """FLOPs of a forward and backward pass of a row of `row_frames` filled with segments of `segment_frames` at most.

    A third of the frames have a target. The forward pass of a teacher is not counted. On a GPU, attention counts the
    pairs of frames that its mask allows: the counter cannot run compiled kernels, and the backends that replace them
    compute all pairs of a row. model: `BestRQ` or `MultiTarget`.
    """
    encoder = model.encoder
    assert isinstance(encoder, ConformerEncoder)
    settings = encoder.settings
    segment_frames -= segment_frames % settings.row_multiple
    gap = -(-settings.row_gap // settings.row_multiple) * settings.row_multiple
    starts = torch.arange(0, row_frames, segment_frames + gap).unsqueeze(0)
    segments = Segments(starts, (row_frames - starts).clamp(max=segment_frames), row_frames)  # the last may be shorter
    log_mel = torch.zeros(1, row_frames, settings.num_mels, device=device)
    target_frames = torch.arange(row_frames // settings.stride // 3, device=device)
    targets = torch.zeros(len(target_frames), model.num_codebooks, dtype=torch.int64, device=device)  # type: ignore[call-overload]
    model.eval()  # counting must neither draw dropout nor update batch norm statistics
    attention = attention_flops(settings, segments)
    flops = count_flops(lambda: model(log_mel, segments, target_frames, targets)[0], attention)
    model.train()
    return flops


def attention_flops(settings: EncoderSettings, segments: Segments) -> int:
    """FLOPs of the products of attention in a forward pass: queries with keys, and weights with values.

    Each has 2 d FLOPs per head and pair of query and key that the mask allows (head width d). The products with the
    weight matrices are not included.

    Args:
        segments: in mel frames.
    """
    total = 0
    for number, stage in enumerate(settings.stages):
        mask = make_attention_mask(settings, stage.group_size << number)
        frames = segments.subsampled(settings.subsampling_factor << number).subsampled(stage.group_size)
        for _, _, start, stop in frames.used():
            first_key, stop_key = mask(torch.arange(stop - start))
            pairs = int((stop_key.clamp(max=stop - start) - first_key.clamp(min=0)).sum())
            # Groups of g frames are vectors of g times the width.
            total += 4 * stage.num_layers * stage.dim * stage.group_size * pairs
    return total
