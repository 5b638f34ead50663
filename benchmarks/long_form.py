"""Cost of long recordings: time and peak memory of greedy CTC on minutes to hours, in every inference mode.

    python -m benchmarks.long_form
    python -m benchmarks.long_form --layers 2 --minutes 1 3       # a short trial

A cell is one mode on one recording, with a model of random weights and a CTC head, on the CPU:

    chunked      adjacent windows, inference.overlap 0
    buffered     windows whose centres are kept, `--overlap`
    averaged     probabilities averaged over the same windows
    whole        one pass, full attention; recordings up to `--whole-limit` minutes
    window       one pass, windowed attention (`--window`); recordings up to `--window-limit` minutes
    streaming    chunk by chunk (`--chunk`, `--left-chunks`), with a causal encoder

Features come from a random generator, block by block, so that a recording is in memory only if the mode reads all of
it. Each cell runs in a separate process: its peak is the highest resident size minus that before the first pass
(weights). A warm-up on ten seconds is not timed. Cells alternate within every round; the fastest run counts, and the
highest peak. The last line is JSON; some of its keys:

    MODE_Nmin_time, MODE_Nmin_mb    milliseconds of computation per second of audio; MB of peak memory
    MODE_Nmin_rtf                   real-time factor: seconds of computation per second of audio
    cost_180min_over_10min          time per second of audio, the longest relative to the shortest recording, buffered
    memory_180min_over_10min        the same for the peak
    buffered_over_chunked           time, on the longest recording

Durations in the names are those of `--minutes`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import print_figures
from bestrq.long_form.inference import InferenceSettings, Mode, RecordingSource, StreamedOutputs, model_outputs
from bestrq.model.presets import PRESETS
from bestrq.model.settings import EncoderSettings
from bestrq.recognition.ctc import CTCModel, frame_log_probs
from bestrq.training.machine import keep_freed_memory
from bestrq.training.memory import reset_peak, resident_bytes

FRAMES_PER_SECOND = 100
BLOCK = 1000
"""mel frames per seed"""
WARM_UP = 10
"""seconds of audio"""
SYSTEMS: dict[str, Mode] = {
    "chunked": "buffered",
    "buffered": "buffered",
    "averaged": "averaged",
    "whole": "whole",
    "window": "whole",
    "streaming": "streaming",
}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    system: str
    minutes: float
    encoder: EncoderSettings
    inference: InferenceSettings
    vocab_size: int

    @property
    def name(self) -> str:
        return f"{self.system}_{self.minutes:g}min"


@dataclass(frozen=True)
class Cost:
    """Cost of a run."""

    milliseconds: float
    """per second of audio"""
    megabytes: float
    """peak above the resident size before the run"""

    def best(self, other: Cost) -> Cost:
        """Return the fastest time and the highest peak of both."""
        return Cost(min(self.milliseconds, other.milliseconds), max(self.megabytes, other.megabytes))


def read_mel(num_mels: int, start: int, stop: int) -> Tensor:
    """Frames of a random recording, float32 `[stop - start, M]`: independent of the window that reads them."""
    first, last = start // BLOCK, (stop - 1) // BLOCK
    blocks = [
        torch.randn(BLOCK, num_mels, generator=torch.Generator().manual_seed(seed)) for seed in range(first, last + 1)
    ]
    return torch.cat(blocks)[start - first * BLOCK : stop - first * BLOCK]


def measure(cell: Cell, threads: int) -> Cost:
    """Measure a cell. Must run in a new process, for the sake of the memory figures."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = CTCModel(cell.encoder, cell.vocab_size).eval()
    stream = StreamedOutputs(model.encoder, partial(frame_log_probs, model.head))

    def run(seconds: float) -> float:
        source = RecordingSource(round(seconds * FRAMES_PER_SECOND), partial(read_mel, cell.encoder.num_mels))
        start = time.perf_counter()
        stride = cell.encoder.stride
        [(_, ids)] = model_outputs(
            model.log_probs, [source], cell.inference, stride, FRAMES_PER_SECOND,
            reduce=lambda log_probs: log_probs.argmax(dim=-1), stream=stream,
        )  # fmt: skip
        if len(ids) != -(-source.num_frames // stride):
            raise RuntimeError(f"{cell.name}: {len(ids)} frames of a recording of {source.num_frames} mel frames")
        return time.perf_counter() - start

    before = resident_bytes("VmRSS")
    reset_peak()
    run(WARM_UP)
    seconds = run(60 * cell.minutes)
    peak = resident_bytes("VmHWM") - before
    return Cost(seconds / (60 * cell.minutes) * 1e3, peak / 1e6)


def plan(args: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """Cells to run, and the names of skipped cells."""
    preset = PRESETS[args.preset]
    encoder = replace(preset, num_layers=args.layers or preset.num_layers)
    changes = {
        "window": {"mask": "window", "window": args.window},
        "streaming": {
            "mask": "chunk",
            "chunk_size": args.chunk,
            "left_chunks": args.left_chunks,
            "causal_convolution": True,
        },
    }
    limits = {"whole": args.whole_limit, "window": args.window_limit}
    cells, left_out = [], []
    for minutes in sorted(args.minutes):
        for system in args.systems:
            overlap = 0.0 if system == "chunked" else args.overlap
            inference = InferenceSettings(
                SYSTEMS[system], args.context_seconds, overlap, args.batch_seconds, args.precision
            )
            cell = Cell(system, minutes, replace(encoder, **changes.get(system, {})), inference, args.vocab_size)
            if minutes <= limits.get(system, float("inf")):
                cells.append(cell)
            else:
                left_out.append(cell.name)
    return cells, left_out


def summarise(costs: dict[str, Cost], minutes: list[float]) -> dict[str, float]:
    """Figures of the JSON line."""
    result = {}
    for name, cost in costs.items():
        result[f"{name}_time"] = round(cost.milliseconds, 3)
        result[f"{name}_rtf"] = round(cost.milliseconds / 1e3, 5)
        result[f"{name}_mb"] = round(cost.megabytes, 1)
    short, long = min(minutes), max(minutes)
    first, last = costs.get(f"buffered_{short:g}min"), costs.get(f"buffered_{long:g}min")
    if first and last:
        ratio = f"{long:g}min_over_{short:g}min"
        result[f"cost_{ratio}"] = round(last.milliseconds / first.milliseconds, 3)
        result[f"memory_{ratio}"] = round(last.megabytes / first.megabytes, 3)
    chunked = costs.get(f"chunked_{long:g}min")
    if last and chunked:
        result["buffered_over_chunked"] = round(last.milliseconds / chunked.milliseconds, 3)
    return result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base-120m")
    parser.add_argument("--layers", type=int, default=0, help="number of layers; 0 for those of the preset")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 60, 180], help="lengths of the recordings")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--context-seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--overlap", type=float, default=0.25, help="share of a window that its neighbours share")
    parser.add_argument("--batch-seconds", type=float, default=120.0, help="audio in a batch")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="precision of the encoder"
    )
    parser.add_argument("--window", type=int, default=128, help="encoder frames to either side in windowed attention")
    parser.add_argument("--chunk", type=int, default=32, help="encoder frames per chunk of a stream")
    parser.add_argument("--left-chunks", type=int, default=4, help="earlier chunks in the attention of a chunk")
    parser.add_argument("--whole-limit", type=float, default=10, help="longest recording with full attention, minutes")
    parser.add_argument(
        "--window-limit", type=float, default=60, help="longest recording with windowed attention in one pass, minutes"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    cells, left_out = plan(args)
    print(f"{args.preset}, {cells[0].encoder.num_layers} layers; windows of {args.context_seconds:g} s")
    if left_out:
        print("skipped: " + ", ".join(left_out))
    costs: dict[str, Cost] = {}
    for _ in range(args.rounds):
        for cell in cells:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                cost = process.submit(measure, cell, args.threads).result()
            costs[cell.name] = costs[cell.name].best(cost) if cell.name in costs else cost
            print(f"{cell.name:20} {cost.milliseconds:9.2f} ms/s {cost.megabytes:9.1f} MB", flush=True)
    result: dict[str, object] = {"preset": args.preset, "layers": cells[0].encoder.num_layers}
    result |= {"context_seconds": args.context_seconds, "overlap": args.overlap}
    result |= {"left_out": left_out, **summarise(costs, args.minutes)}
    print_figures(result, args.precision, args.threads)


if __name__ == "__main__":
    main()
