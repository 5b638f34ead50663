"""Beam search of a transducer: time-synchronous, for a batch of sequences, in one pass or chunk by chunk.

All hypotheses of a sequence are at the same frame. In each round, every active hypothesis is extended by the blank, and
then waits for the others, or by a label, and then stays active; pruning keeps the most probable of all hypotheses. The
frame ends when none is active. Waiting hypotheses with equal labels are merged: their probabilities add up. With an
unlimited beam, a score is the sum over all alignments.

Scores may include an external language model, a length bonus and hot words (`Fusion`).

The labels of hypotheses are kept on the host, everything else on the device. A round has one transfer to the host, the
chosen outputs, and one back, all indices (`transfer_indices`); fusion adds one, of its scores. For this, the device
follows the choice of a round (`_Choice`) at the start of the next one.

Source: Graves 2012, arXiv 1211.3711; time-synchronous: Saon et al., "Alignment-Length Synchronous Decoding for RNN
Transducer", ICASSP 2020, section 2.

N sequences, W beam width, T encoder frames, J joint width, V vocabulary. In tensors with N * W rows, hypothesis w of
sequence n is row n * W + w.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hypotheses import Hypothesis, LabelSequence, SequenceTable, sort_hypotheses
from bestrq.decoding.tokens import BLANK, TimedTokens
from bestrq.decoding.transducer_search import (
    PredictionState,
    Transducer,
    check_search,
    predict_rows,
    transfer_indices,
)
from common.errors import UserError


@dataclass(frozen=True, eq=False, slots=True)
class _Path:
    """Alignment of a hypothesis: frame and probability of its last label, and the path before, which is shared."""

    labels: LabelSequence
    frame: int
    probability: float
    before: "_Path | None"

    def tokens(self) -> TimedTokens:
        ids: list[int] = []
        frames: list[int] = []
        confidence: list[float] = []
        path = self
        while path.before is not None:
            ids.append(path.labels.label)
            frames.append(path.frame)
            confidence.append(path.probability)
            path = path.before
        return TimedTokens(ids[::-1], frames[::-1], frames[::-1], confidence[::-1])


@dataclass(frozen=True)
class BeamState:
    """Hypotheses of a beam search so far, and its state, from which the next chunk continues."""

    prediction: PredictionState
    """state of the prediction network of each hypothesis, N * W rows"""
    predicted: Tensor
    """last output of the prediction network, [N * W, J]"""
    scores: Tensor
    """float64 [N, W], descending; minus infinity for unused places"""
    num_frames: list[int]
    """encoder frames of each sequence so far"""
    paths: list[_Path | None] = field(repr=False)
    """N * W rows; None for unused places"""
    sequences: SequenceTable = field(repr=False)
    """shared by all states of a search"""

    def hypotheses(self, sequence: int) -> list[Hypothesis]:
        """Hypotheses of a sequence, best first: W, or fewer if others were merged or are impossible.

        The sequence is taken to end here: scores of incomplete hot words are subtracted.
        """
        scores = self.scores[sequence].tolist()
        paths = self.paths[sequence * len(scores) : (sequence + 1) * len(scores)]
        return sort_hypotheses(
            [
                Hypothesis(path.tokens(), score - self.sequences.partial_match(path.labels))
                for path, score in zip(paths, scores, strict=True)
                if path
            ]
        )


@dataclass(frozen=True)
class _Choice:
    """Hypotheses chosen in a round, which the prediction network has yet to follow."""

    source: list[int]
    """row that each of the N * W rows continues"""
    rows: list[int]
    """rows that got a label, which stay active"""
    labels: list[int]
    """their labels"""


@torch.no_grad()
def beam_search(
    model: Transducer,
    encoded: Tensor,
    lengths: Tensor,
    width: int,
    max_symbols: int,
    fusion: Fusion | None = None,
    state: BeamState | None = None,
) -> BeamState:
    """Beam search: the most probable label sequences of each recording.

    A label adds its log p and its `fusion` score, the blank its log p. A width of 1 is greedy search.

    Args:
        model: in evaluation mode, on the device of `encoded`.
        encoded: `[N, T, J]`, frames from `model.encode`.
        lengths: int64 `[N]`, number of valid frames.
        width: beam width W.
        max_symbols: maximum number of labels per frame.
        fusion: language model, length bonus, hot words.
        state: result for the previous chunk, with the same width and fusion; not modified.

    Raises:
        UserError: `width` or `max_symbols` is below 1.
        ValueError: `lengths` do not match `encoded`, or the state has another shape or fusion.
    """
    lengths = lengths.cpu()
    check_search(encoded, lengths, max_symbols)
    if width < 1:
        raise UserError(f"decoder.beam is {width}: give 1 or more hypotheses")
    state = _start(model, encoded, width, fusion) if state is None else state
    if state.scores.shape != (len(encoded), width):
        raise ValueError(
            f"the state has {tuple(state.scores.shape)} sequences and hypotheses, the input {(len(encoded), width)}"
        )
    if state.sequences.fusion is not fusion:
        raise ValueError("the state belongs to a search with another fusion")
    ends = lengths.tolist()
    choice = _Choice(list(range(len(state.paths))), [], [])
    for frame in range(max(ends, default=0)):
        is_running = [frame < end for end in ends]
        rows = [row for row, path in enumerate(state.paths) if path and is_running[row // width]]
        for labels_left in range(max_symbols, -1, -1):
            if rows:
                state, active, numbers = _follow(model, state, choice, rows)
                scores, chosen = _prune(model, encoded[:, frame], state, rows, active, numbers, labels_left > 0)
                state, choice = _choose(state, scores, chosen, model.vocab_size)
                rows = choice.rows
        state = replace(state, num_frames=[n + ran for n, ran in zip(state.num_frames, is_running, strict=True)])
    return _follow(model, state, choice, [])[0]


def _start(model: Transducer, encoded: Tensor, width: int, fusion: Fusion | None) -> BeamState:
    """One hypothesis without labels per sequence."""
    num_sequences, device = len(encoded), encoded.device
    blanks = torch.full((num_sequences * width,), BLANK, device=device)
    predicted, prediction = model.predict(blanks, model.start(num_sequences * width))
    # float64, because over an hour a score becomes so large that float32 no longer resolves hypotheses.
    scores = torch.full((num_sequences, width), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0
    sequences = SequenceTable(fusion)
    paths = [_Path(sequences.empty, 0, 1.0, None), *[None] * (width - 1)] * num_sequences
    return BeamState(prediction, predicted, scores, [0] * num_sequences, paths, sequences)


def _follow(
    model: Transducer, state: BeamState, choice: _Choice, active: list[int]
) -> tuple[BeamState, Tensor, Tensor]:
    """Advance the prediction network by the last choice, and transfer all indices of a round to the device.

    Returns:
        the state; the indices of the active hypotheses, int64; and numbers that are equal for equal labels, int64
        `[N * W]`.
    """
    numbers = [path.labels.number if path else 0 for path in state.paths]
    source, rows, label, active_index, number = transfer_indices(
        state.scores.device, choice.source, choice.rows, choice.labels, active, numbers
    )
    prediction, predicted = state.prediction, state.predicted
    if choice.source != list(range(len(choice.source))):
        prediction, predicted = tuple(part[source] for part in prediction), predicted[source]
    if choice.rows:
        prediction, predicted = predict_rows(model, label, rows, prediction, predicted)
    return replace(state, prediction=prediction, predicted=predicted), active_index, number


def _prune(
    model: Transducer,
    frames: Tensor,
    state: BeamState,
    rows: list[int],
    active: Tensor,
    numbers: Tensor,
    may_emit: bool,
) -> tuple[Tensor, Tensor]:
    """Select the best of the waiting hypotheses and of the extensions of the active ones.

    Args:
        frames: `[N, J]`.
        rows, active: active hypotheses, on the host and on the device.
        numbers: equal for equal labels, int64 `[N * W]`.
        may_emit: whether labels are allowed, besides the blank.

    Returns:
        scores: float64 `[N, W]`, descending.
        chosen: float64 `[N, W, 2]`: w * V + output for hypothesis w of a sequence, -1 for unused places; and the model
            probability of the output, if it is a label.
    """
    num_sequences, width = state.scores.shape
    device = state.scores.device
    before = state.scores.flatten()
    log_probs = model.joint(frames[active // width], state.predicted[active]).double()
    increments = log_probs
    fusion = state.sequences.fusion
    if may_emit and fusion:
        contexts = [path.labels.context for path in (state.paths[row] for row in rows) if path]
        increments = increments + fusion.scores(contexts).to(device, non_blocking=True)
    candidates = before.new_full((len(before), model.vocab_size), -torch.inf)
    candidates[:, BLANK] = before
    outputs = slice(None) if may_emit else slice(BLANK, BLANK + 1)
    candidates[active, outputs] = before[active, None] + increments[:, outputs]
    # Merge before pruning, so that no sequence takes two places. Active extensions need no merging: they have the same
    # number of new labels, after sequences that differed at the start of the frame.
    waiting = candidates[:, BLANK].view(num_sequences, width)
    candidates[:, BLANK] = _merge(waiting, numbers.view(num_sequences, width)).flatten()
    scores, chosen = candidates.view(num_sequences, -1).topk(width)
    # A waiting row can only be chosen with the blank, whose probability is unused.
    active_index = torch.zeros_like(numbers).index_copy(0, active, torch.arange(len(active), device=device))
    source = chosen // model.vocab_size + width * torch.arange(num_sequences, device=device)[:, None]
    probability = log_probs[active_index[source], chosen % model.vocab_size].exp()
    return scores, torch.stack((chosen.masked_fill(scores == -torch.inf, -1).double(), probability), dim=-1)


def _merge(scores: Tensor, numbers: Tensor) -> Tensor:
    """Add up the probabilities of scores `[N, W]` with equal numbers, at the place of the most probable one."""
    is_equal = numbers[:, :, None] == numbers[:, None, :]
    groups = scores[:, None, :].masked_fill(~is_equal, -torch.inf)
    is_best = groups.argmax(dim=2) == torch.arange(scores.shape[1], device=scores.device)
    return groups.logsumexp(dim=2).masked_fill(~is_best, -torch.inf)


def _choose(state: BeamState, scores: Tensor, chosen: Tensor, vocab_size: int) -> tuple[BeamState, _Choice]:
    """Return the state with the labels of the chosen outputs, and the choice. Arguments: see `_prune`."""
    width = scores.shape[1]
    choice = _Choice([], [], [])
    paths: list[_Path | None] = []
    # The only transfer of a round to the host.
    for row, (number, probability) in enumerate(chosen.flatten(0, 1).tolist()):
        hypothesis, output = divmod(int(max(number, 0)), vocab_size)
        sequence = row // width
        source = sequence * width + hypothesis
        path = state.paths[source] if number >= 0 else None
        if path and output != BLANK:
            path = _Path(state.sequences.extend(path.labels, output), state.num_frames[sequence], probability, path)
            choice.rows.append(row)
            choice.labels.append(output)
        choice.source.append(source)
        paths.append(path)
    return replace(state, scores=scores, paths=paths), choice
