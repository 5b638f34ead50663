"""Greedy search of a transducer, many sequences at once, in one go or chunk by chunk.

At a frame, the likeliest output is taken: a label is emitted and the frame looked at again, behind that label; the
blank goes on to the next frame, and so does a frame that has emitted as many labels as it may.

Nothing is said about whose turn it is: the sequences need not be at the same frame. As the prediction network changes
with labels only, a sequence looks at a block of frames at once and goes straight to the first one that has a label.
There are as many steps as labels in the sequence with the most, about, rather than as frames and labels.

Source: Graves 2012, arXiv 1211.3711; looping over labels: Bataev et al. 2024, "Label-looping", arXiv 2406.06220.

N sequences, T encoder frames, J joint width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK, TimedTokens
from common.errors import UserError

BLOCK = 4
"""frames that a sequence looks at in a step"""


PredictionState = tuple[Tensor, ...]
"""State of a prediction network: tensors with sequences along their first axis, so that a search can select, repeat
and reorder hypotheses of any network"""


class Transducer(Protocol):
    """What a search needs of a model; `TransducerModel` is one."""

    @property
    def vocab_size(self) -> int:
        """Outputs V of the joint network, the blank (0) included."""

    def start(self, num_sequences: int) -> PredictionState:
        """The prediction network's state before the first `predict`, sequences along axis 0 of every tensor."""

    def predict(self, label: Tensor, state: PredictionState) -> tuple[Tensor, PredictionState]:
        """What the joint network adds after one more label each, int64 `[N]`: `[N, J]`; and the state after it."""

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Log-probabilities `[..., V]` of frames and states `[..., J]`, which are broadcast."""


@dataclass(frozen=True)
class GreedyState:
    """What a search has found, and what it needs to go on with the next chunk."""

    prediction: PredictionState
    """the prediction network's state of every sequence"""
    predicted: Tensor
    """[N, J]: what it said last"""
    num_frames: Tensor
    """int64 [N]: encoder frames so far, on the model's device"""
    found: list[TimedTokens]
    """of every sequence"""

    def tokens(self, sequence: int) -> TimedTokens:
        """The tokens of a sequence; `first_frame` and `last_frame` are the frame that emitted one, over all chunks."""
        return self.found[sequence]


def check_search(encoded: Tensor, lengths: Tensor, max_symbols: int) -> None:
    """Refuse what no search can work on.

    Raises:
        UserError: `max_symbols` is below 1.
        ValueError: there is not one length for each sequence, or one lies outside its frames.
    """
    if max_symbols < 1:
        raise UserError(f"decoder.max_symbols is {max_symbols}: give 1 or more labels that a frame may emit")
    if lengths.shape != encoded.shape[:1] or not ((lengths >= 0) & (lengths <= encoded.shape[1])).all():
        raise ValueError(f"lengths {lengths.tolist()} do not fit {encoded.shape[0]} sequences of {encoded.shape[1]}")


@torch.no_grad()
def greedy_search(
    model: Transducer, encoded: Tensor, lengths: Tensor, max_symbols: int, state: GreedyState | None = None
) -> GreedyState:
    """The labels of the likeliest output, frame after frame.

    Args:
        model: in evaluation mode, on the device of `encoded`.
        encoded: `[N, T, J]`, what `model.encode` gives of these frames.
        lengths: int64 `[N]` frames; what lies beyond is ignored.
        max_symbols: labels that a frame may emit.
        state: what the call for the frames before has returned; it stays as it is.

    Raises:
        UserError, ValueError: see `check_search`; or the state is one of another number of sequences.
    """
    check_search(encoded, lengths, max_symbols)
    state = _start(model, encoded) if state is None else state
    if len(state.found) != len(encoded):
        raise ValueError(f"the state is one of {len(state.found)} sequences, here are {len(encoded)}")
    prediction, predicted = state.prediction, state.predicted
    lengths = lengths.to(encoded.device)
    block = torch.arange(BLOCK, device=encoded.device)
    frame = torch.zeros_like(lengths)  # that the sequence is at
    symbols = torch.zeros_like(lengths)  # that this frame has emitted
    rows = lengths.nonzero().squeeze(1)
    emissions: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    while len(rows):
        ahead = frame[rows, None] + block
        # Indices beyond the end are looked at for nothing, but must exist.
        frames = encoded[rows[:, None], ahead.clamp(max=encoded.shape[1] - 1)]
        log_probs, best = model.joint(frames, predicted[rows, None]).max(dim=-1)
        labelled = (best != BLANK) & (ahead < lengths[rows, None])
        emits, first = labelled.max(dim=1)
        here = frame[rows] + torch.where(emits, first, BLOCK)
        # A label more of the frame that it was at, or the first one of another.
        count = torch.where(first == 0, symbols[rows], 0) + 1
        full = emits & (count == max_symbols)
        frame[rows] = here + full
        symbols[rows] = torch.where(emits & ~full, count, 0)
        # The one transfer of a step: everything behind it has a shape that is known.
        emits_here, goes_on = torch.stack((emits, frame[rows] < lengths[rows])).cpu()
        if emits_here.any():
            emitting = rows[emits_here]
            label, log_prob = (part.gather(1, first[:, None]).squeeze(1)[emits_here] for part in (best, log_probs))
            emissions.append((emitting, label, here[emits_here], log_prob))
            one, after = model.predict(label, tuple(part[emitting] for part in prediction))
            predicted = predicted.index_copy(0, emitting, one)
            prediction = tuple(part.index_copy(0, emitting, new) for part, new in zip(prediction, after, strict=True))
        rows = rows[goes_on]
    found = _append(state, emissions)
    return GreedyState(prediction, predicted, state.num_frames + lengths, found)


def _start(model: Transducer, encoded: Tensor) -> GreedyState:
    nothing = torch.zeros(len(encoded), dtype=torch.int64, device=encoded.device)
    predicted, prediction = model.predict(nothing + BLANK, model.start(len(encoded)))
    return GreedyState(prediction, predicted, nothing, [TimedTokens([], [], []) for _ in encoded])


def _append(state: GreedyState, emissions: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[TimedTokens]:
    """Tokens found before and after; emissions are rows, labels, frames and log-probabilities of a step each, in the
    order of steps."""
    found = [TimedTokens(one.ids[:], one.first_frame[:], one.last_frame[:], one.confidence[:]) for one in state.found]
    if emissions:
        rows, labels, places, log_probs = (torch.cat(parts) for parts in zip(*emissions, strict=True))
        places = places + state.num_frames[rows]
        entries = torch.stack((rows, labels, places)).tolist()
        for row, label, place, probability in zip(*entries, log_probs.exp().tolist(), strict=True):
            found[row].ids.append(label)
            found[row].first_frame.append(place)
            found[row].last_frame.append(place)
            found[row].confidence.append(probability)
    return found
