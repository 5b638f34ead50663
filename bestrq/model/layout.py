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
    """Places of the frames of a stage after segments are moved apart, in rows of P frames. All shapes are fixed."""

    place: Tensor
    """int64 [R * T]: index row * P + t of every frame; one in a gap moves with the segment before it"""
    frame: Tensor
    """int64 [R * P]: index row * T + t of the frame at every place; 0 at places without a valid frame"""
    valid: Tensor
    """bool [R * T, 1]: frames of segments"""
    occupied: Tensor
    """bool [R * P, 1]: places of valid frames"""


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
    if settings.compile is True and not training:  # evaluation runs uncompiled
        settings = replace(settings, compile=False)
    multiple = settings.row_multiple
    placed, segments = segments.placed, Segments(segments.start.cpu(), segments.length.cpu(), segments.num_frames)
    if bool((segments.start % multiple).any()):
        raise ValueError(f"segments must start at multiples of {multiple} mel frames")
    if bool((segments.start + segments.length > segments.num_frames).any()):
        raise ValueError(f"a segment ends after its row of {segments.num_frames} mel frames")
    segments = replace(segments, num_frames=-(-segments.num_frames // multiple) * multiple)
    ordered = order_segments(segments)
    _check_gaps(ordered, settings.subsampling_factor // 2)
    if placed is None or placed.num_frames != segments.num_frames:
        placed = ordered.to(device)
    return lay_out(segments, placed, settings, training, dtype, backend)


def lay_out(
    segments: Segments, placed: Segments, settings: EncoderSettings, training: bool, dtype: torch.dtype,
    backend: str | None,
) -> RowLayout:  # fmt: skip
    """`make_layout` without checks, from segments on the CPU, and in the order of their start on the device."""
    mask_settings = settings
    if training and settings.dynamic_chunks:
        unit = math.lcm(*(group_size << number for number, group_size in enumerate(settings.group_sizes)))
        size = draw_chunk_size(settings.chunk_size, unit)
        drawn = {"mask": "segment"} if size is None else {"chunk_size": size}
        mask_settings = replace(settings, dynamic_chunks=False, **drawn)
    stages = []
    for number, stage in enumerate(settings.stages):
        stride = settings.subsampling_factor << number
        mask = make_attention_mask(mask_settings, stage.group_size << number)
        of_stage = segments.subsampled(stride), placed.subsampled(stride)
        stages.append(_stage_layout(*of_stage, stage, mask, dtype, backend))
    return RowLayout(locate_frames(placed)[0], stages)


def make_attention_mask(settings: EncoderSettings, unit: int) -> AttentionMask:
    """Build the mask of `settings.mask` for attention frames that cover `unit` frames of the first stage each."""
    if settings.mask == "window":
        return WindowMask(settings.window // unit)
    if settings.mask == "chunk":
        return ChunkMask(settings.chunk_size // unit, settings.left_chunks)
    return CausalMask() if settings.mask == "causal" else SegmentMask()


def order_segments(segments: Segments) -> Segments:
    """Slots in the order of their start; unused ones last, at the end of the row."""
    start, order = segments.start.masked_fill(segments.length == 0, segments.num_frames).sort(dim=1, stable=True)
    seed = None if segments.seed is None else segments.seed.gather(1, order)
    return Segments(start, segments.length.gather(1, order), segments.num_frames, seed)


def _check_gaps(ordered: Segments, reach: int) -> None:
    """Raise ValueError if the subsampling would mix two segments, which no loss would reveal."""
    stop = ordered.start + ordered.length
    used = ordered.length[:, 1:] > 0
    if bool(((ordered.start[:, 1:] < stop[:, :-1] + reach) & used).any()):
        raise ValueError(f"two segments of a row are less than {reach} mel frames apart: use gaps of settings.row_gap")


def locate_frames(ordered: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Validity (bool), rank of the last segment that has started, and position in it (0 in gaps), each `[R, T]`.

    The rank counts from 0; before the first segment of a row it is 0 as well.
    """
    frame = torch.arange(ordered.num_frames, device=ordered.start.device).expand(len(ordered.start), -1).contiguous()
    rank = torch.searchsorted(ordered.start, frame, right=True).sub_(1).clamp_(min=0)
    position = frame - ordered.start.gather(1, rank)
    valid = (position >= 0) & (position < ordered.length.gather(1, rank))
    return valid, rank, position * valid


def _stage_layout(
    segments: Segments, ordered: Segments, stage: EncoderSettings, mask: AttentionMask, dtype: torch.dtype,
    backend: str | None,
) -> StageLayout:  # fmt: skip
    """Layout of a stage from its segments on the CPU, and from the ordered ones on the device of the encoder."""
    located = valid, rank, position = locate_frames(ordered)
    reach = stage.kernel_size - 1 if stage.causal_convolution else stage.kernel_size // 2
    groups, ordered_groups = segments.subsampled(stage.group_size), ordered.subsampled(stage.group_size)
    if stage.group_size > 1:
        located = locate_frames(ordered_groups)
    return StageLayout(
        segments=segments,
        valid=valid,
        position=position,
        convolution=_convolution_layout(ordered, valid, rank, reach),
        attention=_attention_layout(groups, ordered_groups, located, stage, mask, dtype, backend),
    )


def _convolution_layout(ordered: Segments, valid: Tensor, rank: Tensor, reach: int) -> ConvolutionLayout:
    rows, num_segments = ordered.start.shape
    num_frames = ordered.num_frames
    num_places = num_frames + (num_segments - 1) * reach
    device = ordered.start.device
    moved = torch.arange(num_segments, device=device) * reach
    occupied, rank_of_place, position = locate_frames(Segments(ordered.start + moved, ordered.length, num_places))
    frame = position + ordered.start.gather(1, rank_of_place) + torch.arange(rows, device=device)[:, None] * num_frames
    place = torch.arange(num_frames, device=device) + rank * reach
    place = place + torch.arange(rows, device=device)[:, None] * num_places
    return ConvolutionLayout(
        place=place.flatten(),
        frame=(frame * occupied).flatten(),
        valid=valid.view(-1, 1),
        occupied=occupied.view(-1, 1),
    )


def _attention_layout(
    segments: Segments, ordered: Segments, located: tuple[Tensor, Tensor, Tensor], stage: EncoderSettings,
    mask: AttentionMask, dtype: torch.dtype, backend: str | None,
) -> AttentionLayout:  # fmt: skip
    valid, rank, position = located
    num_frames, device = segments.num_frames, valid.device
    frame = torch.arange(num_frames, device=device)
    start, length = ordered.start.gather(1, rank), ordered.length.gather(1, rank)
    first, stop = mask(position)
    first_key = torch.where(valid, start + first.clamp(min=0), frame)
    stop_key = torch.where(valid, start + stop.minimum(length), frame + 1)
    phase = None
    if stage.position == "rotary":
        scaled = frame.double() / stage.rotary_interpolation
        phase = rotary_phase(scaled, stage.head_dim, stage.rotary_theta, dtype)[position]
    backend = backend or choose_backend(stage.backend, device, num_frames, mask.reach, stage.compile is True)
    spans = []
    if device.type == "cpu":
        spans = [(row * num_frames + start, row * num_frames + stop) for row, _, start, stop in segments.used()]
    single_segment = valid if segments.start.shape[1] == 1 else None
    backend_mask = make_backend_mask(backend, ordered, first_key, stop_key, mask.reach, single_segment)
    return AttentionLayout(spans, mask, first_key, stop_key, phase, backend, backend_mask)
