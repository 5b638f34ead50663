"""Masks on the outputs of the subsampling, as in the fine-tuning of wav2vec 2.0: spans of frames, bands of channels.

Sources: Baevski et al., arXiv 2006.11477, section 4.3 and appendix B; fairseq, `compute_mask_indices`, with
`mask_prob`, `mask_length`, `mask_channel_prob` and `mask_channel_length`. Two differences: masked
frames are set to 0, not to a learned vector, which an encoder pretrained with BEST-RQ does not have; and the spans of a
segment start anywhere, also at the same frame.

Shapes: R rows, T frames after the subsampling, D their width, S segment slots per row, K spans per segment.
"""

import math
from dataclasses import dataclass

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor

from bestrq.model.settings import EncoderSettings
from common.hashing import INCREMENT, splitmix64
from common.segments import Segments


@dataclass(frozen=True)
class HiddenMaskSettings:
    """Masks on the outputs of the subsampling in training.

    fairseq's wav2vec 2.0 recipe for 10 minutes of labels has time_prob 0.65 and channel_prob 0.25.
    """

    time_prob: ClosedUnitInterval = 0.0
    """expected number of masked frames per frame of a segment, overlaps counted twice: 0.65 masks about 48 %"""
    time_length: PositiveInt = 10
    """frames per span (of 40 ms if the subsampling factor is 4), at most half of the segment"""
    channel_prob: ClosedUnitInterval = 0.0
    """expected number of masked channels per channel, overlaps counted twice"""
    channel_length: PositiveInt = 64
    """neighbouring channels per band, at most half of the width; a band is masked in all frames of its segment"""


def draw_hidden_masks(
    segments: Segments, encoder: EncoderSettings, settings: HiddenMaskSettings, device: torch.device
) -> Tensor | None:
    """Draw the masks of a batch for `ConformerEncoder.forward`, bool `[R, T, D]`; None if both probabilities are 0.

    The masks of a segment are a pure function of its seed, its length and the settings. They do not depend on its row,
    the device or earlier random numbers.

    Args:
        segments: in mel frames, with seeds.
    """
    if not settings.time_prob and not settings.channel_prob:
        return None
    num_frames, dim = -(-segments.num_frames // encoder.subsampling_factor), encoder.stages[0].dim
    parts = segments.subsampled(encoder.subsampling_factor).to(device)
    start, length, seed = parts.start, parts.length, parts.seed
    assert seed is not None
    channels = torch.full_like(length, dim)
    bands = _spans(channels, dim, settings.channel_prob, settings.channel_length, seed, 0x5BED)  # [R, S, D]
    spans = _spans(length, num_frames, settings.time_prob, settings.time_length, seed, 0x5BEE)  # [R, S, T]
    frame = torch.arange(num_frames, device=device)
    offset = frame - start[..., None]  # [R, S, T]
    inside = (offset >= 0) & (offset < length[..., None])
    in_span = (spans.gather(2, offset.clamp(0, num_frames - 1)) & inside).any(dim=1)
    in_band = torch.einsum("rst,rsd->rtd", inside.float(), bands.float()) > 0  # segments do not overlap: a choice
    return in_band | in_span[..., None]


def _spans(length: Tensor, limit: int, prob: float, span: int, seed: Tensor, domain: int) -> Tensor:
    """Union of random spans within `[0, length)`, bool `[R, S, limit]`.

    As in fairseq, `prob * length / span` spans, rounded up or down at random so that the expectation is exact.

    Args:
        length, seed: int64 `[R, S]`.
        limit: greatest length.
        domain: separates the random numbers of different uses.
    """
    draws = torch.arange(1 + math.ceil(prob * limit / span) + 1, device=length.device)
    bits = splitmix64(splitmix64(seed[..., None] + domain) + draws * INCREMENT)
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double() / 2**53  # [R, S, 1 + K]
    size = (length // 2).clamp(max=span)[..., None]
    count = (prob * length / span + uniform[..., 0]).floor()
    used = (draws[:-1] < count[..., None]) & (size > 0)
    first = (uniform[..., 1:] * (length[..., None] - size + 1)).long()
    change = torch.zeros(*length.shape, limit + 1, dtype=torch.int64, device=length.device)
    change.scatter_add_(2, first, used.long()).scatter_add_(2, first + size, -used.long())
    return change.cumsum(dim=2)[..., :limit] > 0
