"""Pseudo-labels: confidences of hypotheses, their filter, and its precision where references exist."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import ClosedUnitInterval

from bestrq.decoding.tokens import TimedTokens
from bestrq.scoring.word_errors import RecordingScore
from bestrq.transcripts.formats import TimedTranscript
from common.errors import UserError
from common.json_checks import fields, list_of, or_null, positive_or_zero, row_of, text
from common.text import label_words
from data.transcripts import Word

Confidence = Literal["label", "word"]
SMALLEST_PROBABILITY = 1e-10
SHARES = tuple(round(0.1 * step, 1) for step in range(1, 11))
"""kept shares of the table of precision"""


@dataclass(frozen=True)
class FilterSettings:
    """Choice of recordings, and of parts of them, by confidence. A recording must meet all conditions."""

    confidence: Confidence = "label"
    """confidence of a recording: 'label' is the geometric mean of the probabilities of its labels, exp of the mean
    log-probability per label; 'word' is the mean of the confidences of its words, which are means over labels"""
    min_confidence: ClosedUnitInterval = 0.0
    """lowest confidence, from 0 to 1"""
    keep: ClosedUnitInterval = 1.0
    """share of the decoded audio to keep, the most confident recordings first"""
    min_word_confidence: ClosedUnitInterval = 0.0
    """words below it are removed with their audio: training then uses the parts between them. Needs accurate word
    times: a transducer emits words late"""

    def __post_init__(self) -> None:
        if self.keep == 0:
            raise UserError("filter.keep is 0, which keeps nothing: give a share above 0, such as 0.5")


check_hypothesis = fields({
    "text": text, "label": positive_or_zero, "word": positive_or_zero,
    "words": list_of(row_of(text, positive_or_zero, positive_or_zero, or_null(positive_or_zero))),
})  # fmt: skip
"""check of the JSON object of a `Hypothesis`"""


@dataclass(frozen=True)
class Hypothesis:
    """Hypothesis of a recording, as label text."""

    text: str
    words: list[Word] = field(default_factory=list)
    """joined by spaces, the words are the text"""
    label: float = 0.0
    """geometric mean of the label probabilities; 0 without labels"""
    word: float = 0.0
    """mean of the word confidences; 0 without words"""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; inverse of `from_dict`."""
        return {**asdict(self), "words": [list(word) for word in self.words]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Hypothesis":
        words = [Word(*word) for word in values["words"]]
        return cls(values["text"], words, values["label"], values["word"])


def hypothesis_of(transcript: TimedTranscript, tokens: TimedTokens, language: str) -> Hypothesis:
    """Hypothesis with its confidences; words are labels (`common.text`), and those without a label are left out.

    The confidence of a label is the model's probability at the frames that emitted it (`TimedTokens.confidence`),
    without the scores of a language model.
    """
    labels = label_words([word.word for word in transcript.words], language)
    words = [
        Word(label, round(word.start, 3), round(word.end, 3), word.confidence)
        for label, word in zip(labels, transcript.words, strict=True)
        if label
    ]
    known = [word.confidence for word in words if word.confidence is not None]
    logs = [math.log(max(probability, SMALLEST_PROBABILITY)) for probability in tokens.confidence]
    return Hypothesis(
        " ".join(word.word for word in words),
        words,
        math.exp(sum(logs) / len(logs)) if logs and words else 0.0,
        sum(known) / len(known) if known else 0.0,
    )


def threshold_of(confidence: np.ndarray, frames: np.ndarray, settings: FilterSettings) -> float:
    """Lowest confidence that the filter keeps: that of `min_confidence`, or that of the share `keep` if it is higher.

    Args:
        confidence: float `[n]`, 0 for recordings without a word, which are never kept.
        frames: int `[n]`, lengths.

    Raises:
        UserError: no recording meets the conditions.
    """
    if not confidence.any():
        raise UserError(
            f"none of the {len(confidence)} hypotheses has a word: train the recogniser for longer, or with more labels"
        )
    order = np.argsort(-confidence, kind="stable")
    total = np.cumsum(frames[order])
    # At least one recording, and all with the confidence of the last one.
    last = max(1, int(np.searchsorted(total, settings.keep * total[-1] * (1 + 1e-12), side="right")))
    threshold = max(settings.min_confidence, float(confidence[order[last - 1]]))
    if not is_kept(confidence, threshold).any():
        raise UserError(
            f"filter.min_confidence is {settings.min_confidence}, but the highest confidence of {len(confidence)} "
            f"recordings is {confidence.max():.3f}: give a lower one"
        )
    return threshold


def is_kept(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Mask of the recordings that the filter keeps, bool `[n]`."""
    return (confidence >= threshold) & (confidence > 0)


def cut_words(
    words: Sequence[Word], minimum: float, seconds: float
) -> tuple[list[Word], list[tuple[float, float]]]:  # fmt: skip
    """Words of at least this confidence, and the passages (start, end) in seconds that hold the others.

    A passage extends to the middle of the pause on each side, or to the end of the recording.
    """
    doubtful = [word.confidence is not None and word.confidence < minimum for word in words]
    middles = ((left.end + right.start) / 2 for left, right in itertools.pairwise(words))
    edges = [0.0, *itertools.accumulate(middles, max), seconds]  # words of a transducer may overlap
    passages: list[tuple[float, float]] = []
    for number, is_doubtful in enumerate(doubtful):
        if is_doubtful and number and doubtful[number - 1]:
            passages[-1] = (passages[-1][0], edges[number + 1])
        elif is_doubtful:
            passages.append((edges[number], edges[number + 1]))
    return [word for word, is_doubtful in zip(words, doubtful, strict=True) if not is_doubtful], passages


# ---- Precision ----


@dataclass(frozen=True)
class Scored:
    """Recording with a reference."""

    confidence: float
    seconds: float
    score: RecordingScore


@dataclass(frozen=True)
class PrecisionRow:
    """Error rates of the recordings with a reference that a threshold keeps, and of the others."""

    threshold: float
    kept_share: float
    """of the audio"""
    kept_recordings: int
    cer: float | None
    wer: float | None
    rejected_cer: float | None
    """None if nothing is rejected"""


def precision_row(scored: Sequence[Scored], threshold: float) -> PrecisionRow:
    """Precision of one threshold."""
    kept = [item for item in scored if item.confidence >= threshold and item.confidence > 0]
    rejected = [item for item in scored if not (item.confidence >= threshold and item.confidence > 0)]
    seconds = sum(item.seconds for item in scored)
    return PrecisionRow(
        threshold,
        sum(item.seconds for item in kept) / seconds,
        len(kept),
        _rate(kept, "characters"),
        _rate(kept, "words"),
        _rate(rejected, "characters"),
    )


def precision_table(scored: Sequence[Scored]) -> list[PrecisionRow]:
    """Precision by threshold, for the thresholds that keep about 10 % to 100 % of the audio; highest first."""
    confidence = np.array([item.confidence for item in scored])
    order = np.argsort(-confidence, kind="stable")
    total = np.cumsum(np.array([item.seconds for item in scored])[order])
    places = [min(int(np.searchsorted(total, share * total[-1] - 1e-9)), len(scored) - 1) for share in SHARES]
    thresholds = dict.fromkeys(float(confidence[order[place]]) for place in places)
    return [precision_row(scored, threshold) for threshold in thresholds]


def precision_text(rows: Iterable[PrecisionRow], chosen: PrecisionRow) -> str:
    """Terminal table of the precision, with the threshold of the filter marked."""
    lines = [f"{'confidence':>11}{'kept audio':>12}{'recordings':>12}{'CER':>9}{'WER':>9}{'CER of rejected':>17}"]
    for row in sorted({*rows, chosen}, key=lambda row: -row.threshold):
        rates = f"{_percent(row.cer):>9}{_percent(row.wer):>9}{_percent(row.rejected_cer):>17}"
        mark = "  <- filter" if row.threshold == chosen.threshold else ""
        lines.append(f"{row.threshold:>11.4f}{row.kept_share:>12.1%}{row.kept_recordings:>12,}{rates}{mark}")
    return "\n".join(lines)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def _rate(items: Sequence[Scored], unit: Literal["words", "characters"]) -> float | None:
    """Errors over reference units; None without any."""
    counts = [getattr(item.score, unit) for item in items]
    length = sum(count.reference_length for count in counts)
    return sum(count.errors for count in counts) / length if length else None
