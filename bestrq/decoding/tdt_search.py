"""Greedy search of a token-and-duration transducer, many sequences at once, in one go or chunk by chunk.

At a frame the likeliest token and the likeliest duration are taken: the sequence goes on by as many frames, none of
which is looked at. A blank of duration 0, which training forbids, takes 1 frame, and so does a label of duration 0
that is the last a frame may emit. Sequences need not be at the same frame; a step is one arc of each.

Source: Xu et al. 2023, arXiv 2304.06795, section 3.4.

N sequences, T encoder frames, J joint width, V vocabulary, D durations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK, TimedTokens
from bestrq.decoding.transducer_search import PredictionState, Transducer, check_search
from common.errors import UserError


@dataclass(frozen=True)
class TDTState:
    """What a search has found, and what it needs to go on with the next chunk."""

    prediction: PredictionState
    """the prediction network's state of every sequence"""
    predicted: Tensor
    """[N, J]: what it said last"""
    num_frames: Tensor
    """int64 [N]: encoder frames so far, on the model's device"""
    ahead: Tensor
    """int64 [N]: frames of the next chunk that the last duration passes over"""
    found: list[TimedTokens]
    """of every sequence; a token's frames are those of its duration, which may reach beyond the frames so far"""

    def tokens(self, sequence: int) -> TimedTokens:
        """The tokens of a sequence, from the frame that emitted one to the last of its duration (of 0: the same), and
        no further than the frames so far."""
        tokens, last = self.found[sequence], int(self.num_frames[sequence]) - 1
        return TimedTokens(
            tokens.ids, tokens.first_frame, [min(frame, last) for frame in tokens.last_frame], tokens.confidence
        )


def check_durations(durations: Sequence[int]) -> None:
    """Raise UserError unless durations increase from 0 and 1.

    With 0 and 1, every segment of one frame or more has an alignment: in a single frame, labels need the 0 and the
    last blank needs the 1.
    """
    increasing = all(before < after for before, after in zip(durations, durations[1:], strict=False))
    if not increasing or list(durations[:2]) != [0, 1]:
        raise UserError(
            f"transducer.durations is {list(durations)}: give increasing numbers of frames that start with 0 and 1, "
            "such as [0, 1, 2, 3, 4]; without 0 or without 1, a segment of one frame has no alignment"
        )


@torch.no_grad()
def tdt_greedy(
    model: Transducer, encoded: Tensor, lengths: Tensor, durations: Sequence[int], max_symbols: int,
    state: TDTState | None = None,
) -> TDTState:  # fmt: skip
    """The labels of the likeliest tokens, by steps of the likeliest durations.

    Args:
        model: in evaluation mode, on the device of `encoded`; its joint network gives V token outputs, then D for the
            durations, as logits or log-probabilities.
        encoded: `[N, T, J]`, what `model.encode` gives of these frames.
        lengths: int64 `[N]` frames; what lies beyond is ignored.
        durations: frames of every duration output, as in training.
        max_symbols: labels that a frame may emit.
        state: what the call for the frames before has returned; it stays as it is.

    Raises:
        UserError, ValueError: see `check_search` and `check_durations`; or the state is one of another number of
            sequences.
    """
    check_search(encoded, lengths, max_symbols)
    check_durations(durations)
    state = _start(model, encoded) if state is None else state
    if len(state.found) != len(encoded):
        raise ValueError(f"the state is one of {len(state.found)} sequences, here are {len(encoded)}")
    prediction, predicted = state.prediction, state.predicted
    lengths, frames = lengths.to(encoded.device), torch.tensor(durations, device=encoded.device)
    frame = state.ahead.clone()  # that the sequence is at
    symbols = torch.zeros_like(lengths)  # that this frame has emitted
    rows = (frame < lengths).nonzero().squeeze(1)
    emissions: list[tuple[Tensor, ...]] = []
    while len(rows):
        here = frame[rows]
        outputs = model.joint(encoded[rows, here], predicted[rows])
        tokens, lasts = outputs.split((outputs.shape[-1] - len(durations), len(durations)), dim=-1)
        label, duration = tokens.argmax(dim=-1), frames[lasts.argmax(dim=-1)]
        emits, count = label != BLANK, symbols[rows] + 1
        stays = emits & (duration == 0) & (count < max_symbols)
        frame[rows] = here + duration.clamp(min=1).masked_fill(stays, 0)
        symbols[rows] = count.masked_fill(~stays, 0)
        # The one transfer of a step: everything behind it has a shape that is known.
        emits_here, goes_on = torch.stack((emits, frame[rows] < lengths[rows])).cpu()
        if emits_here.any():
            emitting, label = rows[emits_here], label[emits_here]
            last = here + duration.clamp(min=1) - 1
            probability = tokens.softmax(dim=-1)[emits_here].amax(dim=-1)
            emissions.append((emitting, label, here[emits_here], last[emits_here], probability))
            one, after = model.predict(label, tuple(part[emitting] for part in prediction))
            predicted = predicted.index_copy(0, emitting, one)
            prediction = tuple(part.index_copy(0, emitting, new) for part, new in zip(prediction, after, strict=True))
        rows = rows[goes_on]
    return TDTState(prediction, predicted, state.num_frames + lengths, frame - lengths, _append(state, emissions))


def _start(model: Transducer, encoded: Tensor) -> TDTState:
    zeros = torch.zeros(len(encoded), dtype=torch.int64, device=encoded.device)
    predicted, prediction = model.predict(zeros + BLANK, model.start(len(encoded)))
    return TDTState(prediction, predicted, zeros, zeros, [TimedTokens([], [], []) for _ in encoded])


def _append(state: TDTState, emissions: list[tuple[Tensor, ...]]) -> list[TimedTokens]:
    """Tokens found before and after; emissions are rows, labels, both frames, probabilities of a step each."""
    found = [TimedTokens(one.ids[:], one.first_frame[:], one.last_frame[:], one.confidence[:]) for one in state.found]
    if emissions:
        rows, labels, first, last, probabilities = (torch.cat(parts) for parts in zip(*emissions, strict=True))
        before = state.num_frames[rows]
        entries = torch.stack((rows, labels, first + before, last + before)).tolist()
        for row, label, begin, end, probability in zip(*entries, probabilities.tolist(), strict=True):
            found[row].ids.append(label)
            found[row].first_frame.append(begin)
            found[row].last_frame.append(end)
            found[row].confidence.append(probability)
    return found
