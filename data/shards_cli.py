"""`python -m data.shards verify|inspect`: is a dataset whole, and what is in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.damage import damage, verify
from data.errors import DataError
from data.shards import Dataset, open_dataset


def summary(dataset: Dataset) -> str:
    """Totals of a dataset, a few lines."""
    rate = dataset.features.frames_per_second
    seconds = dataset.frames / rate
    lines = [
        f"{dataset.path}: {len(dataset)} recordings, {seconds.sum() / 3600:.2f} hours, "
        f"{len(dataset.shards())} shards, features {dataset.features.hash()[:12]}",
        f"seconds: shortest {seconds.min():.2f}, median {np.median(seconds):.2f}, longest {seconds.max():.2f}",
        f"fingerprint {dataset.fingerprint}",
    ]
    for name in ("split", "language"):
        for value, (recordings, frames) in sorted(dataset.totals(name).items()):
            lines.append(f"{name} {value or '-'}: {recordings} recordings, {frames / rate / 3600:.2f} hours")
    told = sum(len(batch) - batch.column("text").null_count for batch in dataset.index.batches)
    lines.append(f"with text: {told}; first id {dataset.id(0)!r}")
    return "\n".join(lines)


def describe(dataset: Dataset, recording: int) -> str:
    """One recording, a few lines."""
    r, frames = dataset.recording(recording), int(dataset.frames[recording])
    mean, inverse_std = dataset.statistics(recording, "recording")
    words = r.words or []
    lines = [
        f"{r.id}: {frames} frames, {frames / dataset.features.frames_per_second:.2f} s, split {r.split or '-'}, "
        f"language {r.language or '-'}, speaker {r.speaker or '-'}",
        damage(dataset, recording) or "checksums are right",
        f"mean log-mel {mean.mean():.2f}, mean standard deviation {(1 / inverse_std).mean():.2f}",
        f"text: {r.text if r.text is not None else '(none)'}",
        f"{len(words)} words with times" + "".join(f"\n  {w.start:9.2f} {w.end:9.2f}  {w.word}" for w in words[:20]),
    ]
    return "\n".join(lines)


def draw(dataset: Dataset, recording: int, png: Path, most_frames: int = 3000) -> None:
    """Save a picture of a recording's first `most_frames` frames, with its words where they are known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    frames = min(most_frames, int(dataset.frames[recording]))
    seconds = frames / dataset.features.frames_per_second
    figure, axes = pyplot.subplots(figsize=(min(24.0, 4 + seconds), 4), layout="constrained")
    log_mel = dataset.read(recording, 0, frames).astype(np.float32)
    image = axes.imshow(log_mel.T, origin="lower", aspect="auto", extent=(0, seconds, 0, log_mel.shape[1]))
    for word, start, *_ in dataset.words(recording) or []:
        if start < seconds:
            axes.axvline(start, color="white", linewidth=0.5)
            axes.text(start, log_mel.shape[1], word, rotation=60, fontsize=7, va="bottom")
    axes.set(xlabel="seconds", ylabel="mel bin")
    figure.colorbar(image, label="log energy")
    figure.savefig(png)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.shards", description="Check or show a dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="read every byte; list every bad recording; exit 1 if there is one")
    show = commands.add_parser("inspect", help="totals, or one recording")
    for command in (check, show):
        command.add_argument("dir", type=Path, help="a dataset's folder")
    show.add_argument("--id", help="a recording's id")
    show.add_argument("--png", type=Path, help="save the recording's spectrogram here")
    options = parser.parse_args(arguments)
    try:
        dataset = open_dataset(options.dir, check=False)
        if options.command == "verify":
            bad = verify(dataset)
            print("\n".join([*bad, f"{options.dir}: {len(bad)} of {len(dataset)} recordings are bad"]))
            return 1 if bad else 0
        if options.id is None and options.png is None:
            print(summary(dataset))
            return 0
        recording = 0 if options.id is None else int(dataset.select(ids=[options.id])[0])
        print(describe(dataset, recording))
        if options.png is not None:
            draw(dataset, recording, options.png)
            print(f"wrote {options.png}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
