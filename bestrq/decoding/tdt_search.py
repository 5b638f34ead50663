"""Greedy search of a token-and-duration transducer (TDT), for a batch of sequences, in one pass or chunk by chunk.

At a frame the most probable token and the most probable duration are taken: the sequence advances by the duration and
skips the frames in between. A blank of duration 0, which training forbids, advances by 1 frame, and so does a label of
duration 0 that reaches the limit of labels per frame. Sequences advance independently; a step is one arc of each.

Source: Xu et al. 2023, arXiv 2304.06795, section 3.4.

N sequences, T encoder frames, J joint width, V vocabulary, D durations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from bestrq.decoding.transducer_search import (
    GreedyState,
    Transducer,
    append_tokens,
    check_search,
    indices_of,
    predict_rows,
    start_greedy,
    transfer_indices,
)
from common.errors import UserError


def check_durations(durations: Sequence[int]) -> None:
    """Raise UserError unless durations increase and start with 0 and 1.

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
    state: GreedyState | None = None,
) -> GreedyState:  # fmt: skip
    """Greedy search: the most probable tokens, in steps of the most probable durations.

    Args:
        model: in evaluation mode, on the device of `encoded`; its joint network returns V token outputs followed by D
            duration outputs, as logits or log-probabilities.
        encoded: `[N, T, J]`, frames from `model.encode`.
        lengths: int64 `[N]`, number of valid frames.
        durations: frames of each duration output, as in training.
        max_symbols: maximum number of labels per frame.
        state: result for the previous chunk; not modified.

    Raises:
        UserError: `max_symbols` is below 1, or the durations are invalid.
        ValueError: `lengths` or the state do not match `encoded`.
    """
    lengths = lengths.cpu()
    check_search(encoded, lengths, max_symbols)
    check_durations(durations)
    state = start_greedy(model, encoded, state)
    prediction, predicted = state.prediction, state.predicted
    num_frames = state.num_frames + lengths
    lengths, frames = lengths.to(encoded.device), torch.tensor(durations, device=encoded.device)
    frame = state.skipped.clone()  # current frame of each sequence
    symbols = torch.zeros_like(lengths)  # labels that this frame has emitted
    rows = (frame < lengths).nonzero().squeeze(1)
    steps: list[tuple[Tensor, ...]] = []
    while len(rows):
        here = frame[rows]
        outputs = model.joint(encoded[rows, here], predicted[rows])
        tokens, duration_outputs = outputs.split((outputs.shape[-1] - len(durations), len(durations)), dim=-1)
        label, duration = tokens.argmax(dim=-1), frames[duration_outputs.argmax(dim=-1)]
        emits, count = label != BLANK, symbols[rows] + 1
        stays = emits & (duration == 0) & (count < max_symbols)
        frame[rows] = here + duration.clamp(min=1).masked_fill(stays, 0)
        symbols[rows] = count.masked_fill(~stays, 0)
        # The only transfer of a step to the host: the shapes of all later tensors follow from it.
        flags = torch.stack((emits, frame[rows] < lengths[rows])).tolist()
        emitting, continuing = transfer_indices(rows.device, *map(indices_of, flags))
        if len(emitting):
            label, last = label[emitting], here + duration.clamp(min=1) - 1
            probability = tokens.softmax(dim=-1)[emitting].amax(dim=-1)
            steps.append((rows[emitting], label, here[emitting], last[emitting], probability))
            prediction, predicted = predict_rows(model, label, rows[emitting], prediction, predicted)
        rows = rows[continuing]
    return GreedyState(prediction, predicted, num_frames, frame - lengths, append_tokens(state, steps))
