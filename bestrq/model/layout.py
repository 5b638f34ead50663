"""Layout of the segments in a batch of packed rows, computed once per batch and shared by all layers.

`R` rows of `T` encoder frames hold up to `S` segments each; all other frames are gaps. Attention separates segments by
the interval of keys of each frame. The convolution module moves segments apart by the reach of its kernel, so that no
output depends on two segments.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bestrq.model.attention.backends import choose_backend, make_backend_mask
from bestrq.model.attention.masks import (
    AttentionLayout,
    AttentionMask,
    CausalMask,
    ChunkMask,
    SegmentMask,
    WindowMask,
    draw_chunk_size,
)
from bestrq.model.positions import rotary_phase
from bestrq.model.settings import EncoderSettings
from common.segments import Segments


@dataclass
class ConvolutionLayout:
    """Places of the frames of a stage after segments are moved apart, in rows of `spread_frames`."""

    frame: Tensor
    """int64 [N]: index row * T + t of every valid frame, ascending"""
    place: Tensor
    """int64 [N]: index row * spread_frames + t of the same frames, with t in the row of separated segments"""
    spread_frames: int
    """length of a row of separated segments, T + (S - 1) * reach"""


@dataclass
class StageLayout:
    """Segments of a batch at the frame rate of one stage of blocks."""

    segments: Segments
    """in encoder frames of this stage, on the CPU"""
    valid: Tensor
    """bool [R, T]: False in gaps and padding"""
    position: Tensor
    """int64 [R, T]: frames since the start of the segment; 0 in gaps"""
    convolution: ConvolutionLayout
    attention: AttentionLayout


@dataclass
class RowLayout:
    """Segments of a batch at all frame rates, from mel frames to the output."""

    valid_mel: Tensor
    """bool [R, F]: False in gaps and padding"""
    stages: list[StageLayout]
    """one per stage, first to last"""

    @property
    def output(self) -> StageLayout:
        """Layout of the encoder's output: the last stage."""
        return self.stages[-1]


def make_layout(
    segments: Segments, settings: EncoderSettings, *, training: bool, device: torch.device, dtype: torch.dtype,
    backend: str | None = None,
) -> RowLayout:  # fmt: skip
    """Lay out rows of mel frames.

    Args:
        segments: in mel frames, on the CPU (from another device they are copied).
        training: draw a random chunk size if `settings.dynamic_chunks`.
        device: of the encoder.
        dtype: of the encoder's parameters; float64 gives float64 rotary phases.
        backend: key of `attention.module.ATTEND`; None for `choose_backend`.

    Raises:
        ValueError: a segment does not start at a multiple of `row_multiple`, ends after its row, or is too close to the
            previous one.
    """
    multiple = settings.row_multiple
    segments = Segments(segments.start.cpu(), segments.length.cpu(), segments.num_frames)
    if bool((segments.start % multiple).any()):
        raise ValueError(f"segments must start at multiples of {multiple} mel frames")
    if bool((segments.start + segments.length > segments.num_frames).any()):
        raise ValueError(f"a segment ends after its row of {segments.num_frames} mel frames")
    _check_gaps(segments, settings.subsampling_factor // 2)
    segments = replace(segments, num_frames=-(-segments.num_frames // multiple) * multiple)

    mask_settings = settings
    if training and settings.dynamic_chunks:
        unit = math.lcm(*(group_size << number for number, group_size in enumerate(settings.group_sizes)))
        size = draw_chunk_size(settings.chunk_size, unit)
        drawn = {"mask": "segment"} if size is None else {"chunk_size": size}
        mask_settings = replace(settings, dynamic_chunks=False, **drawn)
    stages = []
    for number, stage in enumerate(settings.stages):
        stage_segments = segments.subsampled(settings.subsampling_factor << number)
        mask = make_attention_mask(mask_settings, stage.group_size << number)
        stages.append(_stage_layout(stage_segments, stage, mask, device, dtype, backend))
    return RowLayout(_locate_frames(segments)[0].to(device), stages)


def make_attention_mask(settings: EncoderSettings, unit: int) -> AttentionMask:
    """Build the mask of `settings.mask` for attention frames that cover `unit` frames of the first stage each."""
    if settings.mask == "window":
        return WindowMask(settings.window // unit)
    if settings.mask == "chunk":
        return ChunkMask(settings.chunk_size // unit, settings.left_chunks)
    return CausalMask() if settings.mask == "causal" else SegmentMask()


def _check_gaps(segments: Segments, reach: int) -> None:
    """Raise ValueError if the subsampling would mix two segments, which no loss would reveal."""
    unused = segments.length == 0
    start, order = segments.start.masked_fill(unused, segments.num_frames + reach).sort(dim=1)
    stop = start + segments.length.gather(1, order)
    if bool(((start[:, 1:] < stop[:, :-1] + reach) & ~unused.gather(1, order)[:, 1:]).any()):
        raise ValueError(f"two segments of a row are less than {reach} mel frames apart: use gaps of settings.row_gap")


def _locate_frames(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Validity (bool), slot, and position in the segment (int64) of every frame, each `[R, T]`."""
    frame = torch.arange(segments.num_frames)
    start, stop = segments.start[..., None], (segments.start + segments.length)[..., None]
    inside = (frame >= start) & (frame < stop)  # [R, S, T]
    valid, slot = inside.any(dim=1), inside.to(torch.uint8).argmax(dim=1)
    return valid, slot, torch.where(valid, frame - segments.start.gather(1, slot), 0)


def _stage_layout(
    segments: Segments, stage: EncoderSettings, mask: AttentionMask, device: torch.device, dtype: torch.dtype,
    backend: str | None,
) -> StageLayout:  # fmt: skip
    valid, slot, position = _locate_frames(segments)
    reach = stage.kernel_size - 1 if stage.causal_convolution else stage.kernel_size // 2
    return StageLayout(
        segments=segments,
        valid=valid.to(device),
        position=position.to(device),
        convolution=_convolution_layout(segments, valid, slot, reach, device),
        attention=_attention_layout(segments.subsampled(stage.group_size), stage, mask, device, dtype, backend),
    )


def _convolution_layout(
    segments: Segments, valid: Tensor, slot: Tensor, reach: int, device: torch.device
) -> ConvolutionLayout:
    num_segments, num_frames = segments.start.shape[1], segments.num_frames
    spread_frames = num_frames + (num_segments - 1) * reach
    # Segments are ranked by start, not by slot; each is moved by `reach` times its rank.
    rank = torch.where(segments.length > 0, segments.start, num_frames).argsort(dim=1, stable=True)
    rank = rank.argsort(dim=1, stable=True)
    row, time = valid.nonzero(as_tuple=True)
    place = row * spread_frames + time + rank[row, slot[row, time]] * reach
    return ConvolutionLayout((row * num_frames + time).to(device), place.to(device), spread_frames)


def _attention_layout(
    segments: Segments, stage: EncoderSettings, mask: AttentionMask, device: torch.device, dtype: torch.dtype,
    backend: str | None,
) -> AttentionLayout:  # fmt: skip
    valid, slot, position = _locate_frames(segments)
    num_frames = segments.num_frames
    frame = torch.arange(num_frames)
    start, length = segments.start.gather(1, slot), segments.length.gather(1, slot)
    first, stop = mask(position)
    first_key = torch.where(valid, start + first.clamp(min=0), frame).to(device)
    stop_key = torch.where(valid, start + stop.minimum(length), frame + 1).to(device)
    phase = None
    if stage.position == "rotary":
        scaled = position.double() / stage.rotary_interpolation
        phase = rotary_phase(scaled, stage.head_dim, stage.rotary_theta, dtype).to(device)
    spans = [(row * num_frames + start, row * num_frames + stop) for row, _, start, stop in segments.used()]
    backend = backend or choose_backend(stage.backend, device, num_frames, mask.reach)
    single_segment = valid.to(device) if segments.start.shape[1] == 1 else None
    backend_mask = make_backend_mask(backend, first_key, stop_key, mask.reach, single_segment)
    return AttentionLayout(spans, mask, first_key, stop_key, phase, backend, backend_mask)
