"""Codebook distilled from inner layers: codes as similar to each other over time as the layers' outputs are.

Source: RWTH, arXiv 2606.30671 (metric L1). A trainable copy of the quantizer's last codebook quantizes the same
projected stacks. The cosines between the codes of all pairs of frames of a segment are pulled to the mean cosines
between the outputs of the layers at these frames, which get no gradient. At given steps the copy replaces the last
codebook. Imported only if `targets.distill_layers` is set.

N frames with a target, V codes, d codebook_dim, D model width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.pretraining.matching import match
from bestrq.training.process import World, unsharded
from common.segments import Segments

MAX_SPAN = 1024
"""frames compared with each other: longer segments are cut, which bounds the memory"""


class DistilledCodebook(nn.Module):
    """Trainable codes, `[V, d]`; their length has no effect."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes = nn.Parameter(codes.clone())

    def forward(self, projected: Tensor | None, hidden: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> Tensor:
        """Sum over frames of the mean absolute difference of their cosines from the layers'.

        Args:
            projected: stacks of unit norm, `[N, d]`; None without spans.
            hidden: outputs of every layer at the same frames, `[N, D]`.
            spans: frames [first, stop) of every segment.
        """
        codes = F.normalize(self.codes, dim=-1)
        if projected is None:
            return codes.sum() * 0
        with torch.autocast(projected.device.type, enabled=False):
            chosen = codes[(projected.to(codes.dtype) @ codes.detach().T).argmax(dim=-1)]
            outputs = [F.normalize(layer.detach().to(codes.dtype), dim=-1) for layer in hidden]
            total = codes.sum() * 0  # a gradient without any frame: DDP needs it
            for first, stop in spans:
                part = chosen[first:stop]
                expected = torch.stack([x[first:stop] @ x[first:stop].T for x in outputs]).mean(dim=0)
                total = total + (part @ part.T - expected).abs().sum() / (stop - first)
        return total


def frame_spans(frames: Tensor, segments: Segments, stride: int) -> list[tuple[int, int]]:
    """Positions [first, stop) of the frames of every segment among all frames with a target, at most `MAX_SPAN` each.

    frames: bool `[R, T]` on the CPU. segments: in mel frames.
    """
    spans, position = [], 0
    for row, start, stop in sorted((row, start, stop) for row, _, start, stop in segments.subsampled(stride).used()):
        end = position + int(frames[row, start:stop].sum())
        spans += [(first, min(first + MAX_SPAN, end)) for first in range(position, end, MAX_SPAN)]
        position = end
    return spans


@torch.no_grad()
def replaced_codes(old: Tensor, codebook: DistilledCodebook, world: World) -> Tensor:
    """Distilled codes at unit norm in the order of the ids of `old`, `[V, d]`; all ranks must call it.

    The order has the largest sum of cosines between the old and the new code of an id (Hungarian method).
    """
    trained = codebook.codes.detach()
    new = F.normalize(unsharded(trained), dim=-1).to(old.dtype)
    if not world.is_main:
        return old
    return new[torch.from_numpy(match((old @ new.T).double().cpu().numpy())).to(new.device)]
