"""Where the segments of a batch of packed rows lie: worked out once a batch, shared by all layers.

`R` rows of `T` encoder frames hold up to `S` segments each; what lies between and after them is a gap. Inside the
convolution module the segments are spread apart by the reach of its kernel, so that no output sees two segments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq.model.positions import rotary_phase


@dataclass
class RowLayout:
    """The segments of a batch, in encoder frames, and what the layers need to keep them apart."""

    segment_start: Tensor
    """int64 [R, S]; 0 in unused slots"""
    segment_length: Tensor
    """int64 [R, S]; 0 marks an unused slot"""
    valid: Tensor
    """bool [R, T]: False in gaps and padding"""
    valid_mel: Tensor
    """bool [R, F]: the same in mel frames"""
    valid_half: Tensor
    """bool [R, F / 2]: the same after the first subsampling convolution"""
    frame: Tensor
    """int64 [N]: index row * T + t of every valid frame, ascending"""
    slot: Tensor
    """int64 [N]: where that frame lies among the `num_spread` rows x slots of the spread-out segments"""
    num_spread: int
    """slots in a row of spread-out segments: T + (S - 1) * reach"""
    segments: list[tuple[int, int]]
    """(start, stop) of every segment, in frames of the flattened [R * T]: plain numbers, for loops on the CPU"""
    attention_mask: Tensor | None
    """bool [R, 1, T, T] or [R, 1, 1, T], True where a frame may attend; None on the CPU, which loops over segments"""
    rotary_phase: Tensor | None
    """complex [R, T, head width / 2]: `positions.rotary_phase` counted from the start of the segment, or None"""


def _mark(start: Tensor, length: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Valid frames, bool `[R, n]`, and the segment slot of each, int64 `[R, n]`, from int64 `[R, S]`."""
    frame = torch.arange(num_frames, device=start.device)
    inside = (frame >= start[..., None]) & (frame < (start + length)[..., None])  # [R, S, n]
    return inside.any(dim=1), inside.to(torch.uint8).argmax(dim=1)


def make_layout(
    segment_start: Tensor,
    segment_length: Tensor,
    num_frames: int,
    *,
    subsampling_factor: int,
    reach: int,
    rotary_dim: int | None,
    rotary_theta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> RowLayout:
    """Lay out rows of `num_frames` mel frames.

    Args:
        segment_start, segment_length: int64 `[R, S]` in mel frames, best on the CPU: the plain numbers are read there.
        reach: encoder frames that the depthwise convolution sees to either side.
        rotary_dim: width of a head, or None for no positions.
        device: where the encoder is.
        dtype: of its parameters; float64 gives float64 angles.
    """
    factor = subsampling_factor
    if num_frames % factor:
        raise ValueError(f"rows of {num_frames} mel frames: give a multiple of the subsampling factor {factor}")
    segment_start, segment_length = segment_start.cpu(), segment_length.cpu()
    if bool((segment_start % factor).any()):
        raise ValueError(f"segment_start must be multiples of the subsampling factor {factor}")
    if bool((segment_start + segment_length > num_frames).any()):
        raise ValueError(f"a segment ends behind its row of {num_frames} mel frames")

    rows = num_frames // factor
    start, length = segment_start // factor, (segment_length + factor - 1) // factor
    valid, segment = _mark(start, length, rows)
    valid_mel, _ = _mark(segment_start, segment_length, num_frames)
    valid_half, _ = _mark(segment_start // 2, (segment_length + 1) // 2, num_frames // 2)

    num_rows, num_segments = start.shape
    num_spread = rows + (num_segments - 1) * reach
    # Slots are numbered in order of their start, whatever the order in the batch: a later segment moves further.
    order = torch.where(length > 0, start, num_frames).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    row, time = valid.nonzero(as_tuple=True)
    here = segment[row, time]
    position = torch.zeros_like(segment)
    position[row, time] = time - start[row, here]
    slot = row * num_spread + time + order[row, here] * reach
    phase = None if rotary_dim is None else rotary_phase(position, rotary_dim, rotary_theta, dtype).to(device)
    segments = [
        (int(r * rows + start[r, s]), int(r * rows + start[r, s] + length[r, s]))
        for r in range(num_rows)
        for s in range(num_segments)
        if length[r, s] > 0
    ]
    return RowLayout(
        segment_start=start.to(device),
        segment_length=length.to(device),
        valid=valid.to(device),
        valid_mel=valid_mel.to(device),
        valid_half=valid_half.to(device),
        frame=(row * rows + time).to(device),
        slot=slot.to(device),
        num_spread=num_spread,
        segments=segments,
        attention_mask=None if device.type == "cpu" else attention_mask(valid, segment, num_segments).to(device),
        rotary_phase=phase,
    )


def attention_mask(valid: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Which frames may attend to which: bool `[R, 1, T, T]`, or `[R, 1, 1, T]` for rows of one segment at most.

    A softmax over nothing would be NaN, so frames of a gap attend to something: among several segments to each other,
    in an empty row to all of it. Nobody reads what they make of it.

    Args:
        valid: bool `[R, T]`.
        segment: int64 `[R, T]`, the slot of every valid frame.
    """
    if num_segments == 1:
        return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None, :]
    owner = torch.where(valid, segment, -1)
    return owner[:, None, :, None] == owner[:, None, None, :]
