"""Word and character error rates over a corpus, with bootstrap intervals over its recordings.

Rates are errors of the whole corpus over reference units of the whole corpus, never a mean of rates. Counts and
alignments are jiwer's; characters include the spaces between words.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import jiwer
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer


@dataclass(frozen=True)
class ErrorCounts:
    """Edit operations that turn references into hypotheses, counted over words or characters."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_length(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float | None:
        """Errors over reference units; None where the reference is empty."""
        return self.errors / self.reference_length if self.reference_length else None


@dataclass(frozen=True)
class RecordingScore:
    """One recording: its normalised texts and its errors."""

    id: str
    language: str
    seconds: float
    reference: str
    hypothesis: str
    words: ErrorCounts
    characters: ErrorCounts

    def row(self) -> dict[str, Any]:
        """Flat, for a table: rates, counts and texts."""
        return {
            "id": self.id,
            "language": self.language,
            "seconds": round(self.seconds, 3),
            "wer": self.words.rate,
            "cer": self.characters.rate,
            **{f"word_{name}": count for name, count in asdict(self.words).items()},
            **{f"char_{name}": count for name, count in asdict(self.characters).items()},
            "reference": self.reference,
            "hypothesis": self.hypothesis,
        }


@dataclass(frozen=True)
class CorpusScore:
    """Totals over recordings; an interval is None where it says nothing: fewer than two recordings, or no words."""

    num_recordings: int
    seconds: float
    words: ErrorCounts
    characters: ErrorCounts
    wer_interval: tuple[float, float] | None
    cer_interval: tuple[float, float] | None

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_recordings": self.num_recordings,
            "seconds": round(self.seconds, 3),
            "wer": self.words.rate,
            "wer_interval": self.wer_interval,
            "cer": self.characters.rate,
            "cer_interval": self.cer_interval,
            "words": asdict(self.words),
            "characters": asdict(self.characters),
        }


@dataclass(frozen=True)
class Mark:
    """A stretch of an alignment: words of the reference beside those of the hypothesis."""

    kind: str
    """'equal', 'substitute', 'insert' or 'delete'"""
    reference: str
    hypothesis: str


@cache
def text_normaliser(language: str) -> Callable[[str], str]:
    """What is done to reference and hypothesis alike before they are compared.

    English ("en", "en-GB", "english", any case): the normaliser of Whisper (numbers, contractions, British spelling).
    Any other: lower case, NFKC, symbols and punctuation turned into spaces; combining marks are kept, since many
    scripts write vowels with them. Spaces are single in both.
    """
    is_english = language.lower().replace("_", "-").split("-")[0] in ("en", "eng", "english")
    clean = EnglishTextNormalizer() if is_english else BasicTextNormalizer(preserve_marks=True)
    return lambda text: " ".join(clean(text).split())


def score_recording(id: str, reference: str, hypothesis: str, language: str, seconds: float = 0.0) -> RecordingScore:
    """Normalise both texts by the language's rule and count the errors."""
    normalise = text_normaliser(language)
    reference, hypothesis = normalise(reference), normalise(hypothesis)
    return RecordingScore(
        id=id,
        language=language,
        seconds=seconds,
        reference=reference,
        hypothesis=hypothesis,
        words=_counts(jiwer.process_words(reference, hypothesis)),
        characters=_counts(jiwer.process_characters(reference, hypothesis)),
    )


def score_corpus(scores: Sequence[RecordingScore], num_resamples: int = 10_000, seed: int = 0) -> CorpusScore:
    """Totals, and 95 % intervals by resampling whole recordings."""

    def interval(counts: list[ErrorCounts]) -> tuple[float, float] | None:
        errors, lengths = _as_arrays(counts)
        return bootstrap_interval(errors, lengths, num_resamples, seed)

    words, characters = [score.words for score in scores], [score.characters for score in scores]
    return CorpusScore(
        num_recordings=len(scores),
        seconds=sum(score.seconds for score in scores),
        words=sum(words, ErrorCounts()),
        characters=sum(characters, ErrorCounts()),
        wer_interval=interval(words),
        cer_interval=interval(characters),
    )


def score_by_language(
    scores: Sequence[RecordingScore], num_resamples: int = 10_000, seed: int = 0
) -> dict[str, CorpusScore]:
    """Totals of every language, in alphabetical order, then of all recordings as "all"."""
    languages = sorted({score.language for score in scores})
    totals = {
        language: score_corpus([score for score in scores if score.language == language], num_resamples, seed)
        for language in languages
    }
    return totals | {"all": score_corpus(scores, num_resamples, seed)}


def bootstrap_interval(
    errors: np.ndarray, lengths: np.ndarray, num_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Percentile bootstrap of sum(errors) / sum(lengths) over recordings (Bisani and Ney 2004).

    With `errors` the errors of one system less those of another on the same recordings, the interval is that of the
    difference between their rates: both are resampled together.

    Args:
        errors, lengths: integers `[n]`, errors and reference units of every recording.

    Returns:
        Low and high end; None for fewer than two recordings or references that are all empty.
    """
    if len(errors) < 2 or not np.any(lengths):
        return None
    columns = np.stack([errors, lengths], axis=1)
    sums = np.concatenate([draws @ columns for draws in _resamples(len(errors), num_resamples, seed)])
    sums = sums[sums[:, 1] > 0]  # a resample of empty references only has no rate
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def align_words(reference: str, hypothesis: str) -> list[Mark]:
    """The alignment of two normalised texts as stretches of equal, substituted, inserted and deleted words."""
    output = jiwer.process_words(reference, hypothesis)
    return [
        Mark(
            chunk.type,
            " ".join(output.references[0][chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(output.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in output.alignments[0]
    ]


def _counts(output: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorCounts:
    return ErrorCounts(output.hits, output.substitutions, output.deletions, output.insertions)


def _as_arrays(counts: Iterable[ErrorCounts]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array([(one.errors, one.reference_length) for one in counts], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _resamples(num_recordings: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often every recording is drawn: int64 `[resamples, n]`, in blocks of a bounded size."""
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // num_recordings)
    even = np.full(num_recordings, 1.0 / num_recordings)
    for start in range(0, num_resamples, block):
        yield generator.multinomial(num_recordings, even, size=min(block, num_resamples - start))
