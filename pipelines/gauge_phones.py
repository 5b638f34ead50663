"""Phones of a sample for the gauge, from the best source that the dataset has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.functional import forced_align

from bestrq.decoding.tokens import BLANK
from bestrq.pretraining.gauge import silent_frames
from bestrq.pretraining.gauge_targets import cepstra
from bestrq.pretraining.teacher import nearest_label
from common.errors import UserError
from common.segments import Segments
from common.text import label_text
from data.audio.reading import resample
from data.corpora.espeak import Phone
from data.corpora.phones import ExactPhones, is_synthetic, phones_in_words, speak_transcript
from data.format.dataset import Dataset
from data.log_mel import LogMel
from data.transcripts import Word
from pipelines.gauge_exports import CTCOutputs
from pipelines.gauge_sample import Piece, frame_energy, read_log_mel

Source = Literal["auto", "exact", "characters", "words", "synthesis", "none"]
# Above this cost in nats per label a transcript is refused: `alignment.max_cost` (bestrq/alignment/alignment.py).
_MAX_COST = 3.0
# A low-energy run of this length is a pause; stop closures are shorter.
_PAUSE_SECONDS = 0.15
# Half the width of the band of dynamic time warping, as a share of the length.
_BAND = 0.2
_ORIGIN = {
    "exact": "exact phones of espeak-ng: the corpus is synthesised again",
    "characters": "characters, by forced alignment with the CTC export {aligner}; they stand for phones",
    "words": "phones of espeak-ng for every word, stretched to the dataset's word times",
    "synthesis": "phones of espeak-ng: its speech for the transcript is aligned with the recording by dynamic time "
    "warping",
    "none": "none",
}


@dataclass
class PhoneSettings:
    """Phones that targets are compared with."""

    source: Source = "auto"
    """'exact': of a synthetic corpus. 'characters': forced alignment with `phones.aligner`. 'words': espeak's phones in
    the dataset's word times. 'synthesis': espeak's speech for the transcript, aligned by dynamic time warping. 'none':
    no figures of phones. 'auto': the first of these that is possible"""
    aligner: str = ""
    """'characters': export of a CTC recogniser, or of a transducer with a CTC head"""

    def __post_init__(self) -> None:
        if self.source == "characters" and not self.aligner:
            raise UserError("phones.aligner is missing: --phones.source characters needs --phones.aligner EXPORT")
        if self.aligner and self.source not in ("auto", "characters"):
            raise UserError(f"phones.aligner has no effect with phones.source {self.source!r}: leave one out")


def find_phones(
    dataset: Dataset, pieces: Sequence[Piece], settings: PhoneSettings
) -> tuple[list[list[Phone] | None] | None, str]:
    """Phones of every piece (None for a piece without), and a sentence on their origin.

    Times are in seconds from the start of the recording. Raises UserError if the source does not fit the dataset.
    """
    source = settings.source
    if source == "auto":
        source = _best_source(dataset, pieces, settings)
    found: list[list[Phone] | None] | None = None
    if source == "exact":
        exact = ExactPhones(dataset.path)
        found = [exact(dataset.id(piece.recording), dataset.words(piece.recording)) for piece in pieces]
    elif source == "characters":
        found = aligned_characters(dataset, pieces, settings.aligner)
    elif source == "words":
        found = []
        for piece in pieces:
            rate, words = dataset.features.frames_per_second, dataset.words(piece.recording)
            spoken = [w for w in words or [] if w.start * rate < piece.stop and w.end * rate > piece.start]
            found.append(phones_in_words(spoken, dataset.language(piece.recording)) if words else None)
    elif source == "synthesis":
        extractor = LogMel(dataset.features)
        found = [aligned_synthesis(dataset, piece, extractor) for piece in pieces]
    if found is not None and all(phones is None for phones in found):
        raise UserError(
            f"phones.source is {source!r}, but no recording of the sample has phones by it (transcripts or word times "
            "are missing, or refused): give another source, or none"
        )
    covered = sum(piece.stop - piece.start for piece, phones in zip(pieces, found or [], strict=False) if phones)
    share = covered / sum(piece.stop - piece.start for piece in pieces)
    origin = _ORIGIN[source].format(aligner=settings.aligner)
    return found, origin if source == "none" else f"{origin} ({share:.0%} of the sample)"


def _best_source(dataset: Dataset, pieces: Sequence[Piece], settings: PhoneSettings) -> Source:
    if "://" not in dataset.location and is_synthetic(dataset.path):
        return "exact"
    if settings.aligner:
        return "characters"
    spoken = [piece.recording for piece in pieces if dataset.language(piece.recording)]
    if any(dataset.words(recording) for recording in spoken):
        return "words"
    return "synthesis" if any(dataset.text(recording) for recording in spoken) else "none"


def _words_of(dataset: Dataset, piece: Piece) -> list[Word]:
    """Words with times that lie within a piece; the last one may end after the recording."""
    rate = dataset.features.frames_per_second
    stop = math.inf if piece.stop == dataset.frames[piece.recording] else piece.stop
    words = dataset.words(piece.recording) or []
    return [word for word in words if piece.start <= word.start * rate and word.end * rate <= stop]


def _text_of(dataset: Dataset, piece: Piece) -> str:
    """Transcript of a piece: that of the recording if the piece covers it, else its words; empty if unknown."""
    if piece.stop - piece.start == dataset.frames[piece.recording]:
        return dataset.text(piece.recording) or ""
    return " ".join(word.word for word in _words_of(dataset, piece))


def long_runs(silent: NDArray[np.bool_], seconds: float) -> NDArray[np.bool_]:
    """Frames in low-energy runs of at least 150 ms, bool, for frames of the given length."""
    found = np.zeros(len(silent), bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent.astype(np.int8), [0]])))
    for first, stop in edges.reshape(-1, 2).tolist():
        found[first:stop] = (stop - first) * seconds >= _PAUSE_SECONDS
    return found


def intervals(symbols: Sequence[str], silent: NDArray[np.bool_], start: float, seconds: float) -> list[Phone]:
    """Runs of equal symbols as phones; low-energy runs of 150 ms and more are pauses.

    Args:
        symbols: of every frame.
        silent: bool, of the same frames.
        start: seconds of the first frame.
        seconds: per frame.
    """
    kept = ["" if paused else symbol for symbol, paused in zip(symbols, long_runs(silent, seconds), strict=True)]
    phones: list[Phone] = []
    first = 0
    for frame in range(1, len(kept) + 1):
        if frame == len(kept) or kept[frame] != kept[first]:
            phones.append(Phone(kept[first], start + first * seconds, start + frame * seconds))
            first = frame
    return phones


# ---- characters by forced alignment


def aligned_characters(dataset: Dataset, pieces: Sequence[Piece], aligner: str) -> list[list[Phone] | None]:
    """Labels of an export's tokenizer as phones: every frame belongs to the nearest label of the best CTC path.

    None for a piece whose transcript is missing, too long, has characters that the tokenizer lacks, or does not match
    (more than 3 nats per label above greedy decoding). Separators of words belong to the neighbouring labels.
    """
    model = CTCOutputs(aligner, dataset)
    outputs, stride = model(pieces)
    return [_align(dataset, piece, log_probs, model, stride) for piece, log_probs in zip(pieces, outputs, strict=True)]


def _align(dataset: Dataset, piece: Piece, log_probs: Tensor, model: CTCOutputs, stride: int) -> list[Phone] | None:
    text = label_text(_text_of(dataset, piece), dataset.language(piece.recording))
    try:
        ids = torch.tensor(model.tokenizer.encode(text), dtype=torch.int64)
    except UserError:  # a character that the tokenizer lacks
        return None
    repeats = int((ids[1:] == ids[:-1]).sum()) if len(ids) else 0
    if not len(ids) or len(ids) + repeats > len(log_probs):
        return None
    path, scores = (batch[0] for batch in forced_align(log_probs[None], ids[None]))
    # Cost above greedy decoding.
    if float(log_probs.max(dim=1).values.sum() - scores.sum()) / len(ids) > _MAX_COST:
        return None
    names = model.tokenizer.pieces
    separators = torch.tensor([k for k, name in enumerate(names) if not name.strip(" \u2581")], dtype=torch.int64)
    path = torch.where(torch.isin(path, separators), BLANK, path)
    whole = Segments(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[len(path)]]), len(path))
    path = path[nearest_label(path[None], whole, 1)[0]]
    energy = frame_energy(dataset, piece)[: len(path) * stride].reshape(len(path), stride).mean(axis=1)
    hop = dataset.features.hop_ms / 1000
    symbols = [names[label] if label != BLANK else "" for label in path.tolist()]
    return intervals(symbols, silent_frames(energy), piece.start * hop, stride * hop)


# ---- phones by alignment with synthetic speech


def aligned_synthesis(dataset: Dataset, piece: Piece, extractor: LogMel) -> list[Phone] | None:
    """Phones of espeak's speech for the transcript of a piece, moved to the recording by dynamic time warping.

    None without a transcript, or if espeak cannot speak one of its words.
    """
    text = _text_of(dataset, piece)
    spoken = speak_transcript(text, dataset.language(piece.recording)) if text else None
    if spoken is None:
        return None
    waveform, rate, phones = spoken
    # Noise 40 dB below speech, as digital silence is unlike any recording.
    noise = np.random.default_rng(0).standard_normal(len(waveform), dtype=np.float32)
    waveform = waveform + noise * np.float32(0.01 * np.sqrt(np.mean(waveform**2)))
    made = directions(_standardised(extractor(resample([waveform], rate, dataset.features.sample_rate))))
    read = directions(read_log_mel(dataset, piece, "recording"))
    hop = dataset.features.hop_ms / 1000
    starts = np.array([phone.start for phone in phones])
    phone_of = np.searchsorted(starts, np.arange(len(made)) * hop, side="right") - 1
    voiced = np.array([bool(phones[place].symbol) for place in phone_of])
    silent = silent_frames(frame_energy(dataset, piece))
    speech = ~long_runs(silent, hop)
    if not speech.any() or not voiced.any():
        return None
    columns = warp((1 - read[torch.from_numpy(speech)] @ made[torch.from_numpy(voiced)].T).numpy())
    symbols = np.full(len(read), "", dtype=object)
    symbols[speech] = [phones[place].symbol for place in phone_of[voiced][columns.round().astype(int)]]
    return intervals(symbols.tolist(), silent, piece.start * hop, hop)


def directions(log_mel: Tensor) -> Tensor:
    """Cepstra with unit variances, scaled to unit norm, `[F, 39]`, from normalised log-mel `[F, M]`.

    Their inner product is a cosine: by Euclidean distance, a frame near the mean would be close to every other frame.
    """
    return F.normalize(_standardised(cepstra(log_mel)), dim=1)


def _standardised(values: Tensor) -> Tensor:
    """Zero mean and unit variance in every column, as the dataset normalises recordings."""
    return (values - values.mean(dim=0)) / values.std(dim=0).clamp(min=1e-3)


def warp(cost: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean column of every row on the path of least cost through `[n, m]`, from corner to corner, float64 `[n]`.

    Dynamic time warping with steps (1, 1), (1, 0) and (0, 1) of equal weight per frame, so a diagonal step counts twice
    (Sakoe and Chiba 1978, symmetric form), within a band of a fifth of the length around the diagonal.
    """
    rows, columns = cost.shape
    steps = np.zeros((rows + columns - 1, rows), np.int8)  # of anti-diagonal k and row i: 0 diagonal, 1 down, 2 right
    slope = (columns - 1) / max(rows - 1, 1)
    width = _BAND * max(columns, 10) + max(slope, 1)  # at least a step, so that the band has no holes
    # Row i of cell (i, k - i) is stored at i + 1.
    before, last, total = (np.full(rows + 1, np.inf) for _ in range(3))
    for k in range(rows + columns - 1):
        first, stop = max(0, k - columns + 1), min(rows, k + 1)
        row = np.arange(first, stop)
        local = np.where(np.abs(k - row - slope * row) <= width, cost[row, k - row], np.inf)
        choices = np.stack(
            [before[first:stop] + 2 * local, last[first:stop] + local, last[first + 1 : stop + 1] + local]
        )
        steps[k, first:stop] = choices.argmin(axis=0)
        total[:] = np.inf
        total[first + 1 : stop + 1] = choices.min(axis=0) if k else local
        before, last, total = last, total, before
    sums, counts = np.zeros(rows), np.zeros(rows)
    i, j = rows - 1, columns - 1
    while True:
        sums[i] += j
        counts[i] += 1
        if i == 0 and j == 0:
            return sums / counts
        step = steps[i + j, i] if i and j else (1 if i else 2)
        i, j = i - (step < 2), j - (step != 1)
