"""FLAC to features on disk, on one core, beside lhotse: `python -m benchmarks.prepare_speed`.

The same 16 kHz FLAC files of 2 to 17 s (noise with the spectrum and the rhythm of speech) go through

- `data.prepare folder` with one worker: read, log-mel, statistics, checksums, float16 shards, index;
- lhotse's `CutSet.compute_and_store_features` with its own `Fbank` (80 bins, as by default) and its default storage
  (lilcom, chunked), one job; its manifests are made before the clock starts;

alternately, in child processes with one thread each. The last line is JSON. Needs requirements-benchmarks.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import soundfile
import torch

from data.corpora.folder import FolderSettings
from data.features import FeatureSettings
from data.prepare import PrepareSettings, prepare


def write_audio(folder: Path, minutes: float, seed: int = 0) -> float:
    """FLAC files with a text beside each; their seconds."""
    rng = np.random.default_rng(seed)
    total, number = 0.0, 0
    while total < 60 * minutes:
        samples = int(rng.integers(2 * 16_000, 17 * 16_000))
        hertz = np.arange(samples // 2 + 1) * 16_000 / samples
        voice = np.fft.irfft(np.fft.rfft(rng.normal(size=samples)) / np.maximum(1, hertz / 300), samples)
        quarters = np.arange(0, samples + 4000, 4000)
        audio = voice * np.interp(np.arange(samples), quarters, rng.uniform(0, 1, len(quarters)))
        soundfile.write(folder / f"u{number:05d}.flac", 0.7 * audio / np.abs(audio).max(), 16_000)
        (folder / f"u{number:05d}.txt").write_text("no words")
        total, number = total + samples / 16_000, number + 1
    return total


def prepare_ours(audio: Path, out: Path) -> float:
    """Seconds that `data.prepare` takes."""
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("folder", FolderSettings(folder=str(audio)), FeatureSettings(), PrepareSettings(str(out), workers=1))
    return time.perf_counter() - begin


def prepare_lhotse(audio: Path, out: Path) -> float:
    """Seconds that lhotse takes."""
    from lhotse import CutSet, Fbank, RecordingSet

    cuts = CutSet.from_manifests(recordings=RecordingSet.from_dir(audio, "*.flac"))
    begin = time.perf_counter()
    cuts.compute_and_store_features(Fbank(), out, num_jobs=1, progress_bar=False)
    return time.perf_counter() - begin


def in_child(function: Callable[[Path, Path], float], audio: Path, out: Path) -> float:
    """Run in a fresh process with one thread, after a warm-up on the same files."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(send, function, audio, out))
    child.start()
    send.close()
    seconds = receive.recv()
    child.join()
    return seconds


def _child(send: Connection, function: Callable[[Path, Path], float], audio: Path, out: Path) -> None:
    torch.set_num_threads(1)
    function(audio / "warm-up", out / "warm-up")
    send.send(function(audio / "all", out / "all"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_speed", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="audio in a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each system")
    options = parser.parse_args(arguments)
    rates: dict[str, list[float]] = {"ours": [], "lhotse": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, minutes in (("all", options.minutes), ("warm-up", 0.5)):
            (folder / "audio" / part).mkdir(parents=True)
            seconds = write_audio(folder / "audio" / part, minutes)
            if part == "all":
                total = seconds
        for number in range(options.repeats):
            for system, function in (("ours", prepare_ours), ("lhotse", prepare_lhotse)):
                out = folder / f"{system}-{number}"
                out.mkdir()
                rates[system].append(total / in_child(function, folder / "audio", out))
                print(f"{system}: {rates[system][-1]:,.0f} audio-s/s on one core", flush=True)
    ours, lhotse = (statistics.median(rates[system]) for system in ("ours", "lhotse"))
    ratios = [a / b for a, b in zip(rates["ours"], rates["lhotse"], strict=True)]
    figures = {
        "ratio_to_lhotse": round(ours / lhotse, 2),
        "lowest_ratio": round(min(ratios), 2),
        "highest_ratio": round(max(ratios), 2),
        "audio_seconds_per_second_per_core": round(ours),
        "lhotse_audio_seconds_per_second_per_core": round(lhotse),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
