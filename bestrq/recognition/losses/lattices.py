"""The lattices of a transducer: for every frame and number of labels emitted, a cell.

N segments, T_s frames and U_s labels of segment s, V vocabulary. Label 0 is the blank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from common.errors import UserError


@dataclass(frozen=True)
class Lattices:
    """The lattices of a batch. Their frames, states (0 to U_s labels emitted) and cells lie end to end.

    With `first_state`, a frame sees a band of states only, which begins there: see `pruning`.
    """

    num_frames: Sequence[int]
    """T_s of every segment, 1 or more"""
    labels: Sequence[Tensor]
    """int64 [U_s] of every segment, in 1 .. V - 1, on the joint network's device"""
    first_state: Sequence[Tensor] | None = None
    """int64 [T_s] of every segment, on that device; None: every frame sees all U_s + 1 states"""
    widths: Sequence[int] | None = None
    """states of every segment's bands, where there are bands"""

    def num_states(self, segment: int) -> int:
        return len(self.labels[segment]) + 1

    def width(self, segment: int) -> int:
        """States that every frame of a segment sees."""
        return self.num_states(segment) if self.widths is None else self.widths[segment]

    @property
    def cells(self) -> list[int]:
        """Cells of every segment: frames times the states that each sees."""
        return [frames * self.width(segment) for segment, frames in enumerate(self.num_frames)]


def check_labels(labels: Tensor, label_lengths: Tensor, vocab_size: int) -> None:
    """Refuse labels that no lattice can hold; `[N, U]` and `[N]`, on the CPU.

    Raises:
        UserError: a label is the blank or outside the vocabulary; naming it and its segment.
    """
    used = torch.arange(labels.shape[1]) < label_lengths[:, None]
    wrong = (used & ((labels <= BLANK) | (labels >= vocab_size))).nonzero()
    if len(wrong):
        segment, position = wrong[0].tolist()
        raise UserError(
            f"label {int(labels[segment, position])} at position {position} of segment {segment}: the vocabulary has "
            f"labels 1 to {vocab_size - 1}, and 0 is the blank; use the tokenizer that the model was made for"
        )
