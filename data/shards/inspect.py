"""Inspection of a dataset: totals over all recordings, or one recording with its spectrogram."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import UserError
from common.files import replace_file
from data.format.dataset import Dataset
from data.format.schema import shard_name
from data.shards.derive import stored_recording
from data.shards.integrity import check_recording
from data.transcripts import Word

# Upper edges of the histogram of durations, in seconds.
EDGES = (1, 2, 5, 10, 15, 20, 25, 30, 45, 60, 120, 300, 600, 1800, 3600, 7200)
# Maximum number of batches of the index (16,384 recordings each) whose confidences are read.
_SAMPLED_BATCHES = 16
_BAR_WIDTH = 40
_MAX_PICTURE_SECONDS = 600.0  # matplotlib holds several copies of a picture


def totals(dataset: Dataset) -> dict[str, Any]:
    """Totals of a dataset as JSON values. Texts are not read; memory is a few numbers per recording."""
    rate, frames = dataset.features.frames_per_second, dataset.frames
    seconds = frames / rate
    batches = dataset.index.batches
    shards = dataset.shards()
    sizes = [dataset.storage.size(shard_name(shard)) for shard in shards]
    counts = np.bincount(np.searchsorted(EDGES, seconds, side="left"), minlength=len(EDGES) + 1)
    return {
        "dataset": dataset.location,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "features": dataset.features.hash(),
        "recordings": len(dataset),
        "hours": dataset.total_frames / rate / 3600,
        "seconds": {
            "shortest": float(seconds.min()),
            "median": float(np.median(seconds)),
            "longest": float(seconds.max()),
        },
        "shards": len(shards),
        "shards_missing": sizes.count(None),
        "bytes": sum(size or 0 for size in sizes),
        "with_text": sum(len(batch) - batch["text"].null_count for batch in batches),
        "with_words": sum(len(batch) - batch["words"].null_count for batch in batches),
        "mean_confidence": _mean_confidence(dataset),
        "mean_confidence_exact": len(batches) <= _SAMPLED_BATCHES,
        "groups": _groups(dataset),
        "durations": dict(zip([*map(str, EDGES), "more"], counts.tolist(), strict=True)),
        "first_id": dataset.id(0),
    }


def _mean_confidence(dataset: Dataset) -> float | None:
    """Mean over all words with a confidence in evenly spaced batches of the index; None if there are none."""
    batches = dataset.index.batches
    total, count, rows = 0.0, 0, len(batches[0])
    for number in np.unique(np.linspace(0, len(batches) - 1, min(len(batches), _SAMPLED_BATCHES)).astype(int)).tolist():
        dataset.index.value("words", number * rows)  # validates the column
        values = batches[number]["words"].flatten().field("confidence")
        known = len(values) - values.null_count
        if known:
            total, count = total + pc.sum(values.cast(pa.float64())).as_py(), count + known
    return total / count if count else None


def _groups(dataset: Dataset) -> list[dict[str, Any]]:
    """Recordings, hours and known speakers per split and language."""
    (splits, split), (languages, language), (speakers, speaker) = (
        dataset.index.labels[name] for name in ("split", "language", "speaker")
    )
    group = split.astype(np.int64) * len(languages) + language
    size = len(splits) * len(languages)
    counts, frames = np.bincount(group, minlength=size), np.bincount(group, weights=dataset.frames, minlength=size)
    pairs = np.unique(group * len(speakers) + speaker)
    known = pairs[np.array([name != "" for name in speakers])[pairs % len(speakers)]]
    speaker_counts = np.bincount(known // len(speakers), minlength=size)
    hours = frames / dataset.features.frames_per_second / 3600
    rows = [
        {
            "split": splits[g // len(languages)],
            "language": languages[g % len(languages)],
            "recordings": int(counts[g]),
            "hours": float(hours[g]),
            "speakers": int(speaker_counts[g]),
        }
        for g in np.flatnonzero(counts)
    ]
    return sorted(rows, key=lambda row: (_ORDER.get(row["split"], 3), row["split"], row["language"]))


_ORDER = {"train": 0, "dev": 1, "test": 2}


def summary(fields: dict[str, Any]) -> str:
    """`totals` as readable text."""
    seconds, recordings = fields["seconds"], fields["recordings"]
    missing = f" ({fields['shards_missing']} MISSING)" if fields["shards_missing"] else ""
    confidence = ""
    if fields["mean_confidence"] is not None:
        confidence = f", mean confidence {fields['mean_confidence']:.3f}"
        confidence += "" if fields["mean_confidence_exact"] else " (of a sample)"
    lines = [
        f"{fields['dataset']}: {recordings} recordings, {fields['hours']:.2f} hours, "
        f"{fields['shards']} shards{missing}, {fields['bytes'] / 1e9:.3f} GB",
        f"name {fields['name']}, features {fields['features'][:12]}, fingerprint {fields['fingerprint']}",
        f"with text: {fields['with_text']} ({fields['with_text'] / recordings:.1%}), "
        f"with words: {fields['with_words']} ({fields['with_words'] / recordings:.1%}){confidence}",
        "",
        f"{'split':8} {'language':12} {'recordings':>12} {'hours':>12} {'speakers':>9}",
    ]
    for g in fields["groups"]:
        speakers = g["speakers"] or "-"
        name = f"{g['split'] or '-':8} {g['language'] or '-':12}"
        lines.append(f"{name} {g['recordings']:12} {g['hours']:12.2f} {speakers:>9}")
    lines += ["", "seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())]
    counts = fields["durations"]
    filled = [number for number, count in enumerate(counts.values()) if count]
    for number, (name, count) in enumerate(counts.items()):
        if filled[0] <= number <= filled[-1]:
            bar = "#" * max(round(_BAR_WIDTH * count / max(counts.values())), count > 0)
            label = f"up to {name}" if name != "more" else f"over {EDGES[-1]}"
            lines.append(f"{label:>12} s {count:12}  {bar}".rstrip())
    return "\n".join([*lines, f"first id {fields['first_id']!r}"])


def describe(dataset: Dataset, recording: int, start: float = 0.0, seconds: float = 30.0) -> dict[str, Any]:
    """Metadata and integrity of a recording, and its words from `start` to `start + seconds`."""
    r, frames = stored_recording(dataset, recording), int(dataset.frames[recording])
    duration = frames / dataset.features.frames_per_second
    fault = check_recording(dataset, recording)
    mean, std = (None, None) if fault else dataset.mean_std(recording).mean(axis=1).tolist()
    if start >= duration:
        raise UserError(f"--start is {start}: recording {r.id!r} has {duration:.2f} seconds")
    return {
        "id": r.id,
        "frames": frames,
        "seconds": round(duration, 3),
        "split": r.split,
        "language": r.language,
        "speaker": r.speaker,
        "shard": shard_name(dataset.index.shard[recording]),
        "sound": fault.problem if fault else "checksums are right",
        "mean log-mel": mean,
        "mean std": std,
        "text": r.text,
        "excluded": r.excluded,
        "word times": None if r.words is None else len(r.words),
        "words": [word._asdict() for word in words_between(r.words or [], start, start + seconds)],
    }


def draw(dataset: Dataset, recording: int, png: Path, start: float = 0.0, seconds: float = 30.0) -> None:
    """Save the spectrogram of a passage of a recording, with its words and excluded passages.

    Raises UserError: the passage is longer than ten minutes or not in the recording, or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not 0 < seconds <= _MAX_PICTURE_SECONDS:
        raise UserError(f"--seconds is {seconds:g}: must be more than 0 and at most {_MAX_PICTURE_SECONDS:g}")
    rate, frames = dataset.features.frames_per_second, int(dataset.frames[recording])
    first = round(start * rate)
    last = min(first + max(round(seconds * rate), 1), frames)
    if first >= frames:
        raise UserError(f"--start is {start}: {dataset.place(recording)} has {frames / rate:.2f} seconds")
    log_mel = dataset.read(recording, first, last).astype(np.float32)
    left, right = first / rate, last / rate
    figure, axes = pyplot.subplots(figsize=(min(40.0, 4 + right - left), 4), layout="constrained")
    try:
        edges = (left, right, 0, log_mel.shape[1])
        image = axes.imshow(log_mel.T, origin="lower", aspect="auto", extent=edges)
        for word in words_between(dataset.words(recording) or [], left, right):
            axes.axvline(word.start, color="white", linewidth=0.5)
            axes.text(word.start, log_mel.shape[1], word.word.replace("$", r"\$"), rotation=60, fontsize=7, va="bottom")
        for passage_start, passage_end in dataset.excluded(recording) or []:
            if passage_start < right and passage_end > left:
                axes.axvspan(max(passage_start, left), min(passage_end, right), color="black", alpha=0.5)
        axes.set(xlabel="seconds", ylabel="mel bin")
        figure.colorbar(image, label="log energy")
        with replace_file(png) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        raise UserError(f"{png}: cannot be written ({error}); choose another file") from error
    finally:
        pyplot.close(figure)


def words_between(words: Sequence[Word], start: float, end: float) -> list[Word]:
    """Words that start in [start, end) seconds, so that adjacent intervals partition the words.

    `words` must be sorted by start (`check_word_times`), because the search is a bisection.
    """
    return list(words[bisect_left(words, start, key=_start) : bisect_left(words, end, key=_start)])


def _start(word: Sequence[Any]) -> float:
    return float(word[1])
