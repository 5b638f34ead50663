"""Speed of preparation from FLAC, Opus and MP3 on one core, against lhotse: `python -m benchmarks.prepare_speed`.

The same files of synthetic speech (utterances of 2 to 15 s at 16 kHz, in each format) are processed by

- `data.prepare folder` with one worker: read, log-mel, statistics, checksums, float16 shards, index;
- lhotse's `CutSet.compute_and_store_features` with its `Fbank` (80 bins, the default) and its default storage (lilcom,
  chunked), one job; its manifests are made before the timing starts;

alternating, in child processes with one thread each. The last line is JSON: for each format the audio-seconds per
second of both, the ratio of their medians and the extremes of the ratios of adjacent runs; `ratio_to_lhotse` is for
FLAC. Needs requirements-benchmarks.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import soundfile
import torch

from benchmarks.machine import print_figures
from data.corpora.folder import FolderSettings
from data.corpora.synthetic import SyntheticSettings, sources
from data.features import FeatureSettings
from data.prepare.prepare import PrepareSettings, prepare

# Format and subtype of soundfile; Opus and MP3 at its default bit rates.
FORMATS = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III")}


def write_audio(folder: Path, minutes: float) -> float:
    """Write the same speech in a folder per format, with a text file per recording; return its duration in seconds."""
    settings = SyntheticSettings(
        train_hours=minutes / 60, train_long_share=0, dev_utterances=0, test_utterances=0, test_long_recordings=0
    )
    for suffix in FORMATS:
        (folder / suffix).mkdir(parents=True)
    total = 0.0
    for number, source in enumerate(sources(settings)):
        waveform = source.load(FeatureSettings()).waveform.numpy()
        total += len(waveform) / 16_000
        for suffix, (container, subtype) in FORMATS.items():
            path = folder / suffix / f"u{number:05d}.{suffix}"
            soundfile.write(path, waveform, 16_000, subtype, format=container)
            path.with_suffix(".txt").write_text("no words", encoding="utf-8")
    return total


def prepare_ours(audio: Path, out: Path) -> float:
    """Time of `data.prepare` in seconds."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("folder", FolderSettings(folder=str(audio)), FeatureSettings(), PrepareSettings(str(out), workers=1))
    return time.perf_counter() - start


def prepare_lhotse(audio: Path, out: Path) -> float:
    """Time of lhotse in seconds."""
    from lhotse import CutSet, Fbank, RecordingSet

    cuts = CutSet.from_manifests(recordings=RecordingSet.from_dir(audio, f"*.{audio.name}"))
    start = time.perf_counter()
    cuts.compute_and_store_features(Fbank(), out, num_jobs=1, progress_bar=False)
    return time.perf_counter() - start


def in_child(function: Callable[[Path, Path], float], folder: Path, suffix: str, out: Path) -> float:
    """Run the function in a new process with one thread, after a warm-up on other files; return its seconds."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(send, function, folder, suffix, out))
    child.start()
    send.close()
    seconds = receive.recv()
    child.join()
    return seconds


def _child(send: Connection, function: Callable[[Path, Path], float], folder: Path, suffix: str, out: Path) -> None:
    torch.set_num_threads(1)
    function(folder / "warm-up" / suffix, out / "warm-up")
    send.send(function(folder / "all" / suffix, out / "all"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_speed", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="audio per measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements per system and format")
    options = parser.parse_args(arguments)
    systems = {"ours": prepare_ours, "lhotse": prepare_lhotse}
    rates: dict[tuple[str, str], list[float]] = {(suffix, system): [] for suffix in FORMATS for system in systems}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_audio(folder / "warm-up", 0.5)
        total = write_audio(folder / "all", options.minutes)
        for number in range(options.repeats):
            for (suffix, system), measured in rates.items():
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    measured.append(total / in_child(systems[system], folder, suffix, Path(out)))
                print(f"{number} {suffix} {system}: RTFx {measured[-1]:,.0f} on one core", flush=True)
    figures: dict[str, float] = {}
    for suffix in FORMATS:
        ours, lhotse = rates[suffix, "ours"], rates[suffix, "lhotse"]
        ratios = [a / b for a, b in zip(ours, lhotse, strict=True)]
        figures |= {
            f"{suffix}_ratio_to_lhotse": round(statistics.median(ours) / statistics.median(lhotse), 2),
            f"{suffix}_lowest_ratio": round(min(ratios), 2),
            f"{suffix}_highest_ratio": round(max(ratios), 2),
            f"{suffix}_audio_seconds_per_second_per_core": round(statistics.median(ours)),
            f"{suffix}_lhotse_audio_seconds_per_second_per_core": round(statistics.median(lhotse)),
        }
    print_figures({"ratio_to_lhotse": figures["flac_ratio_to_lhotse"], **figures}, "float32", threads=1)


if __name__ == "__main__":
    main()
