"""Cost of context: time and peak memory per second of audio, for segments of 10 s to an hour, full and windowed.

    python -m benchmarks.context_cost --plot context_cost.png     # other systems: requirements-benchmarks.txt

A cell is one encoder on log-mel on the CPU, in the precision of the hardware, with segments of one duration: one per
row, batched up to `--batch-seconds` of audio (a longer segment alone), so that cells differ in context and not in the
amount of work. `forward` is inference; `train` is forward and backward with dropout. All layers are equal, so
`--layers` of the preset suffice; the result states their number. For the whole encoder on an hour:

    python -m benchmarks.context_cost --layers 12 --systems window --passes forward --durations 3600

Ours are `window` (`--window` frames to either side) and `full`. The others are widely used Conformers of the same size,
with full attention only; they run behind our subsampling, since they have none for log-mel. Each cell runs in a
separate process: memory is the peak resident size during a pass, minus that before it (weights and input, after a
warm-up). Freed memory is kept for all systems, as in our scripts. Systems alternate in every round; the fastest pass
counts, and the highest peak. Cells that would take too long or too much memory on a small machine are skipped by
`--full-limit`, `--train-limit` and `--other-limit`, and listed. The last line is JSON; some of its keys:

    windowed_cost_60min_over_10s      time per second of audio, windowed forward pass: an hour relative to 10 s
    windowed_memory_60min_over_10s    the same for peak memory
    SYSTEM_PASS_DURATION_time, _mb    milliseconds and MB per second of audio
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.encoder_batches import FRAMES_PER_SECOND, Batch
from benchmarks.encoder_peers import PEERS
from benchmarks.machine import hardware_autocast, hardware_precision, print_figures
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.presets import PRESETS
from bestrq.model.settings import EncoderSettings
from bestrq.training.machine import keep_freed_memory
from bestrq.training.memory import reset_peak, resident_bytes
from common.segments import Segments

OURS = ["window", "full"]
PASSES = ["forward", "train"]
WARM_UP = 10
"""seconds of audio"""

Forward = Callable[[Tensor, Tensor], Tensor]
"""(log-mel `[R, F, M]`, mel frames of the segments `[R, 1]`) -> encoder output"""


@dataclass(frozen=True)
class Cell:
    """One measurement: a system at a context."""

    system: str
    mode: str
    """'forward' or 'train'"""
    duration: int
    """seconds per segment"""
    rows: int
    settings: EncoderSettings

    @property
    def name(self) -> str:
        return f"{self.system}_{self.mode}_{self.duration}s"


@dataclass(frozen=True)
class Cost:
    """Cost per second of audio."""

    milliseconds: float
    megabytes: float

    def best(self, other: Cost) -> Cost:
        """Return the fastest time and the highest peak of both."""
        return Cost(min(self.milliseconds, other.milliseconds), max(self.megabytes, other.megabytes))


def make_forward(cell: Cell) -> tuple[nn.Module, Forward]:
    """Encoder of a cell and its forward function."""
    encoder = ConformerEncoder(cell.settings)
    if cell.system in OURS:
        return encoder, lambda mel, length: encoder(mel, encoder.layout(Segments(length * 0, length, mel.shape[1])))
    peer = PEERS[cell.system](cell.settings, cell.settings.dropout)
    subsampling = encoder.subsampling
    stride = cell.settings.stride

    def forward(mel: Tensor, length: Tensor) -> Tensor:
        x = subsampling(mel, encoder.layout(Segments(length * 0, length, mel.shape[1])))
        return peer.forward(Batch(x, length * 0, length // stride))

    return nn.ModuleList((subsampling, peer.model)), forward


def run_pass(forward: Forward, mel: Tensor, length: Tensor, training: bool) -> Tensor:
    """Run a forward pass in the precision of the hardware, and a backward pass if `training`; return the output."""
    with torch.set_grad_enabled(training), hardware_autocast():
        out = forward(mel, length)
    if training:
        out.float().sum().backward()
    return out


def measure(cell: Cell, repeats: int, threads: int) -> Cost:
    """Measure a cell. Must run in a new process, for the sake of the memory figures."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model, forward = make_forward(cell)
    training = cell.mode == "train"
    model.train(training)

    def one_pass(rows: int, duration: int) -> Cost:
        frames = duration * FRAMES_PER_SECOND
        mel, length = torch.randn(rows, frames, cell.settings.num_mels), torch.full((rows, 1), frames)
        reset_peak()
        before, start = resident_bytes("VmRSS"), time.perf_counter()
        out = run_pass(forward, mel, length, training)
        model.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        peak = resident_bytes("VmHWM") - before
        if not bool(out.isfinite().all()):
            raise RuntimeError(f"{cell.name}: an output is not finite")
        return Cost(seconds / (rows * duration) * 1e3, peak / (rows * duration) / 1e6)

    one_pass(1, WARM_UP)
    costs = [one_pass(cell.rows, cell.duration) for _ in range(repeats)]
    # Later passes reuse memory that the first left to the allocator, so the first pass has the real peak.
    return Cost(min(cost.milliseconds for cost in costs), costs[0].megabytes)


def plan(args: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """Cells to run, and the names of skipped cells."""
    preset = PRESETS[args.preset]
    settings = replace(preset, num_layers=args.layers or preset.num_layers)
    cells, left_out = [], []
    for mode in args.passes:
        for duration in args.durations:
            for system in args.systems:
                mask: Literal["window", "segment"] = "window" if system == "window" else "segment"
                own = replace(settings, mask=mask, window=args.window if mask == "window" else settings.window)
                cell = Cell(system, mode, duration, max(1, args.batch_seconds // duration), own)
                limits = [args.train_limit] if mode == "train" else []
                limits += {"window": [], "full": [args.full_limit]}.get(system, [args.other_limit])
                if all(duration <= limit for limit in limits):
                    cells.append(cell)
                else:
                    left_out.append(cell.name)
    return cells, left_out


def save_plot(cells: list[Cell], costs: dict[str, Cost], path: Path) -> None:
    """Plot time and memory over the duration, both logarithmic, with one line per system and pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    lines = dict.fromkeys((cell.system, cell.mode) for cell in cells)
    for axes, (field, label) in zip(
        panels, (("milliseconds", "ms per second of audio"), ("megabytes", "MB per second of audio")), strict=True
    ):
        for number, (system, mode) in enumerate(lines):
            points = {c.duration: getattr(costs[c.name], field) for c in cells if (c.system, c.mode) == (system, mode)}
            style = "-" if mode == "forward" else "--"
            axes.plot(
                list(points), list(points.values()), style, marker="o", color=f"C{number}", label=f"{system}, {mode}"
            )
        axes.set(xscale="log", yscale="log", xlabel="seconds of a segment", ylabel=label)
        axes.grid(True, which="both", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base-120m")
    parser.add_argument("--layers", type=int, default=2, help="number of layers; 0 for those of the preset")
    parser.add_argument("--window", type=int, default=128, help="encoder frames to either side in windowed attention")
    parser.add_argument("--durations", type=int, nargs="+", default=[10, 60, 600, 3600], help="seconds of a segment")
    parser.add_argument(
        "--systems", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, "torchaudio", "wav2vec2_rotary"]
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--batch-seconds", type=int, default=600, help="audio in a batch of short segments")
    parser.add_argument("--full-limit", type=int, default=600, help="longest segment with full attention, seconds")
    parser.add_argument("--train-limit", type=int, default=600, help="longest segment in training, seconds")
    parser.add_argument("--other-limit", type=int, default=60, help="longest segment of the other systems, seconds")
    parser.add_argument("--repeats", type=int, default=2, help="passes per cell and round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, help="PNG or SVG file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    cells, left_out = plan(args)
    print(f"{args.preset}, {cells[0].settings.num_layers} layers, window of {args.window} frames to either side")
    if left_out:
        print("skipped: " + ", ".join(left_out))
    costs: dict[str, Cost] = {}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.rounds):
        for cell in cells:
            with ProcessPoolExecutor(1, mp_context=context) as process:
                cost = process.submit(measure, cell, args.repeats, args.threads).result()
            costs[cell.name] = costs[cell.name].best(cost) if cell.name in costs else cost
            print(
                f"{cell.name:32} {cell.rows:3} rows {cost.milliseconds:8.2f} ms/s {cost.megabytes:8.3f} MB/s",
                flush=True,
            )
    if args.plot:
        save_plot(cells, costs, args.plot)
    result: dict[str, object] = {"preset": args.preset, "layers": cells[0].settings.num_layers, "window": args.window}
    result |= {"batch_seconds": args.batch_seconds, "left_out": left_out}
    for name, cost in costs.items():
        result |= {f"{name}_time": round(cost.milliseconds, 3), f"{name}_mb": round(cost.megabytes, 4)}
    hour, short = costs.get("window_forward_3600s"), costs.get("window_forward_10s")
    if hour and short:
        result["windowed_cost_60min_over_10s"] = round(hour.milliseconds / short.milliseconds, 3)
        result["windowed_memory_60min_over_10s"] = round(hour.megabytes / short.megabytes, 3)
    print_figures(result, hardware_precision(), args.threads)


if __name__ == "__main__":
    main()
