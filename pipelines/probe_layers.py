"""All probes of one layer, on recordings that are read once.

Values are per recording, as errors: lower is better in every probe. The summary (`pipelines.probing`) computes rates
and intervals over recordings from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bestrq.pretraining.abx import Tokens, abx_errors, draw_triples
from bestrq.pretraining.layer_features import Frames, effective_ranks, frame_correlation, frame_labels, spans
from bestrq.pretraining.probing import CTCProbeSettings, linear_probe, train_ctc_probe
from bestrq.scoring.word_errors import score_recording
from data.format.dataset import Dataset, Normalisation
from pipelines.probe_data import (
    ClassData,
    CTCData,
    ProbeDataSettings,
    Times,
    read_log_mel,
    read_times,
    read_words,
    select_classes,
    select_labelled,
)

MAX_PHONE_FRAMES = 20_000
"""training frames of the phone probe"""
ABX_TRIPLES = 2000
ABX_SECONDS = 0.06, 1.0
"""shortest and longest token of ABX"""


@dataclass(frozen=True)
class Material:
    """Recordings of all probes, and what is computed from labels alone."""

    ctc: CTCData
    times: list[Times]
    """phones or letters of the labelled recordings: training, then evaluation"""
    classes: list[ClassData]
    abx: dict[str, np.ndarray]
    """triples int64 [P, 3] by name, 'abx_within' and 'abx_across'; missing if no triple is possible"""
    abx_places: list[tuple[int, float, float]]
    """of every ABX token: place in the labelled recordings, start and end in seconds"""
    skipped: dict[str, str]
    """probe -> reason why it is impossible with this dataset"""

    @property
    def labelled(self) -> list[int]:
        """Recordings for training, then for evaluation."""
        return [*self.ctc.train.recordings, *self.ctc.evaluation.recordings]


def read_material(dataset: Dataset, settings: ProbeDataSettings, stride: int) -> Material:
    """Choose the recordings of all probes. Raises UserError without labelled recordings."""
    ctc = select_labelled(dataset, settings, stride)
    skipped: dict[str, str] = {}
    classes = []
    for name in ("speaker", "language"):
        chosen = select_classes(dataset, name, settings)
        if isinstance(chosen, str):
            skipped[name] = chosen
        else:
            classes.append(chosen)
    recordings = [*ctc.train.recordings, *ctc.evaluation.recordings]
    times = read_times(dataset, settings, recordings)
    if not any(times[: len(ctc.train.recordings)]) or not any(times[len(ctc.train.recordings) :]):
        skipped["phone"] = "the labelled recordings have no word times and there is no file of phones"
        times = []
    abx, places = _abx_triples(dataset, settings, recordings, times)
    for name in ("abx_within", "abx_across"):
        if name not in abx:
            skipped[name] = "no three tokens of two words (or phones) have times and the speakers that it needs"
    return Material(ctc, times, classes, abx, places, skipped)


def _abx_triples(
    dataset: Dataset, settings: ProbeDataSettings, recordings: Sequence[int], times: Sequence[Times]
) -> tuple[dict[str, np.ndarray], list[tuple[int, float, float]]]:
    """Triples by name, and the place of every token: words, or phones if there is a file of them."""
    units = times if settings.phones else read_words(dataset, recordings)
    shortest, longest = ABX_SECONDS
    kept = [
        (symbol, place, start, end)
        for place, unit in enumerate(units)
        if dataset.speaker(recordings[place])  # unknown speakers are not one speaker
        for symbol, start, end in unit
        if shortest <= end - start <= longest
    ]
    symbols = {symbol: number for number, symbol in enumerate(sorted({token[0] for token in kept}))}
    speakers = dataset.labels("speaker")[1]
    tokens = Tokens(
        [symbols[symbol] for symbol, _, _, _ in kept],
        [int(speakers[recordings[place]]) for _, place, _, _ in kept],
        [place for _, place, _, _ in kept],
    )
    triples = {
        f"abx_{name}": draw_triples(tokens, ABX_TRIPLES, name == "across", settings.seed)
        for name in ("within", "across")
    }
    return {name: drawn for name, drawn in triples.items() if len(drawn)}, [token[1:] for token in kept]


@dataclass(frozen=True)
class LogMel:
    """Normalised log-mel of the recordings of a material, float32 [F, M] each."""

    labelled: list[Tensor]
    classes: list[Tensor]
    """recordings of all classes: for each class data training, then evaluation"""


def read_features(dataset: Dataset, material: Material, normalisation: Normalisation) -> LogMel:
    """Read all recordings of a material."""
    numbers = [number for data in material.classes for number, _ in [*data.train, *data.evaluation]]
    return LogMel(
        read_log_mel(dataset, material.labelled, normalisation), read_log_mel(dataset, numbers, normalisation)
    )


def probe_ctc(
    layers: Sequence[Frames], dataset: Dataset, data: CTCData, settings: CTCProbeSettings, device: torch.device
) -> dict[str, Any]:
    """CTC probe of one layer or of a weighted sum, as errors and sizes per evaluation recording."""
    count = len(data.train.recordings)
    sides = [
        [layer.select(numbers) for layer in layers]
        for numbers in (range(count), range(count, count + len(data.evaluation.recordings)))
    ]
    result = train_ctc_probe(
        sides[0], data.train.labels, sides[1], data.evaluation.labels, data.tokenizer.vocab_size, settings, device
    )
    characters = [
        score_recording("", text, data.tokenizer.decode(ids), dataset.language(recording)).characters
        for recording, text, ids in zip(
            data.evaluation.recordings, data.evaluation.texts, result.hypotheses, strict=True
        )
    ]
    return {
        "nats": {"errors": result.nats, "sizes": [len(labels) for labels in data.evaluation.labels]},
        "cer": {"errors": [c.errors for c in characters], "sizes": [c.reference_length for c in characters]},
        "train_nats": result.train_nats_per_label,
        "layer_weights": result.layer_weights,
    }


def describe_frames(layer: Frames, hop_ms: float) -> dict[str, float]:
    """Figures of a layer that need no labels."""
    rank, rank_entropy = effective_ranks(layer.values)
    correlation = frame_correlation(layer, hop_ms)
    return {"frame_correlation": correlation, "effective_rank": rank, "effective_rank_entropy": rank_entropy}


def probe_classes(data: ClassData, features: Tensor) -> dict[str, list[float]]:
    """Speaker or language identification from pooled features, training then evaluation; errors per recording."""
    count = len(data.train)
    labels = torch.tensor([number for _, number in [*data.train, *data.evaluation]])
    predicted = linear_probe(features[:count], labels[:count], features[count:], len(data.classes))
    return {"errors": (predicted != labels[count:]).double().tolist(), "sizes": [1.0] * len(data.evaluation)}


def phone_labels(layer: Frames, material: Material, hop_ms: float) -> tuple[Tensor, list[str]]:
    """Phone of every frame of the labelled recordings, int64; -1 outside of phones, and for unseen phones."""
    count = len(material.ctc.train.recordings)
    symbols = sorted({symbol for times in material.times[:count] for symbol, _, _ in times})
    number = {symbol: place for place, symbol in enumerate(symbols)}
    labels = [
        frame_labels(length, layer.stride, hop_ms, [(number.get(s, -1), start, end) for s, start, end in times])
        for length, times in zip(layer.lengths, material.times, strict=True)
    ]
    return torch.cat(labels), symbols


def probe_phones(layer: Frames, material: Material, hop_ms: float, seed: int) -> dict[str, Any]:
    """Phone of every frame by a linear classifier; errors and frames per evaluation recording."""
    labels, symbols = phone_labels(layer, material, hop_ms)
    count = len(material.ctc.train.recordings)
    boundary = sum(layer.lengths[:count])
    train = torch.nonzero(labels[:boundary] >= 0)[:, 0].numpy()
    chosen = np.random.default_rng(seed).permutation(train)[:MAX_PHONE_FRAMES]
    known = labels[boundary:] >= 0
    evaluation = layer.values[boundary:][known]
    predicted = linear_probe(layer.values[chosen], labels[chosen], evaluation, len(symbols), weight_decay=1e-3)
    wrong = torch.zeros(len(known), dtype=torch.float64)
    wrong[known] = (predicted != labels[boundary:][known]).double()
    lengths = list(layer.lengths[count:])
    errors, sizes = ([float(part.sum()) for part in side.split(lengths)] for side in (wrong, known.double()))
    chance = float((labels[boundary:][known] == labels[chosen].mode().values).double().mean())
    return {"errors": errors, "sizes": sizes, "chance": chance}


def probe_abx(layer: Frames, material: Material, hop_ms: float) -> dict[str, dict[str, list[float]]]:
    """ABX errors and triples per recording of X."""
    by_recording: dict[int, list[tuple[int, float, float]]] = {}
    for token, (place, start, end) in enumerate(material.abx_places):
        by_recording.setdefault(place, []).append((token, start, end))
    features = [torch.empty(0)] * len(material.abx_places)
    for place, passages in by_recording.items():
        cuts = spans(layer, hop_ms, place, [(start, end) for _, start, end in passages])
        for (token, _, _), cut in zip(passages, cuts, strict=True):
            features[token] = cut
    results = {}
    for name, triples in material.abx.items():
        places = np.array([material.abx_places[token][0] for token in triples[:, 2]])
        units, number = np.unique(places, return_inverse=True)
        errors = np.bincount(number, weights=abx_errors(features, triples), minlength=len(units))
        results[name] = {"errors": errors.tolist(), "sizes": np.bincount(number).astype(float).tolist()}
    return results
