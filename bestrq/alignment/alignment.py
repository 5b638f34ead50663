"""Word times by forced alignment with the log-probabilities of a CTC recogniser, in bounded memory.

One Viterbi pass over T frames and U labels keeps T x U cells: 18 billion for two hours. Therefore the recording is cut
where transcript and greedy decoding agree (`pieces.plan_pieces`), and every piece is aligned by
`torchaudio.functional.forced_align`.

The star is an additional label that has the probability of the most probable label in every frame, so that it absorbs
audio without words at no cost. It represents a word that the tokenizer cannot encode, and is inserted between the words
of a region with many more decoded labels than transcript labels.

Sources: `forced_align` is Viterbi over the lattice of Graves et al. 2006; the star is from Pratap et al. 2023, "Scaling
Speech Technology to 1,000+ Languages".

Shapes: T encoder frames, V vocabulary, U labels, N words.
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

# Approximate cost of a label from another recording's transcript; applied to every label of a piece without alignment.
_NATS_PER_MISSING_LABEL = 7.0
# Maximum bytes of one recording's log-probabilities in memory; beyond it, they are kept in a temporary file.
_SPOOL_BYTES = 64 << 20
# Smallest confidence of an aligned word; 0, even after rounding, is reserved for words that are not aligned.
_LEAST_CONFIDENCE = 0.001
# Log-probability of an impossible label, within the range of float16.
_LOWEST = -10_000.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AlignmentSettings:
    """Placement of words, memory limits, and the cost above which a transcript is refused."""

    max_cost: float = 3.0
    """Largest difference in log-probability between greedy decoding and the best path through the transcript, in nats
    per label; above it, the recording counts as unaligned. Correct transcripts cost 0.1 to 2, those of another
    recording 3.5 to 12."""
    lead_ms: float = 40.0
    """Start of a word, in milliseconds before the frame of its first label, since a sound is recognised only after it
    has started."""
    tail_ms: float = 15.0
    """End of a word, in milliseconds after the frame of its last label, but not after the start of the next word."""
    piece_cells: int = 4_000_000
    """Largest number of cells of a piece of several regions, frames x (2 labels + 1 + vocabulary); smaller values give
    more pieces."""
    max_cells: int = 100_000_000
    """Largest number of cells of a region that cannot be cut, 1 to 10 bytes each. The words of a larger region get
    times in proportion to their lengths, with confidence 0."""

    def __post_init__(self) -> None:
        if not self.max_cost > 0:
            raise UserError(f"alignment.max_cost is {self.max_cost}: give a positive number of nats, such as 3")
        for name in ("lead_ms", "tail_ms"):
            if not 0 <= getattr(self, name) < 1000:
                raise UserError(f"alignment.{name} is {getattr(self, name)}: give 0 or more, and less than 1000")
        if not 0 < self.piece_cells <= self.max_cells:
            raise UserError(
                f"alignment.piece_cells is {self.piece_cells} and alignment.max_cells is {self.max_cells}: "
                "give positive numbers, with piece_cells <= max_cells"
            )


@dataclass(frozen=True)
class Alignment:
    """Positions of N words, in encoder frames."""

    start: Floats
    """float64 `[N]`, frame of the first label. A word without labels has length 0, at the end of the previous word"""
    end: Floats
    """float64 `[N]`, frame after the last label; not after the start of the next word"""
    confidence: Floats
    """float64 `[N]` from 0 to 1: mean posterior of the word's labels; 0 for a guessed word. A starred word gets the
    smaller confidence of its neighbours, which determine its position"""
    cost: float
    """difference in log-probability between greedy decoding and the transcript, in nats per label; infinite if all
    words are starred"""
    num_guessed: int
    """words whose times are guessed: their region could not be aligned"""


class LogProbSpool:
    """Buffer for the log-probabilities of one recording at a time, float16, in a temporary file if they are large.

    `keep` is passed as the `reduce` of `inference.transcribe`, which calls it in the order of recordings and windows.
    If the spool is cleared after every recording, it always holds the recording that was returned last.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 - has the spool's lifetime

    def keep(self, log_probs: Tensor) -> Tensor:
        """Append log-probabilities `[n, V]` and return the most probable labels, int64 `[n]`."""
        self._file.write(log_probs.clamp(min=_LOWEST).to("cpu", torch.float16).numpy().tobytes())
        return log_probs.argmax(dim=-1)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Frames [start, stop), float32 `[stop - start, V]`."""
        width = 2 * self.vocab_size
        self._file.seek(start * width)
        values = np.frombuffer(self._file.read((stop - start) * width), np.float16)
        return values.reshape(stop - start, self.vocab_size).astype(np.float32)

    def clear(self) -> None:
        """Remove all frames."""
        self._file.seek(0)
        self._file.truncate()


def exclude_frames(
    read: Callable[[int, int], NDArray[np.float32]], excluded: NDArray[np.bool_]
) -> Callable[[int, int], NDArray[np.float32]]:
    """Wrap `read`, which returns log-probabilities `[n, V]`: the blank has probability 1 in excluded frames, bool
    `[T]`."""

    def blanked(start: int, stop: int) -> NDArray[np.float32]:
        log_probs = read(start, stop)
        log_probs[excluded[start:stop]] = _LOWEST
        log_probs[excluded[start:stop], BLANK] = 0.0
        return log_probs

    return blanked


def forced_alignment(
    read: Callable[[int, int], NDArray[np.float32]],
    best: Labels,
    transcript: Transcript,
    vocab_size: int,
    settings: AlignmentSettings,
) -> Alignment:
    """Align the words of a transcript with a recording.

    Args:
        read: returns the log-probabilities of frames start to stop - 1, float32 `[stop - start, V]`.
        best: int64 `[T]`, most probable label of every frame.
        transcript: words, at least one of which has labels.
    """
    if not len(transcript.ids):
        raise ValueError("the transcript has no labels to align")
    labels = LabelTimes(len(transcript.ids))
    guesses: list[Region] = []
    for piece in plan_pieces(transcript, best, vocab_size, settings.piece_cells, settings.max_cells):
        if piece.possible:
            labels.align(piece, read(piece.regions[0].start, piece.regions[-1].end), best)
        else:
            labels.skip(piece)
            guesses += piece.regions
    return _word_alignment(labels, transcript, guesses)


class LabelTimes:
    """Frames and posterior of every label of a transcript, filled piece by piece."""

    def __init__(self, num_labels: int) -> None:
        self.start = np.zeros(num_labels)
        self.end = np.zeros(num_labels)
        self.posterior = np.zeros(num_labels)
        self.nats = 0.0
        self.num_counted = 0

    def align(self, piece: Piece, log_probs: NDArray[np.float32], best: Labels) -> None:
        """Align one piece.

        Args:
            log_probs: float32 `[piece.frames, V]`.
            best: int64 `[T]`, most probable label of every frame of the recording.
        """
        star = log_probs.shape[1]
        highest = log_probs.max(axis=1, keepdims=True)
        ids = np.array(piece.ids, np.int64)
        ids[ids == STAR] = star
        emissions = torch.from_numpy(np.concatenate([log_probs, highest], axis=1))
        path, scores = (batch[0].numpy() for batch in forced_align(emissions[None], torch.from_numpy(ids)[None]))
        start = np.flatnonzero(np.diff(path, prepend=-1))
        end = np.append(start[1:], len(path))
        posterior = np.add.reduceat(np.exp(scores), start) / (end - start)
        kept = path[start] != BLANK  # leaves one run per id
        start, end, posterior = start[kept], end[kept], posterior[kept]
        offset = piece.regions[0].start
        for number in np.flatnonzero(ids == star):  # the run of a star includes the silence around its labels
            labelled = np.flatnonzero(best[offset + start[number] : offset + end[number]] != BLANK)
            if len(labelled):
                start[number], end[number] = start[number] + labelled[0], start[number] + labelled[-1] + 1
        places = np.array(piece.places)
        in_word = places >= 0
        self.start[places[in_word]] = offset + start[in_word]
        self.end[places[in_word]] = offset + end[in_word]
        self.posterior[places[in_word]] = posterior[in_word]
        self.nats += float(highest.sum(dtype=np.float64) - scores.sum(dtype=np.float64))
        self.num_counted += piece.num_labels

    def skip(self, piece: Piece) -> None:
        """Count the labels of a piece that cannot be aligned as missing in the audio."""
        self.nats += _NATS_PER_MISSING_LABEL * piece.num_labels
        self.num_counted += piece.num_labels


def _word_alignment(labels: LabelTimes, transcript: Transcript, guesses: Sequence[Region]) -> Alignment:
    """Alignment of words from that of labels; labels of the regions in `guesses` are spread evenly over the region."""
    first, stop = transcript.first, transcript.stop
    labelled = np.flatnonzero(first < stop)
    start, end, confidence = np.zeros(len(first)), np.zeros(len(first)), np.zeros(len(first))
    start[labelled], end[labelled] = labels.start[first[labelled]], labels.end[stop[labelled] - 1]
    total = np.concatenate([[0.0], np.cumsum(labels.posterior)])
    mean = (total[stop[labelled]] - total[first[labelled]]) / (stop[labelled] - first[labelled])
    confidence[labelled] = mean.clip(_LEAST_CONFIDENCE, 1)
    guessed = np.zeros(len(first), bool)
    for region in guesses:
        words = slice(region.first, region.stop)
        first_label, last_label = int(first[region.first]), int(stop[region.stop - 1])
        frames_per_label = (region.end - region.start) / max(1, last_label - first_label)
        start[words] = region.start + (first[words] - first_label) * frames_per_label
        end[words] = region.start + (stop[words] - first_label) * frames_per_label
        guessed[words] = True
    confidence[guessed] = 0.0
    starred = labelled[(transcript.ids[first[labelled]] == STAR) & ~guessed[labelled]]
    written = np.setdiff1d(labelled, starred)
    for word in starred:
        following = int(np.searchsorted(written, word))
        neighbours = written[max(0, following - 1) : following + 1]
        confidence[word] = confidence[neighbours].min() if len(neighbours) else 0.0
    unlabelled = np.flatnonzero(first == stop)
    for word, before in zip(unlabelled, np.searchsorted(labelled, unlabelled) - 1, strict=True):
        start[word] = end[word] = end[labelled[before]] if before >= 0 else start[labelled[0]]
        confidence[word] = confidence[labelled[max(before, 0)]]
    cost = max(0.0, labels.nats / labels.num_counted) if labels.num_counted else math.inf
    return Alignment(start, end, confidence, cost, int(guessed.sum()))


def word_times(
    alignment: Alignment, seconds_per_frame: float, duration: float, settings: AlignmentSettings
) -> tuple[Floats, Floats]:
    """Start and end of every word in seconds, float64 `[N]` each: ordered, without overlap, within [0, duration]."""
    label_end = alignment.end * seconds_per_frame
    previous_end = np.append(0.0, label_end)[:-1]
    start = np.maximum(alignment.start * seconds_per_frame - settings.lead_ms / 1000, previous_end).clip(0, duration)
    tail = settings.tail_ms / 1000 * (alignment.end > alignment.start)  # none for a word without labels
    end = np.minimum(label_end + tail, np.append(start[1:], duration))
    return start, np.maximum(start, end)


def refusal(alignment: Alignment, transcript: Transcript, num_frames: int, settings: AlignmentSettings) -> str | None:
    """Reason to refuse an alignment, or None. The part before a colon is a key in the files of tools/align.py."""
    needed = transcript.frames_needed()
    if needed > num_frames:
        return (
            f"the transcript is too long: {len(transcript.ids)} labels need {needed} frames, the recording has "
            f"{num_frames}"
        )
    if (transcript.ids[transcript.first[transcript.first < transcript.stop]] == STAR).all():
        return "the tokenizer of the model can write none of the transcript's words"
    if alignment.cost > settings.max_cost:
        nats = f"{alignment.cost:.2f} nats per label, at most {settings.max_cost:g}"
        return f"the transcript is not what was heard: {nats}"
    return None
