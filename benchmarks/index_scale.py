"""What ten million recordings cost: `python -m benchmarks.index_scale`.

Writes an index of made-up recordings (2 to 20 s, with text and statistics) beside shards that are holes of the right
size, opens it, builds the training order, restores a random step, and takes batches with two workers. The files are in
the page cache, as on a node where another process has opened them. The last line is JSON.
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
from data.format import index as ix
from data.format.dataset import open_dataset
from data.format.index_file import statistics_header
from data.loading.loader import LoaderSettings, RowLoader
from data.loading.rows import DataState

SHARD_BYTES = 2_000_000_000
LABELS = {
    "language": ["de", "en", "es", "fr", "it", "nl", "pl", "pt"],
    "speaker": [f"speaker-{number:05d}" for number in range(10_000)],
    "split": ["dev", "train"],
}


def write_dataset(folder: Path, recordings: int, seed: int = 0) -> None:
    """A dataset of that many recordings whose sound is zeros that take no room on the disk."""
    features = FeatureSettings()
    rng = np.random.default_rng(seed)
    frames = rng.integers(200, 2000, recordings)
    end = np.cumsum(frames * features.num_mels * ix.BYTES_PER_VALUE)
    numbers: dict[str, pa.Array] = {
        "shard": pa.array((end // SHARD_BYTES).astype(np.int32)),
        "offset": pa.array(end % SHARD_BYTES + 65536),
        "bytes": pa.array(frames * features.num_mels * ix.BYTES_PER_VALUE),
        "frames": pa.array(frames),
    }
    for name, values in LABELS.items():
        codes = rng.integers(0, len(values), recordings, np.int32)
        numbers[name] = pa.DictionaryArray.from_arrays(codes, pa.array(values))
    schema = ix.index_schema()
    with replace_file(folder / ix.INDEX_FILE) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([numbers[name] for name in schema.names], schema=schema))
    schema = ix.recordings_schema()
    with (
        replace_file(folder / ix.RECORDINGS_FILE) as file,
        pa.ipc.new_file(file, schema) as writer,
        replace_file(folder / ix.STATISTICS_FILE) as statistics,
    ):
        statistics.write(statistics_header(recordings, features.num_mels))
        for first in tqdm(range(0, recordings, ix.BATCH_ROWS), "index", disable=None):
            size = min(ix.BATCH_ROWS, recordings - first)
            statistics.write(rng.normal(1, 0.1, size * 2 * features.num_mels).astype(np.float32).tobytes())
            texts = {
                "id": pa.array([f"recording-{n:09d}" for n in range(first, first + size)]),
                "crc32": pa.array(np.zeros((size, 1), np.uint32).tolist(), schema.field("crc32").type),
                "block_bytes": pa.nulls(size, schema.field("block_bytes").type),
                "text": pa.array(["some sixty characters of what somebody said in this recording"] * size),
                "words": pa.nulls(size, ix.WORDS),
                "excluded": pa.nulls(size, ix.EXCLUDED),
            }
            writer.write_batch(pa.RecordBatch.from_arrays([texts[name] for name in schema.names], schema=schema))
    for number in range(int(end[-1] // SHARD_BYTES) + 1):
        with open(folder / ix.shard_name(number), "wb") as hole:
            hole.truncate(SHARD_BYTES + 65536 + 2000 * features.num_mels * ix.BYTES_PER_VALUE)
    fields = {"mean": [-5.0] * features.num_mels, "std": [1.0] * features.num_mels, "fingerprint": "made up"}
    totals = {"recordings": recordings, "frames": int(frames.sum())}
    write_json(folder / ix.DATASET_FILE, {**ix.head(features, "plain"), **fields, **totals})


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Open, restore, and take batches, in this process and two workers."""
    before = memory([os.getpid()], "Pss")
    begin = time.perf_counter()
    dataset = open_dataset(folder)
    open_seconds = time.perf_counter() - begin
    settings = LoaderSettings(dataset=str(folder), num_workers=2, rows=16, row_frames=2000)

    begin = time.perf_counter()
    crops = settings.crop_order(dataset)
    order_seconds = time.perf_counter() - begin
    rng = np.random.default_rng(options.seed)
    restore, first_batch = [], []
    for _ in range(options.repeats):
        begin = time.perf_counter()
        there = RowLoader(dataset, settings.crop_order(dataset), settings, multiple=4, row_gap=4)
        block = int(rng.integers(there.stream.blocks))
        state = DataState(int(rng.integers(3)), block, 3, dataset.fingerprint, there.stream.order)
        alone = LoaderSettings(dataset=str(folder), num_workers=0, rows=16, row_frames=2000)
        restored = RowLoader(dataset, there.crops, alone, multiple=4, row_gap=4, state=state)
        restore.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        next(iter(restored))
        first_batch.append(time.perf_counter() - begin)
    del there, restored
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
    parser.add_argument("--folder", type=Path, help="keep the dataset here, and use it if it is there already")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200, help="taken before memory is measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / ix.DATASET_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_dataset(folder, options.recordings, options.seed)
            os.sync()  # or the disk would be busy with what was just written
        # In a process of its own: what the writing left behind in this one is not the reader's.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            figures = pool.submit(measure, folder, options).result()
        names = (ix.INDEX_FILE, ix.RECORDINGS_FILE, ix.STATISTICS_FILE)
        index_gb = round(sum((folder / name).stat().st_size for name in names) / 1e9, 2)
    print_figures({"recordings": options.recordings, "index_gb": index_gb, **figures}, "float32")


if __name__ == "__main__":
    main()
