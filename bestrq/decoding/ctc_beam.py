"""Prefix beam search over CTC log-probabilities, in one go or chunk by chunk.

At every frame each hypothesis, a sequence of labels, stays as it is (the blank, or its last label goes on) or gets one
label more; the likeliest of all stay. Alignments of equal labels are one hypothesis: their probabilities add up, kept
apart by whether they end in the blank, for only behind a blank does a label begin that equals the last one. Beside the
sum goes the likeliest alignment, for times and confidences. With a beam that holds all of them and no label left out,
a score is the sum over all alignments.

Scores may take in what an external language model and hot words say (`Fusion`).

Source: Hannun et al. 2014, arXiv 1408.2873, algorithm 1; summed apart: Graves 2012, "Supervised Sequence Labelling with
Recurrent Neural Networks", section 7.5.

T encoder frames, V vocabulary, K labels looked at in a frame, W hypotheses of a beam.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.sequences import Hypothesis, Interned, Labels, ranked
from bestrq.decoding.tokens import BLANK, TimedTokens
from common.errors import UserError

INFINITY = math.inf
_BLOCK = 1000  # frames that are Python's lists at a time


@dataclass(frozen=True, eq=False, slots=True)
class _Run:
    """The frames of a label in an alignment, and the labels before. Hypotheses share their past."""

    label: int
    first_frame: int
    last_frame: int
    probability: float
    """summed over the frames"""
    before: "_Run | None"


@dataclass(frozen=True, eq=False, slots=True)
class _Ending:
    """The alignments of a hypothesis that end in the blank, or those that end in its last label."""

    score: float
    """log of the sum of their probabilities"""
    best: float
    """log-probability of the likeliest"""
    run: _Run | None
    """its last label"""


@dataclass(frozen=True, eq=False, slots=True)
class _Prefix:
    """A hypothesis."""

    labels: Labels
    gained: float
    """what fusion has added"""
    blank: _Ending
    label: _Ending


_NEVER = _Ending(-INFINITY, -INFINITY, None)


@dataclass(frozen=True)
class CTCBeamState:
    """What a search has found, and what it needs to go on with the next chunk."""

    num_frames: int
    """encoder frames so far"""
    prefixes: list[_Prefix] = field(repr=False)
    """W or fewer, best first"""
    interned: Interned = field(repr=False)
    """shared by all states of a search"""

    def hypotheses(self) -> list[Hypothesis]:
        """Best first: W of them, or fewer where no more were possible.

        As if the recording ended here: what a hypothesis was given for a hot word that it has only begun is taken back.
        """
        return ranked([self._hypothesis(one) for one in self.prefixes])

    def _hypothesis(self, prefix: _Prefix) -> Hypothesis:
        score = _log_add(prefix.blank.score, prefix.label.score) + prefix.gained
        run = max(prefix.blank, prefix.label, key=lambda one: one.best).run
        runs: list[_Run] = []
        while run is not None:
            runs.append(run)
            run = run.before
        runs.reverse()
        tokens = TimedTokens(
            [one.label for one in runs],
            [one.first_frame for one in runs],
            [one.last_frame for one in runs],
            [one.probability / (one.last_frame - one.first_frame + 1) for one in runs],
        )
        return Hypothesis(tokens, score - self.interned.unfinished(prefix.labels))


def likeliest_labels(log_probs: Tensor, count: int) -> Tensor:
    """What a search needs of frames, as numbers of one dtype: labels and their log-probabilities, falling.

    Args:
        log_probs: `[..., V]`.
        count: labels K; no more than V are taken.

    Returns: `[..., K, 2]` in the dtype of `log_probs`; float32 holds labels up to 2^24.
    """
    values, labels = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return torch.stack((labels.to(values.dtype), values), dim=-1)


def ctc_beam_search(
    likeliest: Tensor,
    width: int,
    fusion: Fusion | None = None,
    min_log_prob: float = -INFINITY,
    state: CTCBeamState | None = None,
) -> CTCBeamState:
    """The `width` likeliest label sequences of a recording.

    Args:
        likeliest: `[T, K, 2]`, what `likeliest_labels` gives.
        width: hypotheses W.
        fusion: language model, bonus, hot words.
        min_log_prob: outputs of a frame below this are left out, all but its likeliest.
        state: what the call for the frames before has returned, of the same fusion; it stays as it is.

    Raises:
        UserError: `width` is below 1.
        ValueError: log-probabilities that are NaN, or a state of another fusion.
    """
    if width < 1:
        raise UserError(f"decoder.beam is {width}: give 1 or more hypotheses")
    if likeliest.isnan().any():
        raise ValueError("log-probabilities are NaN: the recording's features or the model's weights are damaged")
    if state is None:
        interned = Interned(fusion)
        prefixes = [_Prefix(interned.empty, 0.0, _Ending(0.0, 0.0, None), _NEVER)]
    else:
        interned, prefixes = state.interned, state.prefixes
        if interned.fusion is not fusion:
            raise ValueError("the state is that of a search with another fusion")
    begin = state.num_frames if state else 0
    for frame, outputs in enumerate(_kept(likeliest, min_log_prob), begin):
        prefixes = _step(prefixes, outputs, frame, width, interned)
    return CTCBeamState(begin + len(likeliest), prefixes, interned)


def _kept(likeliest: Tensor, min_log_prob: float) -> Iterator[dict[int, float]]:
    """Log-probabilities of the outputs of every frame that are not left out."""
    for block in likeliest.split(_BLOCK):
        labels, log_probs = block[..., 0].long().tolist(), block[..., 1]
        counts = ((log_probs >= min_log_prob) & (log_probs > -INFINITY)).sum(dim=1).clamp(min=1).tolist()
        for of_frame, values, count in zip(labels, log_probs.tolist(), counts, strict=True):
            yield dict(zip(of_frame[:count], values[:count], strict=True))


def _step(
    prefixes: list[_Prefix], outputs: dict[int, float], frame: int, width: int, interned: Interned
) -> list[_Prefix]:
    """The likeliest hypotheses behind one more frame, best first.

    Args:
        outputs: log-probabilities of the frame.
    """
    new = [label for label in outputs if label != BLANK]
    probability = {label: math.exp(outputs[label]) for label in new}
    grown: dict[tuple[int, int], _Ending] = {}
    ways: dict[tuple[int, int], tuple[_Prefix, float]] = {}
    for prefix in prefixes if new else ():
        gains = interned.fusion.gains_of(prefix.labels.context, new) if interned.fusion else [0.0] * len(new)
        whole = _added(prefix.blank, prefix.label)
        for label, gain in zip(new, gains, strict=True):
            before = prefix.blank if label == prefix.labels.label else whole
            if before.score > -INFINITY:
                log_prob = outputs[label]
                run = _Run(label, frame, frame, probability[label], before.run)
                key = (prefix.labels.number, label)
                grown[key] = _Ending(before.score + log_prob, before.best + log_prob, run)
                ways[key] = (prefix, prefix.gained + gain)

    found: list[tuple[float, _Prefix | None, tuple[int, int]]] = []
    for prefix in prefixes:
        labels = prefix.labels
        ending = _NEVER
        if BLANK in outputs:
            whole, log_prob = _added(prefix.blank, prefix.label), outputs[BLANK]
            ending = _Ending(whole.score + log_prob, whole.best + log_prob, whole.run)
        last = _NEVER
        if labels.before is not None:
            if labels.label in probability and prefix.label.run is not None:
                run, log_prob = prefix.label.run, outputs[labels.label]
                longer = _Run(run.label, run.first_frame, frame, run.probability + probability[run.label], run.before)
                last = _Ending(prefix.label.score + log_prob, prefix.label.best + log_prob, longer)
            # The same labels, as one more than those of another hypothesis.
            same = grown.pop((labels.before.number, labels.label), None)
            last = _added(last, same) if same else last
        score = _log_add(ending.score, last.score)
        if score > -INFINITY:
            found.append((score + prefix.gained, _Prefix(labels, prefix.gained, ending, last), (0, 0)))
    found.extend((ending.score + ways[key][1], None, key) for key, ending in grown.items())

    best = heapq.nlargest(width, found, key=lambda one: one[0])
    return [stayed or _grow(*ways[key], grown[key], key[1], interned) for _, stayed, key in best]


def _grow(prefix: _Prefix, gained: float, ending: _Ending, label: int, interned: Interned) -> _Prefix:
    return _Prefix(interned.extended(prefix.labels, label), gained, _NEVER, ending)


def _added(one: _Ending, other: _Ending) -> _Ending:
    """Alignments of both."""
    if other.score == -INFINITY:
        return one
    if one.score == -INFINITY:
        return other
    likelier = one if one.best >= other.best else other
    return _Ending(_log_add(one.score, other.score), likelier.best, likelier.run)


def _log_add(one: float, other: float) -> float:
    """log(exp(one) + exp(other))"""
    low, high = (one, other) if one < other else (other, one)
    return high if low == -INFINITY else high + math.log1p(math.exp(low - high))
