"""FLOPs of a pretraining step, for the MFU."""

import torch
from torch import nn

from bestrq.model.conformer import ConformerEncoder
from bestrq.training.flops import count_flops, peak_flops
from common.segments import Segments

__all__ = ["flops_per_row", "peak_flops"]


def flops_per_row(model: nn.Module, row_frames: int, segment_frames: int, device: torch.device) -> int:
    """FLOPs of a forward and backward pass of a row of `row_frames` filled with segments of `segment_frames` at most.

    A third of the frames have a target. The forward pass of a teacher is not counted. model: `BestRQ` or `MultiTarget`.
    """
    encoder = model.encoder
    assert isinstance(encoder, ConformerEncoder)
    settings = encoder.settings
    segment_frames -= segment_frames % settings.row_multiple
    gap = -(-settings.row_gap // settings.row_multiple) * settings.row_multiple
    starts = torch.arange(0, row_frames - segment_frames + 1, segment_frames + gap).unsqueeze(0)
    segments = Segments(starts, torch.full_like(starts, segment_frames), row_frames)
    log_mel = torch.zeros(1, row_frames, settings.num_mels, device=device)
    target_frames = torch.arange(row_frames // settings.stride // 3, device=device)
    targets = torch.zeros(len(target_frames), model.num_codebooks, dtype=torch.int64, device=device)  # type: ignore[call-overload]
    model.eval()  # counting must neither draw dropout nor update batch norm statistics
    flops = count_flops(lambda: model(log_mel, segments, target_frames, targets)[0])
    model.train()
    return flops
