"""Greedy search of a transducer, for a batch of sequences, in one pass or chunk by chunk.

At each frame the most probable output is taken. A label is emitted, and the same frame is evaluated again after that
label; the blank advances to the next frame, and so does the label that reaches the limit of labels per frame.

Sequences advance independently of each other. The prediction network's state changes with labels only, so each step
evaluates a block of frames per sequence and advances to the first one that has a label. The number of steps is thus
about the number of labels of the longest output, not the number of frames and labels.

Waits of the host would limit the speed on a GPU, so a step has one transfer to the host, the flags that later shapes
depend on, and one back, the indices that follow from them (`transfer_indices`).

Source: Graves 2012, arXiv 1211.3711; looping over labels: Bataev et al. 2024, "Label-looping", arXiv 2406.06220.

N sequences, T encoder frames, J joint width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK, TimedTokens
from common.errors import UserError

BLOCK = 4
"""frames per sequence that are evaluated in a step"""


PredictionState = tuple[Tensor, ...]
"""state of a prediction network: tensors with sequences along their first axis, so that a search can select, repeat
and reorder hypotheses of any network"""


class Transducer(Protocol):
    """Transducer model for a search, such as `TransducerModel`."""

    @property
    def vocab_size(self) -> int:
        """Outputs V of the joint network, the blank (0) included."""

    def start(self, num_sequences: int) -> PredictionState:
        """State of the prediction network before the first `predict`, with sequences along axis 0 of every tensor."""

    def predict(self, label: Tensor, state: PredictionState) -> tuple[Tensor, PredictionState]:
        """Prediction side of the joint network `[N, J]` after one more label per sequence, int64 `[N]`, and the new
        state."""

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Log-probabilities `[..., V]` of frames and states `[..., J]`, which are broadcast."""


@dataclass(frozen=True)
class GreedyState:
    """Output of a greedy search so far, and its state, from which the next chunk continues."""

    prediction: PredictionState
    """state of the prediction network of each sequence"""
    predicted: Tensor
    """last output of the prediction network, [N, J]"""
    num_frames: Tensor
    """int64 [N]: encoder frames so far, on the CPU"""
    skipped: Tensor
    """int64 [N]: frames of the next chunk that the last duration skips; 0 for a transducer without durations"""
    emitted: list[TimedTokens]
    """tokens of each sequence. Their frames are those of their duration, which may exceed the frames so far"""

    def tokens(self, sequence: int) -> TimedTokens:
        """Tokens of a sequence, with frames counted over all chunks.

        A token covers the frame that emitted it or, with durations, the frames from there to the end of its duration,
        limited to the frames so far.
        """
        tokens, last = self.emitted[sequence], int(self.num_frames[sequence]) - 1
        return TimedTokens(
            tokens.ids, tokens.first_frame, [min(frame, last) for frame in tokens.last_frame], tokens.confidence
        )


def check_search(encoded: Tensor, lengths: Tensor, max_symbols: int) -> None:
    """Validate the arguments of a search.

    Raises:
        UserError: `max_symbols` is below 1.
        ValueError: `lengths` does not have one length per sequence, or one is out of range.
    """
    if max_symbols < 1:
        raise UserError(f"decoder.max_symbols is {max_symbols}: give 1 or more labels per frame")
    if lengths.shape != encoded.shape[:1] or not ((lengths >= 0) & (lengths <= encoded.shape[1])).all():
        raise ValueError(f"lengths {lengths.tolist()} do not fit {encoded.shape[0]} sequences of {encoded.shape[1]}")


def start_greedy(model: Transducer, encoded: Tensor, state: GreedyState | None) -> GreedyState:
    """Return the state to continue from, or the state before the first chunk.

    Raises:
        ValueError: the state has another number of sequences.
    """
    if state is None:
        zeros = torch.zeros(len(encoded), dtype=torch.int64)
        on_device = torch.zeros_like(zeros, device=encoded.device)
        predicted, prediction = model.predict(on_device + BLANK, model.start(len(encoded)))
        return GreedyState(prediction, predicted, zeros, on_device, [TimedTokens([], [], []) for _ in encoded])
    if len(state.emitted) != len(encoded):
        raise ValueError(f"the state has {len(state.emitted)} sequences, the input {len(encoded)}")
    return state


def transfer_indices(device: torch.device, *indices: Sequence[int]) -> tuple[Tensor, ...]:
    """Move lists of indices to the device in one transfer, as int64 tensors.

    Indexing a CUDA tensor with a tensor of the CPU would move each of them alone, and the host would wait each time.
    """
    joined = torch.tensor([index for part in indices for index in part], dtype=torch.int64)
    return joined.to(device, non_blocking=True).split([len(part) for part in indices])


def indices_of(flags: Sequence[bool]) -> list[int]:
    """Indices of the flags that are set."""
    return [index for index, flag in enumerate(flags) if flag]


def append_tokens(state: GreedyState, steps: Sequence[tuple[Tensor, ...]]) -> list[TimedTokens]:
    """Return the tokens of `state.emitted` and those of a new chunk, with one transfer to the host.

    Args:
        steps: sequences, labels, first and last frames, probabilities, `[n]` each, in the order of emission; frames are
            relative to the chunk.
    """
    emitted = [
        TimedTokens(tokens.ids[:], tokens.first_frame[:], tokens.last_frame[:], tokens.confidence[:])
        for tokens in state.emitted
    ]
    if not steps:
        return emitted
    # float64 is exact for all fields: integers are below 2^53.
    fields = torch.stack([torch.cat(parts).double() for parts in zip(*steps, strict=True)]).cpu()
    entries = fields[:4].long().tolist()
    offsets = state.num_frames.tolist()
    for row, label, first, last, probability in zip(*entries, fields[4].tolist(), strict=True):
        emitted[row].ids.append(label)
        emitted[row].first_frame.append(first + offsets[row])
        emitted[row].last_frame.append(last + offsets[row])
        emitted[row].confidence.append(probability)
    return emitted


def predict_rows(
    model: Transducer, label: Tensor, rows: Tensor, prediction: PredictionState, predicted: Tensor
) -> tuple[PredictionState, Tensor]:
    """Advance the prediction network of some sequences by one label each.

    Args:
        label: int64 `[n]`.
        rows: int64 `[n]`, sequences to advance.

    Returns:
        the new `prediction` and `predicted` of all sequences.
    """
    row_predicted, row_state = model.predict(label, tuple(part[rows] for part in prediction))
    parts = zip(prediction, row_state, strict=True)
    prediction = tuple(part.index_copy(0, rows, row_part) for part, row_part in parts)
    return prediction, predicted.index_copy(0, rows, row_predicted)


@torch.no_grad()
def greedy_search(
    model: Transducer, encoded: Tensor, lengths: Tensor, max_symbols: int, state: GreedyState | None = None
) -> GreedyState:
    """Greedy search: the labels of the most probable output, frame by frame.

    Args:
        model: in evaluation mode, on the device of `encoded`.
        encoded: `[N, T, J]`, frames from `model.encode`.
        lengths: int64 `[N]`, number of valid frames.
        max_symbols: maximum number of labels per frame.
        state: result for the previous chunk; not modified.

    Raises:
        UserError: `max_symbols` is below 1.
        ValueError: `lengths` or the state do not match `encoded`.
    """
    lengths = lengths.cpu()
    check_search(encoded, lengths, max_symbols)
    state = start_greedy(model, encoded, state)
    prediction, predicted = state.prediction, state.predicted
    num_frames = state.num_frames + lengths
    lengths, rows = lengths.to(encoded.device), lengths.nonzero().squeeze(1).to(encoded.device)
    block = torch.arange(BLOCK, device=encoded.device)
    frame = torch.zeros_like(lengths)  # current frame of each sequence
    symbols = torch.zeros_like(lengths)  # labels that this frame has emitted
    steps: list[tuple[Tensor, ...]] = []
    while len(rows):
        block_frames = frame[rows, None] + block
        # Frames beyond the end are masked out below, but their indices must be valid.
        frames = encoded[rows[:, None], block_frames.clamp(max=encoded.shape[1] - 1)]
        log_probs, best = model.joint(frames, predicted[rows, None]).max(dim=-1)
        has_label = (best != BLANK) & (block_frames < lengths[rows, None])
        emits, first = has_label.max(dim=1)
        here = frame[rows] + torch.where(emits, first, BLOCK)
        # One more label of the current frame, or the first label of another frame.
        count = torch.where(first == 0, symbols[rows], 0) + 1
        is_full = emits & (count == max_symbols)
        frame[rows] = here + is_full
        symbols[rows] = torch.where(emits & ~is_full, count, 0)
        # The only transfer of a step to the host: the shapes of all later tensors follow from it.
        flags = torch.stack((emits, frame[rows] < lengths[rows])).tolist()
        emitting, continuing = transfer_indices(rows.device, *map(indices_of, flags))
        if len(emitting):
            label, log_prob = (part.gather(1, first[:, None]).squeeze(1)[emitting] for part in (best, log_probs))
            place, emitting = here[emitting], rows[emitting]
            steps.append((emitting, label, place, place, log_prob.exp()))
            prediction, predicted = predict_rows(model, label, emitting, prediction, predicted)
        rows = rows[continuing]
    return GreedyState(prediction, predicted, num_frames, state.skipped, append_tokens(state, steps))
