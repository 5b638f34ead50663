"""Where the segments of a batch of packed rows lie: worked out once a batch, shared by all layers.

`R` rows of `T` encoder frames hold up to `S` segments each; what lies between and after them is a gap. Attention keeps
segments apart by the interval of keys that each frame may see; inside the convolution module the segments are spread
apart by the reach of its kernel, so that no output sees two segments.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bestrq.model.attention.backends import Plan, choose_backend, make_plan
from bestrq.model.attention.masks import Mask
from bestrq.model.attention.masks.causal import CausalMask
from bestrq.model.attention.masks.chunk import ChunkMask, draw_chunk_size
from bestrq.model.attention.masks.segment import SegmentMask
from bestrq.model.attention.masks.window import WindowMask
from bestrq.model.positions import rotary_phase
from bestrq.model.settings import EncoderSettings
from common.segments import Segments


@dataclass
class ConvolutionLayout:
    """How the convolution modules of a stage spread the segments apart."""

    frame: Tensor
    """int64 [N]: index row * T + t of every valid frame, ascending"""
    slot: Tensor
    """int64 [N]: where that frame lies among the `num_spread` rows x slots of the spread-out segments"""
    num_spread: int
    """slots in a row of spread-out segments: T + (S - 1) * reach"""


@dataclass
class AttentionLayout:
    """What may attend to what; in frames of attention, which are groups of frames with `group_size` above 1."""

    segments: list[tuple[int, int]]
    """(start, stop) of every segment, in frames of the flattened [R * T]: plain numbers, for loops on the CPU"""
    mask: Mask
    """keys that a query sees, in frames from the start of its segment"""
    first_key: Tensor
    """int64 [R, T]: the first frame of the row that a frame attends to; a frame of a gap attends to itself alone"""
    stop_key: Tensor
    """int64 [R, T]: the frame behind the last one; neither ever falls along a row"""
    rotary_phase: Tensor | None
    """complex [R, T, d / 2]: `positions.rotary_phase` counted from the start of the segment, or None"""
    backend: str
    """a key of `attention.module.ATTEND`"""
    plan: Plan
    """what the backend made of it: see `attention.backends`"""


@dataclass
class StageLayout:
    """The segments of a batch at the frame rate of one stage of blocks."""

    segments: Segments
    """places in encoder frames of this stage, on the CPU"""
    valid: Tensor
    """bool [R, T]: False in gaps and padding"""
    position: Tensor
    """int64 [R, T]: frames since the start of the segment; 0 in gaps"""
    convolution: ConvolutionLayout
    attention: AttentionLayout


@dataclass
class RowLayout:
    """The segments of a batch, from mel frames to the output."""

    valid_mel: Tensor
    """bool [R, F]: False in gaps and padding"""
    stages: list[StageLayout]
    """one a stage, first to last"""

    @property
    def output(self) -> StageLayout:
        """The last stage: the frames that come out."""
        return self.stages[-1]


def make_layout(
    segments: Segments, settings: EncoderSettings, *, training: bool, device: torch.device, dtype: torch.dtype,
    backend: str | None = None,
) -> RowLayout:  # fmt: skip
    """Lay out rows of mel frames.

    Args:
        segments: in mel frames, best on the CPU: the plain numbers are read there.
        training: draw the chunk size of dynamic chunk training.
        device: where the encoder is.
        dtype: of its parameters; float64 gives float64 angles.
        backend: a key of `attention.module.ATTEND` in place of the one that `choose_backend` takes.

    Raises:
        ValueError: a segment starts off the grid, ends behind its row, or lies too close to the one before.
    """
    multiple = settings.row_multiple
    segments = Segments(segments.start.cpu(), segments.length.cpu(), segments.num_frames)
    if bool((segments.start % multiple).any()):
        raise ValueError(f"segments must start at multiples of {multiple}")
    if bool((segments.start + segments.length > segments.num_frames).any()):
        raise ValueError(f"a segment ends behind its row of {segments.num_frames} mel frames")
    _check_gaps(segments, settings.subsampling_factor // 2)
    segments = replace(segments, num_frames=-(-segments.num_frames // multiple) * multiple)

    mask_settings = settings
    if training and settings.dynamic_chunks:
        unit = math.lcm(*(stage.group_size << number for number, stage in enumerate(settings.stages)))
        size = draw_chunk_size(settings.chunk_size, unit)
        drawn = {"mask": "segment"} if size is None else {"chunk_size": size}
        mask_settings = replace(settings, dynamic_chunks=False, **drawn)
    stages = []
    for number, stage in enumerate(settings.stages):
        stage_segments = segments.subsampled(settings.subsampling_factor << number)
        mask = make_mask(mask_settings, stage.group_size << number)
        stages.append(_stage_layout(stage_segments, stage, mask, device, dtype, backend))
    return RowLayout(
        valid_mel=_mark(segments)[0].to(device),
        stages=stages,
    )


def make_mask(settings: EncoderSettings, unit: int) -> Mask:
    """The mask that `settings.mask` names, where a frame of attention is `unit` frames of the first stage."""
    if settings.mask == "window":
        return WindowMask(settings.window // unit)
    if settings.mask == "chunk":
        return ChunkMask(settings.chunk_size // unit, settings.left_chunks)
    return CausalMask() if settings.mask == "causal" else SegmentMask()


def _check_gaps(segments: Segments, reach: int) -> None:
    """Within its reach the subsampling would carry one segment into the next, which no loss would show."""
    unused = segments.length == 0
    start, order = segments.start.masked_fill(unused, segments.num_frames + reach).sort(dim=1)
    stop = start + segments.length.gather(1, order)
    if bool(((start[:, 1:] < stop[:, :-1] + reach) & ~unused.gather(1, order)[:, 1:]).any()):
        raise ValueError(f"two segments of a row lie less than {reach} mel frames apart: give settings.row_gap")


def _mark(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Of every frame `[R, T]`: whether it is valid (bool), its slot, and its position in the segment (int64)."""
    frame = torch.arange(segments.num_frames)
    start, stop = segments.start[..., None], (segments.start + segments.length)[..., None]
    inside = (frame >= start) & (frame < stop)  # [R, S, T]
    valid, owner = inside.any(dim=1), inside.to(torch.uint8).argmax(dim=1)
    return valid, owner, torch.where(valid, frame - segments.start.gather(1, owner), 0)


def _stage_layout(
    segments: Segments,
    stage: EncoderSettings,
    mask: Mask,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
) -> StageLayout:
    valid, owner, position = _mark(segments)
    reach = stage.kernel_size - 1 if stage.causal_convolution else stage.kernel_size // 2
    return StageLayout(
        segments=segments,
        valid=valid.to(device),
        position=position.to(device),
        convolution=_convolution_layout(segments, valid, owner, reach, device),
        attention=_attention_layout(segments.subsampled(stage.group_size), stage, mask, device, dtype, backend),
    )


def _convolution_layout(
    segments: Segments, valid: Tensor, owner: Tensor, reach: int, device: torch.device
) -> ConvolutionLayout:
    num_segments, num_frames = segments.start.shape[1], segments.num_frames
    num_spread = num_frames + (num_segments - 1) * reach
    # Slots are numbered in order of their start, whatever the order in the batch: a later segment moves further.
    order = torch.where(segments.length > 0, segments.start, num_frames).argsort(dim=1, stable=True)
    order = order.argsort(dim=1, stable=True)
    row, time = valid.nonzero(as_tuple=True)
    slot = row * num_spread + time + order[row, owner[row, time]] * reach
    return ConvolutionLayout((row * num_frames + time).to(device), slot.to(device), num_spread)


def _attention_layout(
    segments: Segments,
    stage: EncoderSettings,
    mask: Mask,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
) -> AttentionLayout:
    valid, owner, position = _mark(segments)
    frame = torch.arange(segments.num_frames)
    start, length = segments.start.gather(1, owner), segments.length.gather(1, owner)
    first, stop = mask(position)
    first_key = torch.where(valid, start + first.clamp(min=0), frame).to(device)
    stop_key = torch.where(valid, start + stop.minimum(length), frame + 1).to(device)
    phase = None
    if stage.position == "rotary":
        scaled = position.double() / stage.rotary_interpolation
        phase = rotary_phase(scaled, stage.head_dim, stage.rotary_theta, dtype).to(device)
    spans = [
        (r * segments.num_frames + start, r * segments.num_frames + start + length)
        for r, row in enumerate(zip(segments.start.tolist(), segments.length.tolist(), strict=True))
        for start, length in zip(*row, strict=True)
        if length > 0
    ]
    backend = backend or choose_backend(stage.backend, device, segments.num_frames, mask.reach)
    only_segment = valid.to(device) if segments.start.shape[1] == 1 else None
    plan = make_plan(backend, first_key, stop_key, mask.reach, only_segment)
    return AttentionLayout(spans, mask, first_key, stop_key, phase, backend, plan)
