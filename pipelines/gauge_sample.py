"""Pieces of recordings for the gauge: choice, features, labels per target frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from numpy.typing import NDArray
from torch import Tensor

from bestrq.pretraining.gauge import UNKNOWN, FrameLabels, Ints, silent_frames
from bestrq.pretraining.quantizer import stack_frames
from common.errors import UserError
from common.hashing import hash_share
from data.corpora.espeak import Phone
from data.corpora.phones import UNKNOWN_PHONE
from data.format.dataset import Dataset

# A shorter remainder of a recording has few frames with context.
_SHORTEST_SECONDS = 0.5


@dataclass
class SampleSettings:
    """Recordings that fit and judge the targets."""

    dataset: str = ""
    """dataset folder, made by `python -m data.prepare`"""
    split: str = "dev"
    """split whose recordings judge the targets; empty takes all"""
    fit_split: str = "train"
    """split whose recordings fit clusters and projections, without those that judge; empty takes all"""
    language: str = ""
    """only recordings of this language; empty takes all"""
    minutes: PositiveFloat = 20.0
    """minutes that judge; 20 are 30,000 frames of 40 ms"""
    fit_minutes: PositiveFloat = 30.0
    """minutes that fit"""
    max_seconds: PositiveFloat = 30.0
    """longer recordings are cut into pieces of this length"""
    normalisation: Literal["recording", "dataset"] = "recording"
    """normalisation of the features; layers of an export get their own"""
    stride: PositiveInt = 4
    """mel frames per target frame, of all targets but those of an export"""

    def __post_init__(self) -> None:
        if self.max_seconds < _SHORTEST_SECONDS:
            raise UserError(f"data.max_seconds is {self.max_seconds}: give at least {_SHORTEST_SECONDS}")


@dataclass(frozen=True)
class Piece:
    """Mel frames [start, stop) of a recording."""

    recording: int
    start: int
    stop: int


def choose_pieces(
    dataset: Dataset, recordings: Sequence[int], minutes: float, max_seconds: float, seed: int
) -> list[Piece]:
    """Random pieces with a total of `minutes`, or all; recordings in random order, their pieces in the order of time.

    The choice is a pure function of ids and seed. Raises UserError if no recording is long enough.
    """
    rate = dataset.features.frames_per_second
    longest, shortest = round(max_seconds * rate), round(_SHORTEST_SECONDS * rate)
    pieces = []
    for i in recordings:
        for start in range(0, int(dataset.frames[i]), longest):
            piece = Piece(int(i), start, min(start + longest, int(dataset.frames[i])))
            if piece.stop - piece.start >= shortest:
                pieces.append((hash_share(f"{seed} {dataset.id(int(i))} {start}"), piece))
    if not pieces:
        raise UserError(f"{dataset.location}: no recording lasts {_SHORTEST_SECONDS} s; choose another split")
    chosen, frames = [], 0
    for _, piece in sorted(pieces, key=lambda pair: pair[0]):
        if frames >= minutes * 60 * rate:
            break
        chosen.append(piece)
        frames += piece.stop - piece.start
    order = {i: hash_share(f"{seed} {dataset.id(i)}") for i in {piece.recording for piece in chosen}}
    return sorted(chosen, key=lambda piece: (order[piece.recording], piece.recording, piece.start))


def draw_samples(dataset: Dataset, settings: SampleSettings, seed: int) -> tuple[list[Piece], list[Piece]]:
    """Pieces that judge, and pieces of other recordings that fit. Raises UserError if no recordings remain to fit."""
    judging = dataset.select(settings.split or None, settings.language or None).tolist()
    sample = choose_pieces(dataset, judging, settings.minutes, settings.max_seconds, seed)
    used = {piece.recording for piece in sample}
    others = dataset.select(settings.fit_split or None, settings.language or None).tolist()
    others = [i for i in others if i not in used]
    if not others:
        raise UserError(
            f"data.fit_split is {settings.fit_split!r}, and all its recordings judge the targets: give another split, "
            "or fewer data.minutes"
        )
    return sample, choose_pieces(dataset, others, settings.fit_minutes, settings.max_seconds, seed + 1)


def read_log_mel(dataset: Dataset, piece: Piece, normalisation: Literal["recording", "dataset"]) -> Tensor:
    """Normalised features of a piece, float32 `[F, M]`."""
    return torch.from_numpy(dataset.read_normalised(piece.recording, piece.start, piece.stop, normalisation))


def mel_stacks(log_mel: Tensor, stride: int) -> Tensor:
    """Stacks `[F // stride, stride * M]` of features `[F, M]`; an incomplete last stack is dropped."""
    count = len(log_mel) // stride
    return stack_frames(log_mel[None, : count * stride], stride)[0]


def frame_energy(dataset: Dataset, piece: Piece) -> NDArray[np.float64]:
    """Log power of every mel frame of a piece, float64 `[F]`."""
    values = dataset.read(piece.recording, piece.start, piece.stop).astype(np.float64)
    if dataset.features.standardized:
        return values.mean(axis=1)  # the power is not stored
    return np.log((np.exp(values) if dataset.features.logarithm else values).sum(axis=1).clip(min=1e-30))


def silence(dataset: Dataset, piece: Piece, stride: int) -> NDArray[np.bool_]:
    """Low-energy target frames of a piece, bool `[F // stride]`, by the mean power of their stack."""
    energy = frame_energy(dataset, piece)
    count = len(energy) // stride
    return silent_frames(np.log(np.exp(energy[: count * stride]).reshape(count, stride).mean(axis=1).clip(min=1e-30)))


def phone_ids(
    phones: Sequence[Phone] | None, piece: Piece, stride: int, hop_ms: float, vocabulary: dict[str, int]
) -> Ints:
    """Phone at the centre of every target frame, int64 `[F // stride]`.

    Frames between phones are pauses (""), and get an id like any phone. New symbols are added to the vocabulary. None
    stands for a piece without phones, whose frames are all `UNKNOWN`.
    """
    count = (piece.stop - piece.start) // stride
    ids = np.full(count, UNKNOWN, np.int64)
    if phones is None:
        return ids
    seconds = (piece.start + np.arange(count) * stride + (stride - 1) / 2) * hop_ms / 1000
    starts = np.array([phone.start for phone in phones])
    for frame, place in enumerate(np.searchsorted(starts, seconds, side="right") - 1):
        inside = place >= 0 and seconds[frame] < phones[place].end
        symbol = phones[place].symbol if inside else ""
        if symbol != UNKNOWN_PHONE:
            ids[frame] = vocabulary.setdefault(symbol, len(vocabulary))
    return ids


def frame_labels(
    dataset: Dataset, pieces: Sequence[Piece], phones: Sequence[list[Phone] | None] | None, stride: int
) -> tuple[FrameLabels, list[str]]:
    """Labels of the target frames of all pieces, and the symbols of the phones; no symbols without phones."""
    counts = [(piece.stop - piece.start) // stride for piece in pieces]
    hop_ms = dataset.features.hop_ms
    numbers = np.unique([piece.recording for piece in pieces], return_inverse=True)[1]
    # Recordings are numbered in their order in the sample, which is random.
    place = {number: k for k, number in enumerate(dict.fromkeys(numbers.tolist()))}
    vocabulary: dict[str, int] = {"": 0}
    ids = [
        phone_ids(known, piece, stride, hop_ms, vocabulary)
        for known, piece in zip(phones or [None] * len(pieces), pieces, strict=True)
    ]
    labels = FrameLabels(
        recording=np.repeat([place[number] for number in numbers.tolist()], counts),
        silent=np.concatenate([silence(dataset, piece, stride) for piece in pieces]),
        frame_ms=stride * hop_ms,
        phone=np.concatenate(ids) if any((part != UNKNOWN).any() for part in ids) else None,
        pause=vocabulary[""],
        speaker=_recording_label(dataset, "speaker", pieces, counts),
        language=_recording_label(dataset, "language", pieces, counts),
    )
    return labels, list(vocabulary) if labels.phone is not None else []


def _recording_label(
    dataset: Dataset, name: Literal["speaker", "language"], pieces: Sequence[Piece], counts: Sequence[int]
) -> Ints | None:
    """Label of every frame, `UNKNOWN` if empty; None if no recording has one."""
    names, codes = dataset.labels(name)
    values = np.array([codes[piece.recording] if names[codes[piece.recording]] else UNKNOWN for piece in pieces])
    return np.repeat(values.astype(np.int64), counts) if (values != UNKNOWN).any() else None
