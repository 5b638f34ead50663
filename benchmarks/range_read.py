"""Time to read 30 s of log-mel at a random position of a random two-hour recording: `python -m benchmarks.range_read`.

Every system writes the same noise, 80 bins at 100 frames per second, in its own format, and reads it in its usual way:

- ours: `Dataset.read` (float16; also into an existing buffer, with checksums, and from the local cache of a remote);
- a plain `os.pread` of the same bytes (float16), and `os.preadv` into an existing buffer;
- lhotse, `lilcom_chunky`: `cut.truncate(...).load_features()` (lossy, float32);
- lhotse Shar, lilcom: the same on cuts streamed from shuffled shards; entire items are read (lossy, float32);
- WebDataset: `.npy` in tar shards, streamed and decoded; entire items are read (float16);
- Hugging Face datasets: a memory-mapped table; `row["log_mel"][start:stop]`, which reads whole rows; and the values of
  the Arrow column sliced directly, without reading the row (float16).

All data are in the page cache. Times are of single calls: median, 10th and 90th percentile. Ratios to `pread` are of
medians within a round; the median over the rounds is reported. The last line is JSON. Needs
requirements-benchmarks.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import range_read_systems as systems
from benchmarks.machine import print_figures
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.storage.local import StorageSettings
from data.storage.opening import open_storage

FRAMES, LENGTH = 720_000, 3000
BYTES = LENGTH * 80 * 2
# Calls at the start of a round that are not counted.
WARM_UP = 20
PAIRS = ("pread", "ours", "preadv into a buffer", "ours into a buffer")
# 64 MB of other memory are read between two calls, as if a model ran in between.
COLD_NOTE = ", processor's caches emptied"
COLD = [name + COLD_NOTE for name in PAIRS[:2]]
# Error of lilcom on values of this size.
LOSSY = 0.2
# Function of (recording, first frame).
Read = Callable[[int, int], Any]


def noise(recording: int, frames: int = FRAMES) -> np.ndarray:
    """float16 [frames, 80], equal at every call: repetitions of one minute, each slightly louder."""
    minute = np.random.default_rng(recording).normal(-5, 3, (6000, 80)).astype(np.float16)
    gain = (np.arange(frames // 6000) / 100).astype(np.float16)
    return (minute[None] + gain[:, None, None]).reshape(frames, 80)


def write_ours(folder: Path, recordings: int) -> Dataset:
    with DatasetWriter(folder, FeatureSettings()) as writer:
        for number in range(recordings):
            writer.add(Recording(f"r{number}"), noise(number))
        writer.finish()
    return open_dataset(folder)


def shard_bytes(folder: Path) -> list[tuple[int, int, str]]:
    """(file descriptor, position of the first value, shard) of every recording, from the headers of the shards."""
    places: dict[str, tuple[int, int, str]] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        file = os.open(path, os.O_RDONLY)
        size = int.from_bytes(os.pread(file, 8, 0), "little")
        header = json.loads(os.pread(file, size, 8))
        for name, entry in header.items():
            if name != "__metadata__":
                places[name] = file, 8 + size + entry["data_offsets"][0], path.name
    return [places[name] for name in sorted(places)]


def our_reads(dataset: Dataset, places: list[tuple[int, int, str]], cache: Path) -> dict[str, Read]:
    """Plain reads and ours, by name."""
    buffer = np.empty((LENGTH, 80), np.float16)
    view = memoryview(buffer.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    remote = remote_storage(dataset.path, cache)

    def pread(recording: int, start: int) -> bytes:
        file, position, _ = places[recording]
        return os.pread(file, BYTES, position + 160 * start)

    def preadv(recording: int, start: int) -> np.ndarray:
        file, position, _ = places[recording]
        os.preadv(file, [view], position + 160 * start)
        return buffer

    def read_into(recording: int, start: int) -> np.ndarray:
        dataset.read_into(recording, start, buffer)
        return buffer

    def from_cache(recording: int, start: int) -> np.ndarray:
        _, position, shard = places[recording]
        remote.read_into(shard, position + 160 * start, view)
        return buffer

    return {
        "pread": pread,
        "ours": lambda recording, start: dataset.read(recording, start, start + LENGTH),
        "preadv into a buffer": preadv,
        "ours into a buffer": read_into,
        "ours with checksums": lambda recording, start: dataset.read(recording, start, start + LENGTH, verify=True),
        "ours from the cache of a remote": from_cache,
    }


def remote_storage(folder: Path, cache: Path) -> Any:
    """Return the dataset as a remote storage (in the memory of this process) with all blocks in the cache."""
    import fsspec

    system = fsspec.filesystem("memory")
    storage = open_storage("memory://range-read", StorageSettings(cache_dir=str(cache)))
    for path in folder.glob("shard-*.safetensors"):
        system.pipe_file(f"/range-read/{path.name}", path.read_bytes())
        size = path.stat().st_size
        for position in range(0, size, 2**24):
            storage.read_into(path.name, position, memoryview(bytearray(min(2**24, size - position))))
        system.rm_file(f"/range-read/{path.name}")
    return storage


def check(reads: dict[str, Read], exact: set[str], recordings: int) -> None:
    """Check that every system returns the requested frames: equal, or within the error of its compression."""
    rng = np.random.default_rng(1)
    for recording in range(recordings):
        expected = noise(recording).astype(np.float32)
        for name, read in reads.items():
            start = int(rng.integers(FRAMES - LENGTH))
            result = read(recording, start)
            values = np.frombuffer(result, np.float16).reshape(LENGTH, 80) if isinstance(result, bytes) else result
            error = np.abs(np.asarray(values, np.float32) - expected[start : start + LENGTH]).max()
            if values.shape != (LENGTH, 80) or not error <= (0 if name in exact else LOSSY):
                raise SystemExit(f"{name} returns wrong values: shape {values.shape}, largest difference {error}")


def measure(reads: dict[str, Read], slow: set[str], recordings: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of every call, [rounds, calls], by system.

    Plain reads and ours alternate call by call, so that other load on the machine affects both; the other systems
    follow one after another in each round.
    """
    rng = np.random.default_rng(2)
    times: dict[str, list[list[float]]] = {name: [] for name in [*reads, *COLD]}
    flush = np.ones(8_000_000)

    def alternate(names: Sequence[str], calls: int, note: str = "") -> None:
        rows: dict[str, list[float]] = {name: [] for name in names}
        for call in range(-min(WARM_UP, calls // 2), calls):
            for name in rng.permutation(names).tolist():
                if note:
                    flush.sum()
                microseconds = time_call(reads[name], int(rng.integers(recordings)), int(rng.integers(FRAMES - LENGTH)))
                if call >= 0:
                    rows[name].append(microseconds)
        for name in names:
            times[name + note].append(rows[name])

    for number in range(options.rounds):
        alternate(PAIRS, options.calls)
        alternate(PAIRS[:2], options.calls // 4, note=COLD_NOTE)
        for name in reads:
            if name not in PAIRS:
                alternate([name], options.slow_calls if name in slow else options.calls)
        ours, plain = (np.median(times[name][-1]) for name in ("ours", "pread"))
        print(f"round {number + 1}: ours {ours:.1f} us, pread {plain:.1f} us", flush=True)
    return {name: np.array(rows) for name, rows in times.items()}


def time_call(read: Read, recording: int, start: int) -> float:
    """Microseconds of a call, including the release of its result."""
    start_ns = time.perf_counter_ns()
    read(recording, start)
    return (time.perf_counter_ns() - start_ns) / 1000


def overhead(dataset: Dataset, place: tuple[int, int, str], calls: int = 5000) -> float:
    """Median time of `Dataset.read` of one frame minus that of `os.pread` of its 160 bytes, in microseconds."""
    medians = []
    for read in (lambda: dataset.read(0, 5, 6), lambda: os.pread(place[0], 160, place[1] + 800)):
        times = []
        for _ in range(calls):
            start_ns = time.perf_counter_ns()
            read()
            times.append(time.perf_counter_ns() - start_ns)
        medians.append(float(np.median(times)) / 1000)
    return medians[0] - medians[1]


def report(times: dict[str, Any]) -> dict[str, float]:
    """Print the table, and return the figures for the JSON line."""
    print(f"{'30 s out of two hours':36} {'median us':>11} {'10 %':>11} {'90 %':>11} {'to pread':>9}")
    plain = float(np.median(times["pread"]))
    figures: dict[str, float] = {}
    for name, rows in times.items():
        low, middle, high = np.percentile(rows, [10, 50, 90])
        print(f"{name:36} {middle:11,.1f} {low:11,.1f} {high:11,.1f} {middle / plain:9,.2f}")
        if name not in (*PAIRS, *COLD):
            figures["ratio_" + name.lower().replace(" ", "_")] = round(float(middle / plain), 2)
    pairs = {"": PAIRS[:2], "_into_a_buffer": PAIRS[2:], "_cold": COLD}
    ratios = {key: np.median(times[b], axis=1) / np.median(times[a], axis=1) for key, (a, b) in pairs.items()}
    return {
        **{f"ratio_to_pread{key}": round(float(np.median(rows)), 3) for key, rows in ratios.items()},
        "lowest_ratio": round(float(ratios[""].min()), 3),
        "highest_ratio": round(float(ratios[""].max()), 3),
        "pread_us": round(plain, 1),
        **figures,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.range_read", description=__doc__)
    parser.add_argument("--recordings", type=int, default=4, help="two-hour recordings, 115 MB each per system")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=300, help="reads per round of systems that read ranges")
    parser.add_argument("--slow-calls", type=int, default=4, help="reads per round of systems that read whole items")
    parser.add_argument("--only-ours", action="store_true", help="omit the other systems")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_ours(folder / "ours", options.recordings)
        places = shard_bytes(folder / "ours")
        reads = our_reads(dataset, places, folder / "cache")
        exact, slow = set(reads), set[str]()
        if not options.only_ours:
            others = systems.write_all(folder, options.recordings, noise)
            reads |= {name: system.read for name, system in others.items()}
            exact |= {name for name, system in others.items() if system.exact}
            slow |= {name for name, system in others.items() if system.slow}
        check(reads, exact, options.recordings)
        for read in reads.values():
            if isinstance(read, systems.Streamed):
                read.checking = False
        figures = report(measure(reads, slow, options.recordings, options))
        figures["overhead_us"] = round(overhead(dataset, places[0]), 2)
    print_figures(figures, "float16")


if __name__ == "__main__":
    main()
