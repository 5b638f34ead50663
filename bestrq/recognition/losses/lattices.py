"""Alignment lattices of a transducer, with one cell per encoder frame and number of emitted labels.

Shapes: N segments, T_s frames and U_s labels of segment s, W states of a band. Label 0 is the blank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from common.errors import UserError

ALL_FRAMES = slice(None)
IMPOSSIBLE = -1e30
"""log-probability of an arc outside a band; with minus infinity, gradients would be NaN"""


@dataclass(frozen=True)
class Lattices:
    """Lattices of a batch, whose frames, states (0 to U_s emitted labels) and cells are concatenated.

    With `first_state`, every frame has only a band of consecutive states (see `pruning`).
    """

    num_frames: Sequence[int]
    """T_s of every segment, 1 or more"""
    labels: Sequence[Tensor]
    """int64 [U_s] of every segment, from 1 to V - 1, on the device of the joint network"""
    first_state: Sequence[Tensor] | None = None
    """int64 [T_s] of every segment: first state of every frame's band, on that device; None for all states"""
    widths: Sequence[int] | None = None
    """states per band, for every segment; None for all states"""

    def num_states(self, segment: int) -> int:
        """States of a segment, U_s + 1."""
        return len(self.labels[segment]) + 1

    def width(self, segment: int) -> int:
        """States per frame of a segment."""
        return self.num_states(segment) if self.widths is None else self.widths[segment]

    @property
    def cells(self) -> list[int]:
        """Number of cells of every segment."""
        return [frames * self.width(segment) for segment, frames in enumerate(self.num_frames)]

    def band(self, segment: int, frames: slice = ALL_FRAMES) -> Tensor | None:
        """States in the bands of the given frames, int64 `[frames, W]`; None if the frames have all states."""
        width = self.width(segment)
        if self.first_state is None or width == self.num_states(segment):
            return None
        first = self.first_state[segment][frames]
        return first[:, None] + torch.arange(width, device=first.device)


def check_labels(labels: Tensor, label_lengths: Tensor, vocab_size: int) -> None:
    """Raise UserError if a label is the blank or outside the vocabulary. Arguments: `[N, U]` and `[N]`, on the CPU."""
    used = torch.arange(labels.shape[1]) < label_lengths[:, None]
    invalid = (used & ((labels <= BLANK) | (labels >= vocab_size))).nonzero()
    if len(invalid):
        segment, position = invalid[0].tolist()
        raise UserError(
            f"label {int(labels[segment, position])} at position {position} of segment {segment}: the vocabulary has "
            f"labels 1 to {vocab_size - 1}, and 0 is the blank; use the tokenizer of the model"
        )


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Tensor of numbers from nested lists. The copy to a GPU does not make the host wait."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
