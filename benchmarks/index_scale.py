"""Time and memory for a dataset of ten million recordings: `python -m benchmarks.index_scale`.

Writes a synthetic index (recordings of 2 to 20 s, with text and statistics) and sparse shard files, opens the dataset,
builds the training order, restores a random step, and loads batches with two workers. The files are in the page cache,
as on a node where another process has already opened them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from benchmarks.machine import print_figures
from benchmarks.memory import family, memory
from common.files import replace_file, write_json
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.format.index_writer import format_fields
from data.format.schema import (
    BATCH_ROWS,
    BYTES_PER_VALUE,
    DATASET_FILE,
    EXCLUDED,
    INDEX_FILE,
    RECORDINGS_FILE,
    STATISTICS_FILE,
    WORDS,
    index_schema,
    recordings_schema,
    shard_name,
    statistics_header,
)
from data.loading.loader import LoaderSettings, RowLoader
from data.loading.rows import DataState

SHARD_BYTES = 2_000_000_000
LABELS = {
    "language": ["de", "en", "es", "fr", "it", "nl", "pl", "pt"],
    "speaker": [f"speaker-{number:05d}" for number in range(10_000)],
    "split": ["dev", "train"],
}


def write_dataset(folder: Path, recordings: int, seed: int = 0) -> None:
    """Write a dataset whose values are zeros in sparse files, which take no disk space."""
    features = FeatureSettings()
    rng = np.random.default_rng(seed)
    frames = rng.integers(200, 2000, recordings)
    end = np.cumsum(frames * features.num_mels * BYTES_PER_VALUE)
    numbers: dict[str, pa.Array] = {
        "shard": pa.array((end // SHARD_BYTES).astype(np.int32)),
        "offset": pa.array(end % SHARD_BYTES + 65536),
        "bytes": pa.array(frames * features.num_mels * BYTES_PER_VALUE),
        "frames": pa.array(frames),
    }
    for name, values in LABELS.items():
        codes = rng.integers(0, len(values), recordings, np.int32)
        numbers[name] = pa.DictionaryArray.from_arrays(codes, pa.array(values))
    schema = index_schema()
    with replace_file(folder / INDEX_FILE) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([numbers[name] for name in schema.names], schema=schema))
    schema = recordings_schema()
    with (
        replace_file(folder / RECORDINGS_FILE) as file,
        pa.ipc.new_file(file, schema) as writer,
        replace_file(folder / STATISTICS_FILE) as statistics,
    ):
        statistics.write(statistics_header(recordings, features.num_mels))
        for first in tqdm(range(0, recordings, BATCH_ROWS), "index", disable=None):
            size = min(BATCH_ROWS, recordings - first)
            statistics.write(rng.normal(1, 0.1, size * 2 * features.num_mels).astype(np.float32).tobytes())
            texts = {
                "id": pa.array([f"recording-{n:09d}" for n in range(first, first + size)]),
                "crc32": pa.array(np.zeros((size, 1), np.uint32).tolist(), schema.field("crc32").type),
                "block_bytes": pa.nulls(size, schema.field("block_bytes").type),
                "text": pa.array(["some sixty characters of the transcript of a short recording."] * size),
                "words": pa.nulls(size, WORDS),
                "excluded": pa.nulls(size, EXCLUDED),
            }
            writer.write_batch(pa.RecordBatch.from_arrays([texts[name] for name in schema.names], schema=schema))
    for number in range(int(end[-1] // SHARD_BYTES) + 1):
        with open(folder / shard_name(number), "wb") as file:
            file.truncate(SHARD_BYTES + 65536 + 2000 * features.num_mels * BYTES_PER_VALUE)
    fields = {"mean": [-5.0] * features.num_mels, "std": [1.0] * features.num_mels, "fingerprint": "made up"}
    totals = {"recordings": recordings, "frames": int(frames.sum())}
    write_json(folder / DATASET_FILE, {**format_fields(features, "plain"), **fields, **totals})


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Open the dataset, restore, and load batches, in this process and two workers."""
    before = memory([os.getpid()], "Pss")
    start = time.perf_counter()
    dataset = open_dataset(folder)
    open_seconds = time.perf_counter() - start
    settings = LoaderSettings(dataset=str(folder), num_workers=2, rows=16, row_frames=2000)

    start = time.perf_counter()
    crops = settings.crop_order(dataset)
    order_seconds = time.perf_counter() - start
    rng = np.random.default_rng(options.seed)
    restore, first_batch = [], []
    for _ in range(options.repeats):
        start = time.perf_counter()
        loader = RowLoader(dataset, settings.crop_order(dataset), settings, multiple=4, row_gap=4)
        block = int(rng.integers(loader.stream.blocks))
        state = DataState(int(rng.integers(3)), block, 3, dataset.fingerprint, loader.stream.order)
        in_process = LoaderSettings(dataset=str(folder), num_workers=0, rows=16, row_frames=2000)
        restored = RowLoader(dataset, loader.crops, in_process, multiple=4, row_gap=4, state=state)
        restore.append(time.perf_counter() - start)
        start = time.perf_counter()
        next(iter(restored))
        first_batch.append(time.perf_counter() - start)
    del loader, restored
    batches = iter(RowLoader(dataset, crops, settings, multiple=4, row_gap=4))
    for _ in range(options.batches):
        next(batches)
    processes = family()
    return {
        "open_seconds": round(open_seconds, 3),
        "order_seconds": round(order_seconds, 3),
        "restore_seconds": round(statistics.median(restore), 3),
        "next_batch_seconds": round(statistics.median(first_batch), 4),
        "next_batch_worst": round(max(first_batch), 4),
        "resident_gb": round(memory(processes, "Pss") / 1e9, 3),
        "resident_before_gb": round(before / 1e9, 3),
        "private_gb": round(memory(processes, "Pss_Anon") / 1e9, 3),
        "processes": len(processes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index_scale", description=__doc__)
    parser.add_argument("--recordings", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="keep the dataset in this folder, or use an existing one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200, help="number of batches loaded before memory is measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / DATASET_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_dataset(folder, options.recordings, options.seed)
            os.sync()  # otherwise the disk is busy during the measurement
        # In a new process, without memory left over from writing.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            figures = pool.submit(measure, folder, options).result()
        names = (INDEX_FILE, RECORDINGS_FILE, STATISTICS_FILE)
        index_gb = round(sum((folder / name).stat().st_size for name in names) / 1e9, 2)
    print_figures({"recordings": options.recordings, "index_gb": index_gb, **figures}, "float32")


if __name__ == "__main__":
    main()
