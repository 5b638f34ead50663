"""When the words of a transcript were said, from the log-probabilities of a CTC recogniser, in bounded memory.

One Viterbi pass over T frames and U labels keeps T x U cells: 18 thousand million for two hours. So the recording is
cut where transcript and greedy decoding agree beyond doubt (`pieces.plan_pieces`), and every piece is aligned by
`torchaudio.functional.forced_align`.

A star is one more label, as likely as the likeliest in every frame: it takes in, at no cost, what no word accounts for.
It stands for a word that the tokenizer cannot write, and between the words of a region in which much more was heard
than the transcript has.

T encoder frames, V vocabulary, U labels, N words. `forced_align` is Viterbi over the lattice of Graves et al. 2006; the
star is that of Pratap et al. 2023, "Scaling Speech Technology to 1,000+ Languages".
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.functional import forced_align

from bestrq.alignment.anchors import Labels
from bestrq.alignment.pieces import STAR, Piece, Region, Transcript, plan_pieces
from bestrq.decoding.tokens import BLANK
from common.errors import UserError

# About what a label of another recording's transcript costs: a label without a frame counts as if it were one.
_NATS_OF_A_MISS = 7.0
# Log-probabilities of one recording that are kept in memory; more of them go to a temporary file.
_SPOOL_BYTES = 64 << 20
# Of a word that was aligned: 0 is left to those that were not, even when rounded.
_LEAST_CONFIDENCE = 0.001
_LOWEST = -10_000.0  # a float16 holds it, and no path survives it

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AlignmentSettings:
    """How words are placed, and when a transcript is refused."""

    max_cost: float = 3.0
    """The likeliest path through the transcript may be less likely than greedy decoding by so many nats a label; above
    it the recording counts as unaligned. Right transcripts cost 0.1 to 2, those of another recording 3.5 to 12."""
    lead_ms: float = 40.0
    """A word begins so long before the frame of its first label, for a sound is recognised once it is under way."""
    tail_ms: float = 15.0
    """A word ends so long after the frame of its last label, or where the next word begins."""
    piece_cells: int = 4_000_000
    """Pieces grow up to so many cells, frames x (2 labels + 1 + vocabulary); fewer cells, more cuts."""
    max_cells: int = 100_000_000
    """A stretch without any place to cut may have so many cells, of 1 to 10 bytes; the words of a longer one get
    times by their length, with confidence 0."""

    def __post_init__(self) -> None:
        if not self.max_cost > 0:
            raise UserError(f"alignment.max_cost = {self.max_cost}: choose a positive number of nats, such as 3")
        for name in ("lead_ms", "tail_ms"):
            if not 0 <= getattr(self, name) < 1000:
                raise UserError(f"alignment.{name} = {getattr(self, name)}: choose 0 to below 1000 milliseconds")
        if not 0 < self.piece_cells <= self.max_cells:
            raise UserError(
                f"alignment.piece_cells = {self.piece_cells}, alignment.max_cells = {self.max_cells}: "
                "both must be positive, the second at least the first"
            )


@dataclass(frozen=True)
class Alignment:
    """Where N words lie, in encoder frames."""

    start: Floats
    """float64 `[N]`, frame of the first label; a word without labels lies, with no length, where the one before ends"""
    end: Floats
    """float64 `[N]`, frame after that of the last label; at most the start of the next word"""
    confidence: Floats
    """float64 `[N]` in 0..1: mean posterior of the word's labels; 0 is a guess. A starred word has the smaller one of
    its neighbours, which alone place it."""
    cost: float
    """nats a label by which greedy decoding is likelier than the transcript; infinite where all words are starred"""
    num_guessed: int
    """words that were given a time without any alignment"""


class LogProbSpool:
    """Log-probabilities of one recording at a time, float16, in a temporary file where they are many.

    `keep` is the `reduce` of `inference.transcribe`, which calls it in the order of windows and recordings: whenever
    it gives back a recording, the spool holds that one alone, if it was cleared after the one before.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 - lives as long as the spool

    def keep(self, log_probs: Tensor) -> Tensor:
        """Append `[n, V]`; returns the likeliest labels, int64 `[n]`."""
        self._file.write(log_probs.clamp(min=_LOWEST).to("cpu", torch.float16).numpy().tobytes())
        return log_probs.argmax(dim=-1)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Frames [start, stop), float32 `[stop - start, V]`."""
        width = 2 * self.vocab_size
        self._file.seek(start * width)
        values = np.frombuffer(self._file.read((stop - start) * width), np.float16)
        return values.reshape(stop - start, self.vocab_size).astype(np.float32)

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()


def blank_excluded(
    read: Callable[[int, int], NDArray[np.float32]], excluded: NDArray[np.bool_]
) -> Callable[[int, int], NDArray[np.float32]]:
    """`read` of log-probabilities `[n, V]`, where the excluded frames are surely blank: bool `[T]`."""

    def blanked(start: int, stop: int) -> NDArray[np.float32]:
        log_probs = read(start, stop)
        log_probs[excluded[start:stop]] = _LOWEST
        log_probs[excluded[start:stop], BLANK] = 0.0
        return log_probs

    return blanked


def align_words(
    read: Callable[[int, int], NDArray[np.float32]],
    best: Labels,
    transcript: Transcript,
    vocab_size: int,
    settings: AlignmentSettings,
) -> Alignment:
    """Place the words of a transcript.

    Args:
        read: log-probabilities of the frames from a start to a stop, float32 `[stop - start, V]`.
        best: int64 `[T]`, the likeliest label of every frame.
        transcript: at least one of its words must have labels.
    """
    if not len(transcript.ids):
        raise ValueError("a transcript without labels cannot be aligned")
    labels = LabelTimes(len(transcript.ids))
    guesses: list[Region] = []
    for piece in plan_pieces(transcript, best, vocab_size, settings.piece_cells, settings.max_cells):
        if piece.possible:
            labels.align(piece, read(piece.regions[0].start, piece.regions[-1].end), best)
        else:
            labels.give_up(piece)
            guesses += piece.regions
    return _words(labels, transcript, guesses)


class LabelTimes:
    """What is known of every label of a transcript, filled piece by piece."""

    def __init__(self, num_labels: int) -> None:
        self.start = np.zeros(num_labels)
        self.end = np.zeros(num_labels)
        self.posterior = np.zeros(num_labels)
        self.nats = 0.0
        self.num_counted = 0

    def align(self, piece: Piece, log_probs: NDArray[np.float32], best: Labels) -> None:
        """Viterbi over one piece; log_probs: float32 `[piece.frames, V]`."""
        star = log_probs.shape[1]
        likeliest = log_probs.max(axis=1, keepdims=True)
        ids = np.array(piece.ids, np.int64)
        ids[ids == STAR] = star
        emissions = torch.from_numpy(np.concatenate([log_probs, likeliest], axis=1))
        path, scores = (one[0].numpy() for one in forced_align(emissions[None], torch.from_numpy(ids)[None]))
        begin = np.flatnonzero(np.diff(path, prepend=-1))
        end = np.append(begin[1:], len(path))
        posterior = np.add.reduceat(np.exp(scores), begin) / (end - begin)
        kept = path[begin] != BLANK  # as many runs as there are ids
        begin, end, posterior = begin[kept], end[kept], posterior[kept]
        offset = piece.regions[0].start
        for number in np.flatnonzero(ids == star):  # a star takes in the silence around what was said, too
            spoken = np.flatnonzero(best[offset + begin[number] : offset + end[number]] != BLANK)
            if len(spoken):
                begin[number], end[number] = begin[number] + spoken[0], begin[number] + spoken[-1] + 1
        places = np.array(piece.places)
        of_word = places >= 0
        self.start[places[of_word]] = offset + begin[of_word]
        self.end[places[of_word]] = offset + end[of_word]
        self.posterior[places[of_word]] = posterior[of_word]
        self.nats += float(likeliest.sum(dtype=np.float64) - scores.sum(dtype=np.float64))
        self.num_counted += piece.num_written

    def give_up(self, piece: Piece) -> None:
        """Count the labels of a piece that cannot be aligned as ones that were not said."""
        self.nats += _NATS_OF_A_MISS * piece.num_written
        self.num_counted += piece.num_written


def _words(labels: LabelTimes, transcript: Transcript, guesses: Sequence[Region]) -> Alignment:
    """From labels to words: what was not aligned is spread over its region."""
    first, stop = transcript.first, transcript.stop
    spoken = np.flatnonzero(first < stop)
    start, end, confidence = np.zeros(len(first)), np.zeros(len(first)), np.zeros(len(first))
    start[spoken], end[spoken] = labels.start[first[spoken]], labels.end[stop[spoken] - 1]
    total = np.concatenate([[0.0], np.cumsum(labels.posterior)])
    mean = (total[stop[spoken]] - total[first[spoken]]) / (stop[spoken] - first[spoken])
    confidence[spoken] = mean.clip(_LEAST_CONFIDENCE, 1)
    guessed = np.zeros(len(first), bool)
    for region in guesses:
        inside = slice(region.first, region.stop)
        begin, last = int(first[region.first]), int(stop[region.stop - 1])
        pace = (region.end - region.start) / max(1, last - begin)
        start[inside] = region.start + (first[inside] - begin) * pace
        end[inside] = region.start + (stop[inside] - begin) * pace
        guessed[inside] = True
    confidence[guessed] = 0.0
    starred = spoken[(transcript.ids[first[spoken]] == STAR) & ~guessed[spoken]]
    written = np.setdiff1d(spoken, starred)
    for word in starred:
        beside = int(np.searchsorted(written, word))
        neighbours = written[max(0, beside - 1) : beside + 1]
        confidence[word] = confidence[neighbours].min() if len(neighbours) else 0.0
    silent = np.flatnonzero(first == stop)
    for word, before in zip(silent, np.searchsorted(spoken, silent) - 1, strict=True):
        start[word] = end[word] = end[spoken[before]] if before >= 0 else start[spoken[0]]
        confidence[word] = confidence[spoken[max(before, 0)]]
    cost = max(0.0, labels.nats / labels.num_counted) if labels.num_counted else math.inf
    return Alignment(start, end, confidence, cost, int(guessed.sum()))


def word_times(
    alignment: Alignment, seconds_per_frame: float, duration: float, settings: AlignmentSettings
) -> tuple[Floats, Floats]:
    """Start and end of every word in seconds, float64 `[N]` each: ordered, without overlap, within [0, duration]."""
    label_end = alignment.end * seconds_per_frame
    before = np.append(0.0, label_end)[:-1]
    start = np.maximum(alignment.start * seconds_per_frame - settings.lead_ms / 1000, before).clip(0, duration)
    tail = settings.tail_ms / 1000 * (alignment.end > alignment.start)  # none for a word without labels
    end = np.minimum(label_end + tail, np.append(start[1:], duration))
    return start, np.maximum(start, end)


def refusal(alignment: Alignment, transcript: Transcript, num_frames: int, settings: AlignmentSettings) -> str | None:
    """Why an alignment is not to be believed, or None."""
    needed = transcript.frames_needed()
    if needed > num_frames:
        return f"the transcript is too long: {len(transcript.ids)} labels need {needed} frames, there are {num_frames}"
    if (transcript.ids[transcript.first[transcript.first < transcript.stop]] == STAR).all():
        return "the tokenizer of the model can write none of the transcript's words"
    if alignment.cost > settings.max_cost:
        return f"the transcript is not what was heard: {alignment.cost:.2f} nats a label, at most {settings.max_cost:g}"
    return None
