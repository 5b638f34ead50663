"""CTC prefix beam search over log-probabilities, in one pass or chunk by chunk.

At each frame every hypothesis, a label sequence, stays unchanged (by the blank, or by a repetition of its last label)
or is extended by one label; pruning keeps the most probable hypotheses. Alignments with equal labels are one
hypothesis, and their probabilities add up. Those that end in the blank are summed separately, because only after a
blank can the last label be emitted again. The most probable alignment is kept too, for times and confidences. With an
unlimited beam and no label left out, a score is the sum over all alignments.

Scores may include an external language model, a length bonus and hot words (`Fusion`).

Source: Hannun et al. 2014, arXiv 1408.2873, algorithm 1; separate sums: Graves 2012, "Supervised Sequence Labelling
with Recurrent Neural Networks", section 7.5.

T encoder frames, V vocabulary, K labels per frame, W beam width.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hypotheses import Hypothesis, LabelSequence, SequenceTable, sort_hypotheses
from bestrq.decoding.tokens import BLANK, TimedTokens
from common.errors import UserError

_BLOCK = 1000
"""frames that are converted to Python lists at a time"""


@dataclass(frozen=True, eq=False, slots=True)
class _Run:
    """Frames of a label in an alignment, and the run before, which hypotheses share."""

    label: int
    first_frame: int
    last_frame: int
    probability: float
    """sum over the frames"""
    before: "_Run | None"


@dataclass(frozen=True, eq=False, slots=True)
class _Ending:
    """Alignments of a hypothesis that end in the blank, or those that end in its last label."""

    score: float
    """log of the sum of their probabilities"""
    best: float
    """log-probability of the most probable alignment"""
    run: _Run | None
    """last run of that alignment"""


@dataclass(frozen=True, eq=False, slots=True)
class _Prefix:
    """Hypothesis with its alignments, by their ending."""

    labels: LabelSequence
    fusion_score: float
    blank: _Ending
    label: _Ending


_IMPOSSIBLE = _Ending(-math.inf, -math.inf, None)


@dataclass(frozen=True)
class CTCBeamState:
    """Hypotheses of a beam search so far, and its state, from which the next chunk continues."""

    num_frames: int
    """encoder frames so far"""
    prefixes: list[_Prefix] = field(repr=False)
    """W or fewer, best first"""
    sequences: SequenceTable = field(repr=False)
    """shared by all states of a search"""

    def hypotheses(self) -> list[Hypothesis]:
        """Hypotheses, best first: W, or fewer if no more are possible.

        The recording is taken to end here: scores of incomplete hot words are subtracted.
        """
        return sort_hypotheses([self._hypothesis(prefix) for prefix in self.prefixes])

    def _hypothesis(self, prefix: _Prefix) -> Hypothesis:
        score = _log_add(prefix.blank.score, prefix.label.score) + prefix.fusion_score
        run = max(prefix.blank, prefix.label, key=lambda ending: ending.best).run
        runs: list[_Run] = []
        while run is not None:
            runs.append(run)
            run = run.before
        runs.reverse()
        tokens = TimedTokens(
            [run.label for run in runs],
            [run.first_frame for run in runs],
            [run.last_frame for run in runs],
            [run.probability / (run.last_frame - run.first_frame + 1) for run in runs],
        )
        return Hypothesis(tokens, score - self.sequences.partial_match(prefix.labels))


def top_labels(log_probs: Tensor, count: int) -> Tensor:
    """Most probable labels of each frame and their log-probabilities in one tensor, in descending order.

    Args:
        log_probs: `[..., V]`.
        count: number of labels K, at most V.

    Returns:
        `[..., K, 2]` in the dtype of `log_probs`; float32 holds labels up to 2^24.
    """
    values, labels = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return torch.stack((labels.to(values.dtype), values), dim=-1)


def ctc_beam_search(
    top: Tensor,
    width: int,
    fusion: Fusion | None = None,
    min_log_prob: float = -math.inf,
    state: CTCBeamState | None = None,
) -> CTCBeamState:
    """Beam search: the most probable label sequences of a recording.

    Args:
        top: `[T, K, 2]`, from `top_labels`.
        width: beam width W.
        fusion: language model, length bonus, hot words.
        min_log_prob: outputs of a frame below this log-probability are left out, except its most probable one.
        state: result for the previous chunk, with the same fusion; not modified.

    Raises:
        UserError: `width` is below 1.
        ValueError: a log-probability is NaN, or the state has another fusion.
    """
    if width < 1:
        raise UserError(f"decoder.beam is {width}: give 1 or more hypotheses")
    if top.isnan().any():
        raise ValueError("log-probabilities are NaN: the recording's features or the model's weights are damaged")
    if state is None:
        sequences = SequenceTable(fusion)
        prefixes = [_Prefix(sequences.empty, 0.0, _Ending(0.0, 0.0, None), _IMPOSSIBLE)]
        start = 0
    else:
        sequences, prefixes, start = state.sequences, state.prefixes, state.num_frames
        if sequences.fusion is not fusion:
            raise ValueError("the state belongs to a search with another fusion")
    for frame, outputs in enumerate(_frame_outputs(top, min_log_prob), start):
        prefixes = _step(prefixes, outputs, frame, width, sequences)
    return CTCBeamState(start + len(top), prefixes, sequences)


def _frame_outputs(top: Tensor, min_log_prob: float) -> Iterator[dict[int, float]]:
    """Log-probabilities of each frame's outputs, without those that are left out."""
    for block in top.split(_BLOCK):
        labels, log_probs = block[..., 0].long().tolist(), block[..., 1]
        counts = ((log_probs >= min_log_prob) & (log_probs > -math.inf)).sum(dim=1).clamp(min=1).tolist()
        for frame_labels, values, count in zip(labels, log_probs.tolist(), counts, strict=True):
            yield dict(zip(frame_labels[:count], values[:count], strict=True))


def _step(
    prefixes: list[_Prefix], outputs: dict[int, float], frame: int, width: int, sequences: SequenceTable
) -> list[_Prefix]:
    """The best hypotheses after one more frame, best first.

    Args:
        outputs: log-probabilities of the frame.
    """
    new_labels = [label for label in outputs if label != BLANK]
    probability = {label: math.exp(outputs[label]) for label in new_labels}
    extensions: dict[tuple[int, int], _Ending] = {}
    origins: dict[tuple[int, int], tuple[_Prefix, float]] = {}
    for prefix in prefixes if new_labels else ():
        fusion = sequences.fusion
        added = fusion.label_scores(prefix.labels.context, new_labels) if fusion else [0.0] * len(new_labels)
        both = _combine(prefix.blank, prefix.label)
        for label, label_score in zip(new_labels, added, strict=True):
            before = prefix.blank if label == prefix.labels.label else both
            if before.score > -math.inf:
                log_prob = outputs[label]
                run = _Run(label, frame, frame, probability[label], before.run)
                key = (prefix.labels.number, label)
                extensions[key] = _Ending(before.score + log_prob, before.best + log_prob, run)
                origins[key] = (prefix, prefix.fusion_score + label_score)

    candidates: list[tuple[float, _Prefix | None, tuple[int, int]]] = []
    for prefix in prefixes:
        labels = prefix.labels
        blank = _IMPOSSIBLE
        if BLANK in outputs:
            both, log_prob = _combine(prefix.blank, prefix.label), outputs[BLANK]
            blank = _Ending(both.score + log_prob, both.best + log_prob, both.run)
        last = _IMPOSSIBLE
        if labels.before is not None:
            if labels.label in probability and prefix.label.run is not None:
                run, log_prob = prefix.label.run, outputs[labels.label]
                longer = _Run(run.label, run.first_frame, frame, run.probability + probability[run.label], run.before)
                last = _Ending(prefix.label.score + log_prob, prefix.label.best + log_prob, longer)
            # The extension of another hypothesis has the same labels.
            extension = extensions.pop((labels.before.number, labels.label), None)
            last = _combine(last, extension) if extension else last
        score = _log_add(blank.score, last.score)
        if score > -math.inf:
            unchanged = _Prefix(labels, prefix.fusion_score, blank, last)
            candidates.append((score + prefix.fusion_score, unchanged, (0, 0)))
    candidates.extend((ending.score + origins[key][1], None, key) for key, ending in extensions.items())

    best = heapq.nlargest(width, candidates, key=lambda candidate: candidate[0])
    return [prefix or _extend(*origins[key], extensions[key], key[1], sequences) for _, prefix, key in best]


def _extend(prefix: _Prefix, fusion_score: float, ending: _Ending, label: int, sequences: SequenceTable) -> _Prefix:
    return _Prefix(sequences.extend(prefix.labels, label), fusion_score, _IMPOSSIBLE, ending)


def _combine(first: _Ending, second: _Ending) -> _Ending:
    """Union of two sets of alignments."""
    if second.score == -math.inf:
        return first
    if first.score == -math.inf:
        return second
    best = first if first.best >= second.best else second
    return _Ending(_log_add(first.score, second.score), best.best, best.run)


def _log_add(first: float, second: float) -> float:
    """log(exp(first) + exp(second))"""
    low, high = (first, second) if first < second else (second, first)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
