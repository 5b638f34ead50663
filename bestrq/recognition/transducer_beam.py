"""Beam search of a transducer: time-synchronous, many sequences at once, in one go or chunk by chunk.

All hypotheses are at the same frame. There, each either takes its blank, and waits for the others, or is extended by
every label, and goes on; after every such round, the likeliest of all of them together stay. The frame ends when none
goes on. Hypotheses of equal labels that wait at the same frame are one: their probabilities add up. With a beam that
holds all of them, a score is the sum over all alignments.

Scores may take an external language model in (shallow fusion).

Source: Graves 2012, arXiv 1211.3711; time-synchronous: Saon et al., "Alignment-Length Synchronous Decoding for RNN
Transducer", ICASSP 2020, section 2.

N sequences, W hypotheses of a beam, T encoder frames, J joint width, V vocabulary. Hypothesis w of sequence n is row
n * W + w where both are one axis.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bestrq.config import ConfigError
from bestrq.recognition.decoding import BLANK, TimedTokens
from bestrq.recognition.prediction import State
from bestrq.recognition.transducer_search import Transducer, check_search

# Contexts of which the language model's answer is kept: 16 MB at a vocabulary of 1024.
_LANGUAGE_MODEL_CACHE = 4096


class LanguageModel(Protocol):
    """What shallow fusion needs of a language model over the same labels."""

    @property
    def order(self) -> int:
        """Labels that it looks at, the one that it predicts included."""

    def log_probs(self, context: tuple[int, ...]) -> Tensor:
        """Natural log-probabilities of every label after a context, float32 `[V]` on the CPU; that of 0 is not used.

        context: the last `order - 1` labels; fewer where the sequence begins.
        """


@dataclass(frozen=True)
class Hypothesis:
    """What may have been said."""

    tokens: TimedTokens
    """`first_frame` and `last_frame` are the frame that emitted a token, over all chunks; of alignments that
    became one, the likelier's"""
    score: float
    """natural log-probability, with what language model and bonus have added"""


class _Labels:
    """A sequence of labels, as the last one and those before. Made by `_Interned` only: equal ones are the same."""

    __slots__ = ("before", "label", "number", "__weakref__")

    def __init__(self, before: "_Labels | None", label: int, number: int) -> None:
        self.before, self.label, self.number = before, label, number

    def last(self, count: int) -> tuple[int, ...]:
        """The last `count` labels, or fewer where there are no more."""
        labels: list[int] = []
        at = self
        while at.before is not None and len(labels) < count:
            labels.append(at.label)
            at = at.before
        return tuple(labels[::-1])


class _Interned:
    """Label sequences that some hypothesis begins with, each once; others are forgotten."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._known: WeakValueDictionary[tuple[int, int], _Labels] = WeakValueDictionary()
        self.empty = _Labels(None, BLANK, next(self._numbers))

    def extended(self, before: _Labels, label: int) -> _Labels:
        """The sequence with one more label. Its number is its own: equal numbers are equal sequences."""
        labels = self._known.get((before.number, label))
        if labels is None:
            labels = self._known[before.number, label] = _Labels(before, label, next(self._numbers))
        return labels

    def __len__(self) -> int:
        """Sequences that are known, the empty one aside."""
        return len(self._known)


@dataclass(frozen=True, eq=False, slots=True)
class _Path:
    """A way on which labels were found: the last label's frame, and the way before. Hypotheses share their past."""

    labels: _Labels
    frame: int
    before: "_Path | None"

    def tokens(self) -> TimedTokens:
        ids: list[int] = []
        frames: list[int] = []
        at = self
        while at.before is not None:
            ids.append(at.labels.label)
            frames.append(at.frame)
            at = at.before
        return TimedTokens(ids[::-1], frames[::-1], frames[::-1])


@dataclass(frozen=True)
class BeamState:
    """What a search has found, and what it needs to go on with the next chunk."""

    prediction: State
    """the prediction network's state of every hypothesis, N * W rows"""
    predicted: Tensor
    """[N * W, J]: what it said last"""
    scores: Tensor
    """float64 [N, W], falling; minus infinity where there is no hypothesis"""
    num_frames: list[int]
    """encoder frames of every sequence so far"""
    paths: list[_Path | None] = field(repr=False)
    """of N * W rows; None where there is no hypothesis"""
    interned: _Interned = field(repr=False)
    """shared by all states of a search"""

    def hypotheses(self, sequence: int) -> list[Hypothesis]:
        """Those of a sequence, best first: W of them, or fewer where others became one or none were possible."""
        scores = self.scores[sequence].tolist()
        paths = self.paths[sequence * len(scores) : (sequence + 1) * len(scores)]
        return [Hypothesis(path.tokens(), score) for path, score in zip(paths, scores, strict=True) if path]


@torch.no_grad()
def beam_search(
    model: Transducer,
    encoded: Tensor,
    lengths: Tensor,
    width: int,
    max_symbols: int,
    language_model: LanguageModel | None = None,
    language_model_weight: float = 0.0,
    label_bonus: float = 0.0,
    state: BeamState | None = None,
) -> BeamState:
    """The `width` likeliest label sequences of every recording.

    A label adds log p + language_model_weight * log p_language_model + label_bonus to a score, the blank its log p.
    A width of 1 is greedy search.

    Args:
        model: in evaluation mode, on the device of `encoded`.
        encoded: `[N, T, J]`, what `model.encode` gives of these frames.
        lengths: int64 `[N]` frames; what lies beyond is ignored.
        width: hypotheses W.
        max_symbols: labels that a frame may emit.
        language_model: what is fused with the model's labels.
        state: what the call for the frames before has returned, of the same width; it stays as it is.

    Raises:
        ConfigError: `width` or `max_symbols` is below 1.
        ValueError: lengths that do not fit, or a state of another shape.
    """
    check_search(encoded, lengths, max_symbols)
    if width < 1:
        raise ConfigError(f"decoder.beam is {width}: give 1 or more hypotheses")
    state = _start(model, encoded, width) if state is None else state
    if state.scores.shape != (len(encoded), width):
        raise ValueError(f"the state is of {tuple(state.scores.shape)} hypotheses, here are {(len(encoded), width)}")
    gains = _LabelGains(model.vocab_size, label_bonus, language_model, language_model_weight)
    ends = lengths.tolist()
    for frame in range(max(ends, default=0)):
        running = [frame < end for end in ends]
        rows = [row for row, path in enumerate(state.paths) if path and running[row // width]]
        for labels_left in range(max_symbols, -1, -1):
            if rows:
                scores, chosen = _prune(model, encoded[:, frame], state, rows, gains if labels_left else None)
                state, rows = _follow(model, state, scores, chosen)
        state = replace(state, num_frames=[n + ran for n, ran in zip(state.num_frames, running, strict=True)])
    return state


def _start(model: Transducer, encoded: Tensor, width: int) -> BeamState:
    """One hypothesis a sequence: no labels."""
    num_sequences, device = len(encoded), encoded.device
    blanks = torch.full((num_sequences * width,), BLANK, device=device)
    predicted, prediction = model.predict(blanks, model.start(num_sequences * width))
    # In float64: over an hour, a score grows to where the steps of float32 are those between hypotheses.
    scores = torch.full((num_sequences, width), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0
    interned = _Interned()
    paths = [_Path(interned.empty, 0, None), *[None] * (width - 1)] * num_sequences
    return BeamState(prediction, predicted, scores, [0] * num_sequences, paths, interned)


class _LabelGains:
    """What labels add to a score beside the model's log-probability."""

    def __init__(self, vocab_size: int, bonus: float, language_model: LanguageModel | None, weight: float) -> None:
        self.bonus = torch.full((vocab_size,), bonus, dtype=torch.float64)
        self.weight = weight
        self.order = 0
        if language_model is not None and weight != 0:
            self.order = language_model.order
            self.log_probs = lru_cache(_LANGUAGE_MODEL_CACHE)(language_model.log_probs)

    def after(self, sequences: Sequence[_Labels]) -> Tensor:
        """float64 `[len(sequences), V]` or `[V]`, on the CPU; 0 for the blank."""
        gains = self.bonus
        if self.order:
            log_probs = torch.stack([self.log_probs(labels.last(self.order - 1)) for labels in sequences])
            gains = gains + self.weight * log_probs.double()
        return gains.index_fill(-1, torch.tensor([BLANK]), 0.0)


def _prune(
    model: Transducer, frames: Tensor, state: BeamState, rows: list[int], gains: _LabelGains | None
) -> tuple[Tensor, Tensor]:
    """The likeliest of: hypotheses that wait, and those in `rows`, which take the blank or (with `gains`) a label.

    Args:
        frames: `[N, J]`.

    Returns:
        scores: float64 `[N, W]`, falling.
        chosen: int64 `[N, W]`, w * V + output for hypothesis w of a sequence; -1 where there is nothing to choose.
    """
    num_sequences, width = state.scores.shape
    device = state.scores.device
    before = state.scores.flatten()
    active = torch.tensor(rows, device=device)
    gained = model.joint(frames[active // width], state.predicted[active]).double()
    if gains is not None:
        sequences = [path.labels for path in (state.paths[row] for row in rows) if path]
        gained = gained + gains.after(sequences).to(device)
    candidates = before.new_full((len(before), model.vocab_size), -torch.inf)
    candidates[:, BLANK] = before
    outputs = slice(None) if gains is not None else slice(BLANK, BLANK + 1)
    candidates[active, outputs] = before[active, None] + gained[:, outputs]
    # Before pruning, so that no sequence takes two places; behind a label there is nothing to merge: what goes on had
    # different labels when the frame began, and has as many more.
    numbers = torch.tensor([path.labels.number if path else 0 for path in state.paths], device=device)
    waiting = candidates[:, BLANK].view(num_sequences, width)
    candidates[:, BLANK] = _merge(waiting, numbers.view(num_sequences, width)).flatten()
    scores, chosen = candidates.view(num_sequences, -1).topk(width)
    return scores, chosen.masked_fill(scores == -torch.inf, -1)


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
    for row, choice in enumerate(chosen.flatten().tolist()):
        place, output = divmod(max(choice, 0), model.vocab_size)
        sequence = row // width
        source.append(sequence * width + place)
        path = state.paths[source[-1]] if choice >= 0 else None
        if path and output != BLANK:
            path = _Path(state.interned.extended(path.labels, output), state.num_frames[sequence], path)
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
