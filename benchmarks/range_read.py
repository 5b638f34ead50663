"""30 s of log-mel at a random place of a random two-hour recording: `python -m benchmarks.range_read`.

The same noise, 80 bins at 100 frames a second, is written by every system in its own way, and read as its users do:

- ours: `Dataset.read` (float16; also into a ready buffer, with checksums, and from a remote storage's local cache);
- a bare `os.pread` of the same bytes (float16), and `os.preadv` into a ready buffer;
- lhotse, `lilcom_chunky`: `cut.truncate(...).load_features()` (lossy, float32);
- lhotse Shar, lilcom: the same on cuts streamed from shuffled shards; an item is read whole (lossy, float32);
- WebDataset: `.npy` in tar shards, streamed and decoded; an item is read whole (float16);
- Hugging Face datasets: a memory-mapped table; `row["log_mel"][start:stop]`, a row is read whole; and, as an expert
  would, the values of the Arrow column sliced without reading the row (float16).

Everything lies in the page cache. Times are of single calls: median, 10th and 90th percentile; ratios to `pread` are of
the medians of a round, and their median over the rounds. The last line is JSON. Needs requirements-benchmarks.txt.
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
from data.format.dataset import Dataset, DatasetWriter, Recording, open_dataset
from data.storage.local import StorageSettings, open_storage

FRAMES, LENGTH = 720_000, 3000
BYTES = LENGTH * 80 * 2
# Calls of each that are not counted, at the start of a round.
WARM_UP = 20
PAIRS = ("pread", "ours", "preadv into a buffer", "ours into a buffer")
# The same with 64 MB of other memory gone through between two calls: as when a model's code runs in between.
COLD_NOTE = ", processor's caches emptied"
COLD = [name + COLD_NOTE for name in PAIRS[:2]]
# Lilcom's error on values of this size.
LOSSY = 0.2
# Reads of (recording, first frame).
Read = Callable[[int, int], Any]


def noise(recording: int, frames: int = FRAMES) -> np.ndarray:
    """float16 [frames, 80], the same at every call; a minute of it comes again and again, a little louder each time."""
    minute = np.random.default_rng(recording).normal(-5, 3, (6000, 80)).astype(np.float16)
    louder = (np.arange(frames // 6000) / 100).astype(np.float16)
    return (minute[None] + louder[:, None, None]).reshape(frames, 80)


def write_ours(folder: Path, recordings: int) -> Dataset:
    with DatasetWriter(folder, FeatureSettings()) as writer:
        for number in range(recordings):
            writer.add(Recording(f"r{number}"), noise(number))
        writer.finish()
    return open_dataset(folder)


def shard_bytes(folder: Path) -> list[tuple[int, int, str]]:
    """(file descriptor, byte of the first value, shard) of every recording, from the shards' headers alone."""
    found: dict[str, tuple[int, int, str]] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        file = os.open(path, os.O_RDONLY)
        size = int.from_bytes(os.pread(file, 8, 0), "little")
        header = json.loads(os.pread(file, size, 8))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = file, 8 + size + entry["data_offsets"][0], path.name
    return [found[name] for name in sorted(found)]


def our_reads(dataset: Dataset, places: list[tuple[int, int, str]], cache: Path) -> dict[str, Read]:
    """The bare reads, and ours."""
    buffer = np.empty((LENGTH, 80), np.float16)
    view = memoryview(buffer.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    remote = remote_storage(dataset.path, cache)

    def pread(recording: int, start: int) -> bytes:
        file, begin, _ = places[recording]
        return os.pread(file, BYTES, begin + 160 * start)

    def preadv(recording: int, start: int) -> np.ndarray:
        file, begin, _ = places[recording]
        os.preadv(file, [view], begin + 160 * start)
        return buffer

    def read_into(recording: int, start: int) -> np.ndarray:
        dataset.read_into(recording, start, buffer)
        return buffer

    def from_cache(recording: int, start: int) -> np.ndarray:
        _, begin, shard = places[recording]
        remote.read_into(shard, begin + 160 * start, view)
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
    """The dataset as a remote storage (in this process's memory) whose blocks are all in the cache."""
    import fsspec

    system = fsspec.filesystem("memory")
    storage = open_storage("memory://range-read", StorageSettings(cache_dir=str(cache)))
    for path in folder.glob("shard-*.safetensors"):
        system.pipe_file(f"/range-read/{path.name}", path.read_bytes())
        size = path.stat().st_size
        for begin in range(0, size, 2**24):
            storage.read_into(path.name, begin, memoryview(bytearray(min(2**24, size - begin))))
        system.rm_file(f"/range-read/{path.name}")
    return storage


def check(reads: dict[str, Read], exact: set[str], recordings: int) -> None:
    """Every system must give the frames that were asked for: equal, or as close as its compression is."""
    rng = np.random.default_rng(1)
    for recording in range(recordings):
        expected = noise(recording).astype(np.float32)
        for name, read in reads.items():
            start = int(rng.integers(FRAMES - LENGTH))
            got = read(recording, start)
            values = np.frombuffer(got, np.float16).reshape(LENGTH, 80) if isinstance(got, bytes) else got
            error = np.abs(np.asarray(values, np.float32) - expected[start : start + LENGTH]).max()
            if values.shape != (LENGTH, 80) or not error <= (0 if name in exact else LOSSY):
                raise SystemExit(f"{name} reads something else: {values.shape}, largest difference {error}")


def measure(reads: dict[str, Read], slow: set[str], recordings: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of every call, [rounds, calls], by system. The bare reads and ours beside them take turns call by
    call, so that whatever else the machine does meets both; the others come one after another in each round."""
    rng = np.random.default_rng(2)
    times: dict[str, list[list[float]]] = {name: [] for name in [*reads, *COLD]}
    emptying = np.ones(8_000_000)

    def turns(names: Sequence[str], calls: int, note: str = "") -> None:
        rows: dict[str, list[float]] = {name: [] for name in names}
        for call in range(-min(WARM_UP, calls // 2), calls):
            for name in rng.permutation(names).tolist():
                if note:
                    emptying.sum()
                took = time_call(reads[name], int(rng.integers(recordings)), int(rng.integers(FRAMES - LENGTH)))
                if call >= 0:
                    rows[name].append(took)
        for name in names:
            times[name + note].append(rows[name])

    for number in range(options.rounds):
        turns(PAIRS, options.calls)
        turns(PAIRS[:2], options.calls // 4, note=COLD_NOTE)
        for name in reads:
            if name not in PAIRS:
                turns([name], options.slow_calls if name in slow else options.calls)
        ours, bare = (np.median(times[name][-1]) for name in ("ours", "pread"))
        print(f"round {number + 1}: ours {ours:.1f} us, pread {bare:.1f} us", flush=True)
    return {name: np.array(rows) for name, rows in times.items()}


def time_call(read: Read, recording: int, start: int) -> float:
    """Microseconds; what was read is freed within them."""
    begin = time.perf_counter_ns()
    read(recording, start)
    return (time.perf_counter_ns() - begin) / 1000


def overhead(dataset: Dataset, place: tuple[int, int, str], calls: int = 5000) -> float:
    """Microseconds of `Dataset.read` of one frame above those of `os.pread` of its 160 bytes: medians."""
    medians = []
    for read in (lambda: dataset.read(0, 5, 6), lambda: os.pread(place[0], 160, place[1] + 800)):
        times = []
        for _ in range(calls):
            begin = time.perf_counter_ns()
            read()
            times.append(time.perf_counter_ns() - begin)
        medians.append(float(np.median(times)) / 1000)
    return medians[0] - medians[1]


def report(times: dict[str, Any]) -> dict[str, float]:
    """Prints the table; the figures of the JSON line."""
    print(f"{'30 s out of two hours':36} {'median us':>11} {'10 %':>11} {'90 %':>11} {'to pread':>9}")
    bare = float(np.median(times["pread"]))
    figures: dict[str, float] = {}
    for name, rows in times.items():
        low, middle, high = np.percentile(rows, [10, 50, 90])
        print(f"{name:36} {middle:11,.1f} {low:11,.1f} {high:11,.1f} {middle / bare:9,.2f}")
        if name not in (*PAIRS, *COLD):
            figures["ratio_" + name.lower().replace(" ", "_")] = round(float(middle / bare), 2)
    pairs = {"": PAIRS[:2], "_into_a_buffer": PAIRS[2:], "_cold": COLD}
    ratios = {key: np.median(times[b], axis=1) / np.median(times[a], axis=1) for key, (a, b) in pairs.items()}
    return {
        **{f"ratio_to_pread{key}": round(float(np.median(rows)), 3) for key, rows in ratios.items()},
        "lowest_ratio": round(float(ratios[""].min()), 3),
        "highest_ratio": round(float(ratios[""].max()), 3),
        "pread_us": round(bare, 1),
        **figures,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.range_read", description=__doc__)
    parser.add_argument("--recordings", type=int, default=4, help="two-hour recordings, 115 MB each and system")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=300, help="reads in a round of what reads a range")
    parser.add_argument("--slow-calls", type=int, default=4, help="reads in a round of what reads whole items")
    parser.add_argument("--only-ours", action="store_true", help="leave the other systems out")
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
