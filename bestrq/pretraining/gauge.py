"""Figures of pretraining targets, measured on labelled frames without training.

A target assigns one code per codebook to every target frame. The figures describe the codes (entropy, usage, speed,
share of silence) and their mutual information with phones, speakers, languages and recordings. docs/targets.md defines
every figure. Sources: phone purity, cluster purity and phone-normalised mutual information (PNMI) are from Hsu et al.,
"HuBERT" (arXiv 2106.07447), section IV-C; the correction of entropies is that of Miller 1955, "Note on the bias of
information estimates"; the adjustment for chance has the form of Vinh et al. 2010 (JMLR 11), with PNMI's normaliser.

N target frames of all recordings one after the other, C codebooks, V codes per codebook, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNKNOWN = -1
"""label of a frame without a label; it is left out of the figures of that label"""
ROTATIONS = 20
JACKKNIFE_GROUPS = 20

Ints = NDArray[np.integer[Any]]
Figures = dict[str, Any]


@dataclass(frozen=True)
class FrameLabels:
    """Labels of N target frames, in the order of the codes: recording after recording.

    The order of the recordings must be random: the baseline pairs codes with the labels of other recordings.
    """

    recording: Ints
    """int [N], ascending from 0"""
    silent: NDArray[np.bool_]
    """bool [N], low-energy frames (`silent_frames`)"""
    frame_ms: float
    """milliseconds per target frame"""
    phone: Ints | None = None
    """int [N], `UNKNOWN` without a phone; None if there are no phones"""
    pause: int = UNKNOWN
    """phone of pauses; `UNKNOWN` if there is none"""
    speaker: Ints | None = None
    """int [N], or None"""
    language: Ints | None = None
    """int [N], or None"""


@dataclass(frozen=True)
class Information:
    """Mutual information of codes and labels as a share of the entropy of the labels."""

    nats: float
    """plug-in estimate, biased upwards"""
    share: float
    """`nats` divided by the entropy of the labels; for phones this is PNMI"""
    shuffled: float
    """the same for codes that are paired with the labels of other recordings: the bias of `share`"""
    adjusted: float
    """(share - shuffled) / (1 - shuffled): 0 for unrelated codes, 1 for codes that determine the label"""
    low: float
    """lower end of the 95 % interval of `adjusted`"""
    high: float
    """upper end of the 95 % interval of `adjusted`"""

    def figures(self, name: str) -> Figures:
        """Fields with the prefix `name_`; the share itself is `name`."""
        return {
            name: self.share,
            f"{name}_shuffled": self.shuffled,
            f"{name}_adjusted": self.adjusted,
            f"{name}_adjusted_low": self.low,
            f"{name}_adjusted_high": self.high,
        }


# ---- counts, entropy and information


def entropy(counts: NDArray[Any]) -> float:
    """Plug-in entropy of counts, in nats; 0 without counts."""
    total = float(counts.sum())
    share = counts[counts > 0] / max(total, 1.0)
    return max(0.0, -float((share * np.log(share)).sum()))


def corrected_entropy(counts: NDArray[Any]) -> float:
    """Entropy in nats with the correction of Miller and Madow, (codes in use - 1) / (2 frames); at most log V."""
    if not counts.sum():
        return 0.0
    corrected = entropy(counts) + ((counts > 0).sum() - 1) / (2 * float(counts.sum()))
    return min(corrected, math.log(len(counts)))


def joint_counts(codes: Ints, labels: Ints) -> tuple[Ints, Ints, Ints]:
    """Pairs that occur: code, label and count, int [pairs] each."""
    width = int(labels.max()) + 1
    pairs, counts = np.unique(codes.astype(np.int64) * width + labels, return_counts=True)
    return pairs // width, pairs % width, counts


def mutual_information(codes: Ints, labels: Ints) -> float:
    """Plug-in mutual information of two label sequences, int [N] each from 0, in nats."""
    _, _, counts = joint_counts(codes, labels)
    return max(0.0, entropy(np.bincount(codes)) + entropy(np.bincount(labels)) - entropy(counts))


def information(codes: Ints, labels: Ints, recording: Ints, seed: int = 0) -> Information | None:
    """Information of codes on labels, with a baseline and an interval.

    None if all labels are equal, or too few recordings have labels for an interval.

    Baseline: the codes are rotated against the labels by random offsets of 10 to 90 % of the frames. This keeps the
    runs of both sequences; shuffled single frames would underestimate the bias of slow codes. Interval: normal, from
    the jackknife over 20 groups of recordings (with the baseline of all) and the variance of the rotations.

    Args:
        codes: int `[N]`.
        labels: int `[N]`; frames with `UNKNOWN` are left out.
        recording: int `[N]`.
    """
    known = labels != UNKNOWN
    codes, labels, recording = codes[known], labels[known], recording[known]
    if len(np.unique(labels)) < 2:
        return None
    limit = entropy(np.bincount(labels))
    nats = mutual_information(codes, labels)
    offsets = np.random.default_rng(seed).uniform(0.1, 0.9, ROTATIONS) * len(codes)
    rotated = np.array([mutual_information(np.roll(codes, int(offset)), labels) for offset in offsets])
    chance = float(rotated.mean())
    groups = np.unique(recording, return_inverse=True)[1] % JACKKNIFE_GROUPS
    left_out = []
    for group in np.unique(groups):
        kept = groups != group
        if len(np.unique(labels[kept])) > 1:
            part = mutual_information(codes[kept], labels[kept])
            left_out.append(_adjusted(part, chance, entropy(np.bincount(labels[kept]))))
    if len(left_out) < 2:
        return None
    adjusted = _adjusted(nats, chance, limit)
    variance = (len(left_out) - 1) * float(np.var(left_out))
    variance += ((1 - adjusted) * float(rotated.std()) / max(limit - chance, 1e-9)) ** 2  # derivative by `chance`
    half_width = 1.96 * math.sqrt(variance)
    return Information(nats, nats / limit, chance / limit, adjusted, adjusted - half_width, adjusted + half_width)


def _adjusted(nats: float, chance: float, limit: float) -> float:
    # If chance reaches the limit, every code is unique to a frame, and the sample cannot show anything.
    return (nats - chance) / (limit - chance) if limit - chance > 1e-9 else 0.0


def purities(codes: Ints, labels: Ints) -> tuple[float, float]:
    """Phone purity and cluster purity of HuBERT, from 0 to 1.

    Phone purity: accuracy if every code stands for its most frequent label; it grows with the number of codes. Cluster
    purity: accuracy if every label stands for its most frequent code.
    """
    known = labels != UNKNOWN
    code, label, counts = joint_counts(codes[known], labels[known])
    best_of_code, best_of_label = np.zeros(code.max() + 1), np.zeros(label.max() + 1)
    np.maximum.at(best_of_code, code, counts)
    np.maximum.at(best_of_label, label, counts)
    return float(best_of_code.sum() / counts.sum()), float(best_of_label.sum() / counts.sum())


# ---- prediction of labels, on recordings that were not counted


def log_likelihoods(codes: Ints, labels: Ints, num_codes: int, num_labels: int) -> NDArray[np.float64]:
    """Smoothed log p(code | label), float64 `[C, L, V]`, from codes `[N, C]` and labels `[N]` (0.5 added per code)."""
    tables = []
    for book in codes.T:
        cells = np.bincount(labels * num_codes + book, minlength=num_labels * num_codes)
        counts = cells.reshape(num_labels, num_codes) + 0.5
        tables.append(np.log(counts / counts.sum(axis=1, keepdims=True)))
    return np.stack(tables)


def held_out_accuracy(codes: Ints, labels: Ints, groups: Ints, folds: Ints, num_codes: int) -> tuple[float, float]:
    """Accuracy of naive Bayes for the label of a group of frames, and of always giving the most frequent label.

    Groups of one fold are classified with the counts of the other one. Codebooks and frames count as independent.

    Args:
        codes: int `[N, C]`.
        labels: int `[N]`, equal within a group; frames with `UNKNOWN` are left out.
        groups: int `[N]`: single frames, or recordings.
        folds: int `[N]`, 0 or 1, equal within a group.

    Returns:
        Accuracy and chance, from 0 to 1; NaN if a fold is empty.
    """
    known = labels != UNKNOWN
    codes, labels, folds = codes[known], labels[known], folds[known]
    first, group = np.unique(groups[known], return_index=True, return_inverse=True)[1:]
    if len(np.unique(folds)) < 2:
        return math.nan, math.nan
    num_labels = int(labels.max()) + 1
    label_of, fold_of = labels[first], folds[first]
    correct, majority = 0, 0
    for fold in (0, 1):
        counted, tested = folds != fold, folds == fold
        tables = log_likelihoods(codes[counted], labels[counted], num_codes, num_labels)
        prior = np.bincount(label_of[fold_of != fold], minlength=num_labels)
        members = np.flatnonzero(fold_of == fold)
        place = np.searchsorted(members, group[tested])
        scores = np.full((len(members), num_labels), np.log(prior.clip(min=1e-9)))
        for label in range(num_labels):
            frames = sum(tables[book, label, codes[tested, book]] for book in range(codes.shape[1]))
            scores[:, label] += np.bincount(place, weights=frames, minlength=len(members))
        correct += int((scores.argmax(axis=1) == label_of[members]).sum())
        majority += int((label_of[members] == prior.argmax()).sum())
    return correct / len(label_of), majority / len(label_of)


# ---- silence and speed


def silent_frames(energy: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Low-energy frames of a recording: below the 5 % quantile plus a quarter of the range to the 95 % quantile.

    A recording with less than 10 dB between the quantiles has no pauses: none of its frames is silent.

    Args:
        energy: log power (natural logarithm) of every frame, `[n]`.
    """
    low, high = np.quantile(energy, [0.05, 0.95])
    return np.asarray(energy < low + 0.25 * (high - low)) & (high - low > math.log(10))


def run_lengths(labels: Ints, recording: Ints) -> Ints:
    """Lengths of the runs of equal labels in frames, int `[runs]`; a run ends with its recording."""
    changed = (labels[1:] != labels[:-1]) | (recording[1:] != recording[:-1])
    return np.diff(np.concatenate([[-1], np.flatnonzero(changed), [len(labels) - 1]]))


def repeat_share(labels: Ints, recording: Ints) -> float:
    """Share of frames with the label of the frame before, among frames that are not the first of a recording."""
    together = recording[1:] == recording[:-1]
    return float((labels[1:] == labels[:-1])[together].mean()) if together.any() else math.nan


def silence_figures(codes: Ints, silent: NDArray[np.bool_], num_codes: int) -> Figures:
    """Figures of low-energy frames: see docs/targets.md. codes: int `[N]`."""
    quiet = np.bincount(codes[silent], minlength=num_codes)
    total = np.bincount(codes, minlength=num_codes)
    share, whole = float(silent.mean()), entropy(total)
    used = total > 0
    return {
        "silence_frames": share,
        "silence_entropy_share": share * entropy(quiet) / whole if whole else 0.0,
        "silence_codes": float((2 * quiet > total)[used].mean()),
        "silence_information": mutual_information(codes, silent.astype(np.int64)) / whole if whole else 0.0,
    }


# ---- all figures of a target


def codebook_figures(codes: Ints, num_codes: int, labels: FrameLabels) -> Figures:
    """Figures of a codebook, int `[N]` codes from 0 to num_codes - 1."""
    counts = np.bincount(codes, minlength=num_codes)
    nats = corrected_entropy(counts)
    runs = run_lengths(codes, labels.recording)
    expected = float(((counts / len(codes)) ** 2).sum())
    figures: Figures = {
        "entropy": nats,
        "perplexity": math.exp(nats),
        "usage": float((counts > 0).mean()),
        "largest_code": float(counts.max() / len(codes)),
        "run_ms": float(runs.mean()) * labels.frame_ms,
        "repeats": repeat_share(codes, labels.recording),
        "repeats_shuffled": expected,
        **silence_figures(codes, labels.silent, num_codes),
    }
    if labels.phone is not None and (found := information(codes, labels.phone, labels.recording)):
        spoken = np.where(labels.phone == labels.pause, UNKNOWN, labels.phone)
        inside = information(codes, spoken, labels.recording)
        figures |= {"phone_nats": found.nats, **found.figures("pnmi")}
        figures |= inside.figures("speech_pnmi") if inside else {}
        figures |= dict(zip(("phone_purity", "cluster_purity"), purities(codes, labels.phone), strict=True))
    for name, values in (("speaker", labels.speaker), ("language", labels.language)):
        if values is not None and (found := information(codes, values, labels.recording)):
            figures |= found.figures(f"{name}_nmi")
    return figures


def judge(codes: Ints, num_codes: int, labels: FrameLabels) -> Figures:
    """Figures of a target: those of its codebooks, averaged, and predictions from all codebooks together.

    Args:
        codes: int `[N, C]`, from 0 to num_codes - 1.

    Returns:
        Figures by name (docs/targets.md); "codebooks" lists those of every codebook, "warnings" predicted trouble.
    """
    if codes.shape != (len(labels.recording), codes.shape[1]) or not len(codes):
        raise ValueError(f"codes of shape {codes.shape} do not fit {len(labels.recording)} labelled frames")
    books = [codebook_figures(book, num_codes, labels) for book in codes.T]
    figures: Figures = {name: float(np.mean([book[name] for book in books])) for name in books[0]}
    figures |= {"frames": len(codes), "codebook_size": num_codes, "num_codebooks": codes.shape[1]}
    fold = labels.recording % 2
    if labels.phone is not None:
        accuracy = held_out_accuracy(codes, labels.phone, np.arange(len(codes)), fold, num_codes)
        figures |= {"phone_accuracy": accuracy[0], "phone_accuracy_chance": accuracy[1]}
        phone_runs = run_lengths(labels.phone, labels.recording)
        figures["phone_run_ms"] = float(phone_runs.mean()) * labels.frame_ms
    if labels.speaker is not None:
        speaker = repeated_labels(labels.speaker, labels.recording)
        if len(np.unique(speaker[speaker != UNKNOWN])) > 1:
            accuracy = held_out_accuracy(codes, speaker, labels.recording, fold, num_codes)
            figures |= {"speaker_accuracy": accuracy[0], "speaker_accuracy_chance": accuracy[1]}
    figures |= recording_figures(codes, num_codes, labels.recording)
    defined = {name: value for name, value in figures.items() if not math.isnan(value)}  # JSON has no NaN
    return {**defined, "warnings": predicted_trouble(defined), "codebooks": books}


def repeated_labels(labels: Ints, recording: Ints) -> Ints:
    """Labels with `UNKNOWN` for those that do not occur in recordings of both folds (even and odd recordings)."""
    even, odd = (np.unique(labels[recording % 2 == fold]) for fold in (0, 1))
    return np.where(np.isin(labels, np.intersect1d(even, odd)), labels, UNKNOWN)


def recording_figures(codes: Ints, num_codes: int, recording: Ints, most: int = 200) -> Figures:
    """Share of recordings whose second half is identified by the codes of the first half; chance is one in all.

    Halves share speaker, channel and noise, but no words. The first `most` recordings take part.
    """
    chosen = recording < most
    codes, recording = codes[chosen], recording[chosen]
    sizes = np.bincount(recording)
    place = np.arange(len(recording)) - np.concatenate([[0], np.cumsum(sizes)[:-1]])[recording]
    second = (2 * place >= sizes[recording]).astype(np.int64)
    if len(sizes) < 2:
        return {}
    accuracy, _ = held_out_accuracy(codes, recording, 2 * recording + second, second, num_codes)
    return {"recording_accuracy": accuracy, "recording_accuracy_chance": 1 / len(sizes)}


# ---- predicted trouble


def predicted_trouble(figures: Mapping[str, Any]) -> list[str]:
    """Warnings of a target, most serious first; docs/targets.md gives the reason for each limit."""
    found = []
    size, perplexity = figures["codebook_size"], figures["perplexity"]
    if perplexity < max(2.0, size / 100):
        found.append(f"collapse: perplexity {perplexity:.1f} of {size} codes")
    if figures["largest_code"] > 0.5:
        found.append(f"one code has {figures['largest_code']:.0%} of the frames")
    quiet = figures["silence_entropy_share"] + figures["silence_information"]
    if quiet > 0.5:
        found.append(f"dominated by silence: {quiet:.0%} of the entropy is about or within low-energy frames")
    if "pnmi_adjusted" in figures and figures["pnmi_adjusted_low"] <= 0.01:
        found.append(f"no phones: adjusted PNMI {figures['pnmi_adjusted']:.3f} is not above chance")
    phones, speakers = figures.get("pnmi_adjusted", math.nan), figures.get("speaker_nmi_adjusted", 0.0)
    certain = figures.get("speaker_nmi_adjusted_low", 0.0) > 0
    if speakers > 0.5 or (certain and speakers > phones):
        found.append(f"dominated by speakers: {speakers:.2f} of the speaker, {phones:.2f} of the phone is in the codes")
    phone_ms = figures.get("phone_run_ms", 100.0)
    if figures["run_ms"] > 2.5 * phone_ms:
        found.append(f"too slow: a code lasts {figures['run_ms']:.0f} ms, a phone {phone_ms:.0f} ms")
    if figures.get("repeats", 1.0) < figures["repeats_shuffled"] + 0.02:
        found.append("too fast: codes change like independent draws, so context cannot predict them")
    if figures["frames"] < 5 * perplexity:
        found.append(
            f"few frames: {figures['frames']} for a perplexity of {perplexity:.0f}; give more minutes for narrow "
            "intervals"
        )
    return found
