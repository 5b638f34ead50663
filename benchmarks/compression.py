"""Comparison of compressed encodings of log-mel: `python -m benchmarks.compression --dataset DIR`.

Recordings, concatenated to the requested duration, are encoded in blocks and written to a file, once per candidate. The
table gives the size relative to plain float16; the maximum and rms error, in standard deviations of the bin; the speed
of encoding, and of reading crops at random positions with one `pread` each from the page cache (CPU time on one core).
The candidates alternate in every round; times are medians over the rounds. The codecs of `data.format.encoding` come
first, with several block sizes and levels, followed by the alternatives.

With `--model EXPORT`, evaluate.py decodes the test recordings with a CTC recogniser, from plain values and from those
of every lossy candidate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import print_figures
from data.format.compression import Codec, decode, encode
from data.format.dataset import Dataset, open_dataset
from data.format.schema import BLOCK_FRAMES
from data.format.writer import DatasetWriter
from data.shards.derive import stored_recording

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = (256, 512, 1024, 4096)


@dataclass(frozen=True)
class Candidate:
    """Encoding of blocks: `encode` converts float16 [n, M] to bytes, `decode` fills such an array from them."""

    name: str
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes | memoryview, np.ndarray], None]
    block: int = BLOCK_FRAMES


def ours(codec: Codec, block: int = BLOCK_FRAMES, level: int = 1) -> Candidate:
    name = f"{codec}, blocks of {block}, level {level}"
    return Candidate(name, partial(encode, codec=codec, level=level), lambda data, out: decode(data, codec, out), block)


def copied() -> Candidate:
    def fill(data: bytes | memoryview, out: np.ndarray) -> None:
        out.reshape(-1)[:] = np.frombuffer(data, np.float16)

    return Candidate("plain float16", lambda values: values.tobytes(), fill)


def differences(bits: np.ndarray) -> np.ndarray:
    return np.diff(bits, axis=0, prepend=np.zeros_like(bits[:1]))


def rearranged(
    name: str, arrange: Callable[[np.ndarray], np.ndarray], restore: Callable[[np.ndarray, np.ndarray], None]
) -> Candidate:
    """Candidate that stores rearranged bits uint16 [n, M] in one zstd frame; `restore(bytes, bits)` is the inverse."""

    def pack(values: np.ndarray) -> bytes:
        return pa.Codec("zstd", compression_level=1).compress(arrange(values.view(np.uint16)).tobytes(), asbytes=True)

    def fill(data: bytes | memoryview, out: np.ndarray) -> None:
        raw = pa.Codec("zstd").decompress(data, decompressed_size=out.nbytes)
        restore(np.frombuffer(raw, np.uint8), out.view(np.uint16))

    return Candidate(name, pack, fill)


def shuffled(differ: bool, transpose: bool) -> Candidate:
    def arrange(bits: np.ndarray) -> np.ndarray:
        bits = differences(bits) if differ else bits
        return np.ascontiguousarray(bits.T if transpose else bits).reshape(-1).view(np.uint8).reshape(-1, 2).T

    def restore(raw: np.ndarray, bits: np.ndarray) -> None:
        low, high = raw.reshape(2, *(bits.shape[::-1] if transpose else bits.shape))
        values = np.left_shift(high, 8, dtype=np.uint16)
        values |= low
        bits[:] = values.T if transpose else values
        if differ:
            np.add.accumulate(bits, axis=0, out=bits)

    name = "shuffle-zstd in one frame" + ", differences" * differ + ", bin by bin" * transpose
    return rearranged(name, arrange, restore)


def bit_planes() -> Candidate:
    def arrange(bits: np.ndarray) -> np.ndarray:
        signed = differences(bits).view(np.int16)
        folded = ((signed << 1) ^ (signed >> 15)).astype(">u2")  # small differences of both signs have zero high bits
        return np.packbits(np.unpackbits(folded.reshape(-1).view(np.uint8)).reshape(-1, 16).T)

    def restore(raw: np.ndarray, bits: np.ndarray) -> None:
        pairs = np.packbits(np.ascontiguousarray(np.unpackbits(raw).reshape(16, -1).T))
        folded = pairs.view(">u2").astype(np.uint16).reshape(bits.shape)
        signed = (folded >> 1) ^ (np.uint16(0) - (folded & np.uint16(1)))
        np.add.accumulate(signed, axis=0, out=bits)

    return rearranged("bit planes of differences", arrange, restore)


def quantised(bits: int, zstd: bool, differ: bool) -> Candidate:
    """Candidate like `uint8` with 2^bits steps; without zstd every step takes one byte."""
    codec = pa.Codec("zstd", compression_level=1)

    def pack(values: np.ndarray) -> bytes:
        bounds = np.stack([values.min(axis=0), values.max(axis=0)])
        lowest, highest = bounds.astype(np.float32)
        step = np.maximum(highest - lowest, 1e-9) / (2**bits - 1)
        steps = np.rint((values - lowest) / step).astype(np.uint8)
        steps = differences(steps) if differ else steps
        return bounds.tobytes() + (codec.compress(steps.tobytes(), asbytes=True) if zstd else steps.tobytes())

    def fill(data: bytes | memoryview, out: np.ndarray) -> None:
        size = 4 * out.shape[1]
        lowest, highest = np.frombuffer(data, np.float16, 2 * out.shape[1]).reshape(2, -1).astype(np.float32)
        raw = codec.decompress(data[size:], decompressed_size=out.size) if zstd else data[size:]
        steps = np.frombuffer(bytearray(raw), np.uint8).reshape(out.shape)
        steps = np.add.accumulate(steps, axis=0, dtype=np.uint8) if differ else steps
        scale = torch.from_numpy((highest - lowest) / np.float32(2**bits - 1))
        values = torch.from_numpy(steps).to(torch.float32).mul_(scale).add_(torch.from_numpy(lowest))
        torch.from_numpy(out).copy_(values)

    suffix = ", differences, zstd" if differ else ", zstd" if zstd else ""
    return Candidate(f"{bits} bits{suffix}", pack, fill)


def candidates() -> list[Candidate]:
    codecs: tuple[Codec, ...] = ("shuffle-zstd", "uint8")
    return [
        copied(),
        *(ours(codec, block) for codec in codecs for block in BLOCKS),
        *(ours(codec, level=level) for codec in codecs for level in (3, 9)),
        *(shuffled(differ, transpose) for differ in (False, True) for transpose in (False, True)),
        bit_planes(),
        quantised(8, zstd=False, differ=False),
        quantised(8, zstd=True, differ=False),
        quantised(6, zstd=True, differ=True),
        quantised(4, zstd=True, differ=True),
    ]


def encode_all(candidate: Candidate, values: np.ndarray) -> list[bytes]:
    return [candidate.encode(values[i : i + candidate.block]) for i in range(0, len(values), candidate.block)]


class Stored:
    """Recording in a file, in the blocks of a candidate."""

    def __init__(self, candidate: Candidate, values: np.ndarray, file: BinaryIO) -> None:
        self.candidate, (self.frames, self.bins) = candidate, values.shape
        start = time.process_time()
        blocks = encode_all(candidate, values)
        self.encode_seconds = time.process_time() - start
        self.offsets = np.cumsum([0, *map(len, blocks)])
        self.file = file
        file.write(b"".join(blocks))
        file.flush()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read frames [start, stop) with one positioned read of their blocks."""
        out = np.empty((stop - start, self.bins), np.float16)
        size, offsets = self.candidate.block, self.offsets
        if self.candidate.name == copied().name:
            self.candidate.decode(os.pread(self.file.fileno(), out.nbytes, start * self.bins * 2), out)
            return out
        first, last = start // size, -(-stop // size)
        view = memoryview(os.pread(self.file.fileno(), int(offsets[last] - offsets[first]), int(offsets[first])))
        for block in range(first, last):
            part = view[offsets[block] - offsets[first] : offsets[block + 1] - offsets[first]]
            top, bottom = block * size, min((block + 1) * size, self.frames)
            inside = start <= top and bottom <= stop
            whole = out[top - start : bottom - start] if inside else np.empty((bottom - top, self.bins), np.float16)
            self.candidate.decode(part, whole)
            if not inside:
                left, right = max(top, start), min(bottom, stop)
                out[left - start : right - start] = whole[left - top : right - top]
        return out


def errors(values: np.ndarray, read: np.ndarray) -> tuple[float, float]:
    """(maximum, root mean square) error, in standard deviations of the bin."""
    deviation = np.maximum(values.astype(np.float32).std(axis=0), 0.01)  # lower bound as in `data.format.dataset`
    error = np.abs(read.astype(np.float32) - values) / deviation
    return float(error.max()), float(np.sqrt(np.square(error, dtype=np.float64).mean()))


def measure(dataset: Dataset, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure the rows of the table, by candidate."""
    rng = np.random.default_rng(0)
    frames, parts = int(options.minutes * 60 * dataset.features.frames_per_second), []
    for recording in rng.permutation(len(dataset)):
        parts.append(dataset.read(int(recording)))
        if sum(map(len, parts)) >= frames:
            break
    values = np.concatenate(parts)[:frames]
    crop = int(options.crop_seconds * dataset.features.frames_per_second)
    seconds = len(values) / dataset.features.frames_per_second
    starts = rng.integers(0, len(values) - crop, options.crops)
    with contextlib.ExitStack() as files:
        recordings = [Stored(c, values, files.enter_context(tempfile.TemporaryFile())) for c in candidates()]
        times: list[list[float]] = [[] for _ in recordings]
        for _ in range(options.rounds):
            for stored, spent in zip(recordings, times, strict=True):
                started = time.process_time()
                for start in starts:
                    stored.read(start, start + crop)
                spent.append((time.process_time() - started) / len(starts))
        table = {}
        for stored, spent in zip(recordings, times, strict=True):
            maximum, rms = errors(values, stored.read(0, len(values)))
            table[stored.candidate.name] = {
                "relative_size": round(float(stored.offsets[-1]) / values.nbytes, 4),
                "max_error": round(maximum, 5),
                "rms_error": round(rms, 5),
                "encode_audio_seconds_per_second": round(seconds / stored.encode_seconds),
                "read_ms": round(statistics.median(spent) * 1e3, 4),
                "read_audio_seconds_per_second": round(options.crop_seconds / statistics.median(spent)),
            }
    return table


def character_errors(dataset: Dataset, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """CER and WER of the model by candidate, on features that were encoded and decoded."""
    selected = dataset.select(split="test", language=options.language or None)
    lossy = [c for c in candidates() if "bits" in c.name.split(",")[0].split() or c.name == ours("uint8").name]
    results: dict[str, dict[str, float]] = {}
    plain: list[str] = []
    for candidate in [copied(), *lossy]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with DatasetWriter(folder / "dataset", dataset.features) as writer:
                for i in map(int, selected):
                    values = dataset.read(i)
                    out = np.empty_like(values)
                    for number, block in enumerate(encode_all(candidate, values)):
                        first = number * candidate.block
                        candidate.decode(block, out[first : first + candidate.block])
                    writer.add(stored_recording(dataset, i), out)
                writer.finish()
            command = [sys.executable, "evaluate.py", "--export", str(Path(options.model).resolve())]
            command += ["--data.dataset", str(folder / "dataset"), "--out", str(folder / "out")]
            command += ["--inference.context_seconds", str(options.context_seconds)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            report: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
        hypotheses = [row["hypothesis"] for row in report["recordings"]]
        plain = plain or hypotheses
        changed = sum(a != b for a, b in zip(hypotheses, plain, strict=True))
        total = report["scores"]["all"]
        results[candidate.name] = {"cer": total["cer"], "wer": total["wer"], "transcripts_changed": changed}
        print(
            f"{candidate.name:<52} CER {100 * total['cer']:6.2f} %  WER {100 * total['wer']:6.2f} %  "
            f"{changed} of {len(selected)} transcripts changed",
            flush=True,
        )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--dataset", required=True, help="dataset folder, made by `python -m data.prepare`")
    parser.add_argument("--minutes", type=float, default=30.0, help="duration of the audio")
    parser.add_argument("--crop_seconds", type=float, default=20.0, help="duration of a crop")
    parser.add_argument("--crops", type=int, default=200, help="crops per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of reading")
    parser.add_argument("--model", default="", help="export folder of finetune_ctc.py, to decode the test recordings")
    parser.add_argument("--language", default="", help="with --model: language of the recordings (default: all)")
    parser.add_argument("--context_seconds", type=float, default=10.0, help="with --model: length of a window")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dataset = open_dataset(options.dataset)
    table = measure(dataset, options)
    print(f"{'':<52}{'size':>7}{'max err':>9}{'rms err':>9}{'encode':>12}{'read a crop':>12}{'read':>16}")
    for name, row in table.items():
        print(
            f"{name:<52}{row['relative_size']:>7.3f}{row['max_error']:>9.4f}{row['rms_error']:>9.5f}"
            f"{row['encode_audio_seconds_per_second']:>8,.0f} s/s{row['read_ms']:>9.3f} ms"
            f"{row['read_audio_seconds_per_second']:>12,.0f} s/s"
        )
    figures: dict[str, Any] = {"dataset": dataset.path.name, "candidates": table}
    if options.model:
        figures["recognition"] = character_errors(dataset, options)
    print_figures(figures, "float32")


if __name__ == "__main__":
    main()
