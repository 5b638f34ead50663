"""Recordings of the probes: labelled ones for CTC, phones and ABX, and those of each speaker or language.

No text and no recording is on both sides of a probe: chunks of one recording in training and evaluation would make any
probe look perfect.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt

from bestrq.recognition.ctc import frames_needed, pad_labels
from common.errors import UserError
from common.hashing import hash_share
from common.json_lines import read_json_lines
from common.text import label_text
from data.format.dataset import Dataset, Normalisation
from data.tokenizer import CharTokenizer

EVALUATION_SHARE = 0.2
"""share of the texts for the evaluation, if no split is given for it"""
MIN_SECONDS = 0.5
PhoneSource = Literal["exact", "words", "synthesis"]
PHONE_SOURCES: tuple[PhoneSource, ...] = get_args(PhoneSource)
Times = list[tuple[str, float, float]]
"""symbol, start and end in seconds"""


@dataclass
class ProbeDataSettings:
    """Labelled recordings of the probes."""

    dataset: str = ""
    """dataset folder or URL with transcripts, made by `python -m data.prepare`"""
    split: str = "train"
    """split that the probes are trained on"""
    evaluation_split: str = "auto"
    """split that they are evaluated on; auto: dev if the dataset has it, otherwise a fifth of the texts of `split`"""
    language: str = ""
    """language of the labelled recordings; empty takes all"""
    minutes: PositiveFloat = 30.0
    """labelled audio for training, chosen at random by `seed`"""
    evaluation_minutes: PositiveFloat = 8.0
    """labelled audio for evaluation"""
    max_seconds: PositiveFloat = 16.0
    """longer recordings are left out"""
    per_class: PositiveInt = 40
    """recordings of each speaker and language for training; half as many for evaluation"""
    max_classes: PositiveInt = 20
    """speakers and languages: those with the most recordings"""
    phones: str = ""
    """for the phone probe and ABX: 'exact', 'words' or 'synthesis', sources of the phones of tools/gauge.py, or a file
    with JSON lines {"id": ..., "phones": [[symbol, start, end], ...]}, in seconds; empty takes the words of the
    dataset, whose letters have equal shares of their word's time"""
    seed: int = 0
    """seed of the choice of recordings"""


@dataclass(frozen=True)
class Labelled:
    """Labelled recordings of one side."""

    recordings: list[int]
    texts: list[str]
    labels: list[list[int]]


@dataclass(frozen=True)
class CTCData:
    """Labelled recordings of the CTC probes."""

    train: Labelled
    evaluation: Labelled
    tokenizer: CharTokenizer


@dataclass(frozen=True)
class ClassData:
    """Recordings of each speaker or language."""

    name: Literal["speaker", "language"]
    classes: list[str]
    train: list[tuple[int, int]]
    """recording and class"""
    evaluation: list[tuple[int, int]]


def select_labelled(dataset: Dataset, settings: ProbeDataSettings, stride: int) -> CTCData:
    """Choose labelled recordings for training and evaluation, without a common text.

    stride: mel frames per encoder frame; a recording must have enough encoder frames for its characters.

    Raises UserError if there are too few.
    """
    split = settings.evaluation_split
    if split == "auto":
        split = "dev" if settings.split != "dev" and "dev" in dataset.labels("split")[0] else ""
    if split == settings.split:
        raise UserError(f"evaluation_split is {split!r}, the split of the training: give another one, or ''")

    if split:
        evaluation = _labelled(dataset, settings, split, settings.evaluation_minutes, stride)
        held = {text for _, text in evaluation}
        is_held: Callable[[str], bool] = held.__contains__
    else:
        is_held = _in_evaluation
        evaluation = _labelled(dataset, settings, settings.split, settings.evaluation_minutes, stride, is_held)
    train = _labelled(dataset, settings, settings.split, settings.minutes, stride, lambda text: not is_held(text))
    if len(train) < 2 or len(evaluation) < 2:
        raise UserError(
            f"{dataset.location}: {len(train)} recordings to train a probe on and {len(evaluation)} to evaluate it on "
            f"have a transcript, {MIN_SECONDS} to {settings.max_seconds:g} s and a text of their own (language "
            f"{settings.language or 'any'!r}): give a dataset with transcripts, or another split or language"
        )
    tokenizer = CharTokenizer.train(text for _, text in [*train, *evaluation])
    sides = [
        Labelled([recording for recording, _ in side], [text for _, text in side],
                 [tokenizer.encode(text) for _, text in side])
        for side in (train, evaluation)
    ]  # fmt: skip
    return CTCData(sides[0], sides[1], tokenizer)


def _in_evaluation(text: str) -> bool:
    """Whether a text is held out, without a split for the evaluation."""
    return hash_share(text) < EVALUATION_SHARE


def _labelled(
    dataset: Dataset, settings: ProbeDataSettings, split: str, minutes: float, stride: int,
    keep: Callable[[str], bool] = bool,
) -> list[tuple[int, str]]:  # fmt: skip
    """Random recordings of a split with a label text that `keep` accepts, up to `minutes`; at least one if any."""
    found: list[tuple[int, str]] = []
    budget = 60 * minutes * dataset.features.frames_per_second
    order = np.random.default_rng(settings.seed).permutation(dataset.select(split, settings.language or None))
    for recording in order.tolist():
        frames = int(dataset.frames[recording])
        seconds = frames / dataset.features.frames_per_second
        if not MIN_SECONDS <= seconds <= settings.max_seconds:
            continue
        text = label_text(dataset.text(recording) or "", dataset.language(recording))
        if text and keep(text) and fits(text, frames, stride):
            budget -= frames
            if budget < 0 and found:
                break
            found.append((recording, text))
    return found


def fits(text: str, frames: int, stride: int) -> bool:
    """Whether a recording has enough encoder frames for the CTC labels of its text."""
    labels, lengths = pad_labels([[ord(character) for character in text]])
    return -(-frames // stride) >= int(frames_needed(labels, lengths))


def select_classes(
    dataset: Dataset, name: Literal["speaker", "language"], settings: ProbeDataSettings
) -> ClassData | str:
    """Choose recordings of each speaker or language, or give the reason why that is impossible.

    The side of a recording depends on its text (on its id without one), so no text is on both sides.
    """
    names, codes = dataset.labels(name)
    in_split = np.zeros(len(dataset), bool)
    in_split[dataset.select(settings.split)] = True
    seconds = dataset.frames / dataset.features.frames_per_second
    usable = in_split & (seconds >= MIN_SECONDS) & (seconds <= settings.max_seconds)
    counts = np.bincount(codes[usable], minlength=len(names))
    largest = [int(code) for code in np.argsort(-counts, kind="stable") if names[code] and counts[code]]
    rng = np.random.default_rng(settings.seed)
    classes: list[str] = []
    sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for code in largest[: settings.max_classes]:
        members: tuple[list[int], list[int]] = ([], [])
        limits = settings.per_class, -(-settings.per_class // 2)
        for recording in rng.permutation(np.flatnonzero(usable & (codes == code))).tolist():
            text = label_text(dataset.text(recording) or "", dataset.language(recording))
            side = int(hash_share(f"{settings.seed} {text or dataset.id(recording)}") < 1 / 3)
            if len(members[side]) < limits[side]:
                members[side].append(recording)
            if all(len(part) == limit for part, limit in zip(members, limits, strict=True)):
                break
        if len(members[0]) >= 8 and len(members[1]) >= 4:
            for pairs, part in zip(sides, members, strict=True):
                pairs += [(recording, len(classes)) for recording in part]
            classes.append(names[code])
    if len(classes) < 2:
        return f"fewer than two {name}s have 8 recordings for training and 4 for evaluation"
    return ClassData(name, classes, *sides)


def read_times(dataset: Dataset, settings: ProbeDataSettings, recordings: Sequence[int]) -> list[Times]:
    """Phones, or else letters, of the recordings with their times; an empty list for a recording without times.

    Raises UserError if the file of phones cannot be read, or their source does not fit the dataset.
    """
    if not settings.phones:
        return [letters(dataset, recording) for recording in recordings]
    if settings.phones in PHONE_SOURCES:
        return _spoken_phones(dataset, settings.phones, recordings)
    try:
        rows = {row["id"]: row["phones"] for row in read_json_lines(Path(settings.phones))}
        return [
            [(str(symbol), float(start), float(end)) for symbol, start, end in rows.get(dataset.id(recording), [])]
            for recording in recordings
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'phones = {settings.phones}: cannot be read ({error!r}); give lines {{"id": ..., "phones": [[symbol, '
            "start, end], ...]}"
        ) from error


def _spoken_phones(dataset: Dataset, source: PhoneSource, recordings: Sequence[int]) -> list[Times]:
    """Phones of the gauge, without pauses and unknown phones."""
    from data.corpora.phones import UNKNOWN_PHONE
    from pipelines.gauge_phones import PhoneSettings, find_phones
    from pipelines.gauge_sample import Piece

    pieces = [Piece(recording, 0, int(dataset.frames[recording])) for recording in recordings]
    found, _ = find_phones(dataset, pieces, PhoneSettings(source))
    return [[phone for phone in phones or [] if phone.symbol not in ("", UNKNOWN_PHONE)] for phones in found or []]


def read_words(dataset: Dataset, recordings: Sequence[int]) -> list[Times]:
    """Words of the recordings with their times; an empty list for a recording without word times."""
    found = []
    for recording in recordings:
        language = dataset.language(recording)
        words = [(label_text(w.word, language), w.start, w.end) for w in dataset.words(recording) or []]
        found.append([word for word in words if word[0] and word[2] > word[1]])
    return found


def letters(dataset: Dataset, recording: int) -> Times:
    """Letters of the words with times: each has an equal share of its word."""
    return [
        (letter, start + k * (end - start) / len(word), start + (k + 1) * (end - start) / len(word))
        for word, start, end in read_words(dataset, [recording])[0]
        for k, letter in enumerate(word)
    ]


def read_log_mel(dataset: Dataset, recordings: Sequence[int], normalisation: Normalisation) -> list[torch.Tensor]:
    """Normalised frames of the recordings, float32 `[F, M]`."""
    read = (dataset.read_normalised(recording, normalisation=normalisation) for recording in recordings)
    return [torch.from_numpy(frames) for frames in read]
