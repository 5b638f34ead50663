"""Beam search of a transducer: time-synchronous, many sequences at once, in one go or chunk by chunk.

All hypotheses are at the same frame. There, each either takes its blank, and waits for the others, or is extended by
every label, and goes on; after every such round, the likeliest of all of them together stay. The frame ends when none
goes on. Hypotheses of equal labels that wait at the same frame are one: their probabilities add up. With a beam that
holds all of them, a score is the sum over all alignments.

Scores may take in what an external language model and hot words say (`Fusion`).

Source: Graves 2012, arXiv 1211.3711; time-synchronous: Saon et al., "Alignment-Length Synchronous Decoding for RNN
Transducer", ICASSP 2020, section 2.

N sequences, W hypotheses of a beam, T encoder frames, J joint width, V vocabulary. Hypothesis w of sequence n is row
n * W + w where both are one axis.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.sequences import Hypothesis, Interned, Labels, ranked
from bestrq.decoding.tokens import BLANK, TimedTokens
from bestrq.decoding.transducer_search import PredictionState, Transducer, check_search
from common.errors import UserError


@dataclass(frozen=True, eq=False, slots=True)
class _Path:
    """A way on which labels were found: the last label's frame and probability, and the way before. Hypotheses share
    their past."""

    labels: Labels
    frame: int
    probability: float
    before: "_Path | None"

    def tokens(self) -> TimedTokens:
        ids: list[int] = []
        frames: list[int] = []
        confidence: list[float] = []
        at = self
        while at.before is not None:
            ids.append(at.labels.label)
            frames.append(at.frame)
            confidence.append(at.probability)
            at = at.before
        return TimedTokens(ids[::-1], frames[::-1], frames[::-1], confidence[::-1])


@dataclass(frozen=True)
class BeamState:
    """What a search has found, and what it needs to go on with the next chunk."""

    prediction: PredictionState
    """the prediction network's state of every hypothesis, N * W rows"""
    predicted: Tensor
    """[N * W, J]: what it said last"""
    scores: Tensor
    """float64 [N, W], falling; minus infinity where there is no hypothesis"""
    num_frames: list[int]
    """encoder frames of every sequence so far"""
    paths: list[_Path | None] = field(repr=False)
    """of N * W rows; None where there is no hypothesis"""
    interned: Interned = field(repr=False)
    """shared by all states of a search"""

    def hypotheses(self, sequence: int) -> list[Hypothesis]:
        """Those of a sequence, best first: W of them, or fewer where others became one or none were possible.

        As if it ended here: what a hypothesis was given for a hot word that it has only begun is taken back.
        """
        scores = self.scores[sequence].tolist()
        paths = self.paths[sequence * len(scores) : (sequence + 1) * len(scores)]
        return ranked(
            [
                Hypothesis(path.tokens(), score - self.interned.unfinished(path.labels))
                for path, score in zip(paths, scores, strict=True)
                if path
            ]
        )


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
    """The `width` likeliest label sequences of every recording.

    A label adds its log p and what `fusion` gives to a score, the blank its log p. A width of 1 is greedy search.

    Args:
        model: in evaluation mode, on the device of `encoded`.
        encoded: `[N, T, J]`, what `model.encode` gives of these frames.
        lengths: int64 `[N]` frames; what lies beyond is ignored.
        width: hypotheses W.
        max_symbols: labels that a frame may emit.
        fusion: language model, bonus, hot words.
        state: what the call for the frames before has returned, of the same width and fusion; it stays as it is.

    Raises:
        UserError: `width` or `max_symbols` is below 1.
        ValueError: lengths that do not fit, or a state of another shape or fusion.
    """
    check_search(encoded, lengths, max_symbols)
    if width < 1:
        raise UserError(f"decoder.beam is {width}: give 1 or more hypotheses")
    state = _start(model, encoded, width, fusion) if state is None else state
    if state.scores.shape != (len(encoded), width):
        raise ValueError(f"the state is of {tuple(state.scores.shape)} hypotheses, here are {(len(encoded), width)}")
    if state.interned.fusion is not fusion:
        raise ValueError("the state is that of a search with another fusion")
    ends = lengths.tolist()
    for frame in range(max(ends, default=0)):
        running = [frame < end for end in ends]
        rows = [row for row, path in enumerate(state.paths) if path and running[row // width]]
        for labels_left in range(max_symbols, -1, -1):
            if rows:
                scores, chosen = _prune(model, encoded[:, frame], state, rows, labels_left > 0)
                state, rows = _follow(model, state, scores, chosen)
        state = replace(state, num_frames=[n + ran for n, ran in zip(state.num_frames, running, strict=True)])
    return state


def _start(model: Transducer, encoded: Tensor, width: int, fusion: Fusion | None) -> BeamState:
    """One hypothesis a sequence: no labels."""
    num_sequences, device = len(encoded), encoded.device
    blanks = torch.full((num_sequences * width,), BLANK, device=device)
    predicted, prediction = model.predict(blanks, model.start(num_sequences * width))
    # In float64: over an hour, a score grows to where the steps of float32 are those between hypotheses.
    scores = torch.full((num_sequences, width), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0
    interned = Interned(fusion)
    paths = [_Path(interned.empty, 0, 1.0, None), *[None] * (width - 1)] * num_sequences
    return BeamState(prediction, predicted, scores, [0] * num_sequences, paths, interned)


def _prune(
    model: Transducer, frames: Tensor, state: BeamState, rows: list[int], may_emit: bool
) -> tuple[Tensor, Tensor]:
    """The likeliest of: hypotheses that wait, and those in `rows`, which take the blank or, if they may, a label.

    Args:
        frames: `[N, J]`.

    Returns:
        scores: float64 `[N, W]`, falling.
        chosen: float64 `[N, W, 2]`: w * V + output for hypothesis w of a sequence, -1 where there is nothing to choose;
            and the probability that the model gives the output, where it is a label.
    """
    num_sequences, width = state.scores.shape
    device = state.scores.device
    before = state.scores.flatten()
    active = torch.tensor(rows, device=device)
    log_probs = model.joint(frames[active // width], state.predicted[active]).double()
    gained = log_probs
    fusion = state.interned.fusion
    if may_emit and fusion:
        contexts = [path.labels.context for path in (state.paths[row] for row in rows) if path]
        gained = gained + fusion.gains(contexts).to(device)
    candidates = before.new_full((len(before), model.vocab_size), -torch.inf)
    candidates[:, BLANK] = before
    outputs = slice(None) if may_emit else slice(BLANK, BLANK + 1)
    candidates[active, outputs] = before[active, None] + gained[:, outputs]
    # Before pruning, so that no sequence takes two places; behind a label there is nothing to merge: what goes on had
    # different labels when the frame began, and has as many more.
    numbers = torch.tensor([path.labels.number if path else 0 for path in state.paths], device=device)
    waiting = candidates[:, BLANK].view(num_sequences, width)
    candidates[:, BLANK] = _merge(waiting, numbers.view(num_sequences, width)).flatten()
    scores, chosen = candidates.view(num_sequences, -1).topk(width)
    # Of a row that waits only the blank can be chosen, whose probability is not asked for.
    place = torch.zeros_like(numbers).index_copy(0, active, torch.arange(len(active), device=device))
    source = chosen // model.vocab_size + width * torch.arange(num_sequences, device=device)[:, None]
    probability = log_probs[place[source], chosen % model.vocab_size].exp()
    return scores, torch.stack((chosen.masked_fill(scores == -torch.inf, -1).double(), probability), dim=-1)


def _merge(scores: Tensor, numbers: Tensor) -> Tensor:
    """Scores `[N, W]` with those of equal numbers added up, as probabilities, at the place of the likeliest."""
    equal = numbers[:, :, None] == numbers[:, None, :]
    groups = scores[:, None, :].masked_fill(~equal, -torch.inf)
    is_likeliest = groups.argmax(dim=2) == torch.arange(scores.shape[1], device=scores.device)
    return groups.logsumexp(dim=2).masked_fill(~is_likeliest, -torch.inf)


def _follow(model: Transducer, state: BeamState, scores: Tensor, chosen: Tensor) -> tuple[BeamState, list[int]]:
    """The state of what was chosen, and the rows that have a new label and so go on."""
    width = scores.shape[1]
    source, rows, labels = [], [], []
    paths: list[_Path | None] = []
    # The one transfer of a round.
    for row, (choice, probability) in enumerate(chosen.flatten(0, 1).tolist()):
        place, output = divmod(int(max(choice, 0)), model.vocab_size)
        sequence = row // width
        source.append(sequence * width + place)
        path = state.paths[source[-1]] if choice >= 0 else None
        if path and output != BLANK:
            path = _Path(state.interned.extended(path.labels, output), state.num_frames[sequence], probability, path)
            rows.append(row)
            labels.append(output)
        paths.append(path)
    prediction, predicted = state.prediction, state.predicted
    if source != list(range(len(source))):
        index = torch.tensor(source, device=scores.device)
        prediction, predicted = tuple(part[index] for part in prediction), predicted[index]
    if rows:
        index = torch.tensor(rows, device=scores.device)
        label = torch.tensor(labels, device=scores.device)
        one, after = model.predict(label, tuple(part[index] for part in prediction))
        predicted = predicted.index_copy(0, index, one)
        prediction = tuple(part.index_copy(0, index, new) for part, new in zip(prediction, after, strict=True))
    return replace(state, prediction=prediction, predicted=predicted, scores=scores, paths=paths), rows
