"""Memory of training: counts, predictions by the formula, and batches that fit on a GPU.

    python -m benchmarks.activation_memory              # counts, formula and times of every mode on this CPU
    python -m benchmarks.activation_memory --table      # batches that fit on a GPU of 80 GB, by the formula
    python -m benchmarks.activation_memory --fit        # coefficients of the formula, from counts at several sizes
    python -m benchmarks.activation_memory --inventory  # tensors that one block keeps
    python -m benchmarks.activation_memory --step       # whole steps on a simulated GPU against the formula, 1 minute

Bytes are those of tensors under bfloat16 autocast, counted operation by operation (`LiveBytes`): alive after the
forward pass, and at the peak. Each mode is counted in a separate process; the growth of its resident memory after a
warm-up is printed too. Times are forward and backward passes of the encoder in the precision of the hardware, with
alternating modes. The last line is JSON:

    predicted_over_measured_MODE   bytes kept for the backward pass, for the shape with the largest difference
    predicted_over_measured_peak_MODE  the peak, last shape
    process_over_counted_MODE      growth of the resident memory relative to the counted peak, last shape
    memory_MODE_over_none          bytes that the blocks keep, counted, last shape
    time_MODE_over_none            medians, last shape
"""

import argparse
import multiprocessing
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.machine import hardware_autocast, hardware_precision, print_figures
from bestrq.model.activation_checkpointing import MODES, run_block
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.layout import RowLayout, make_layout
from bestrq.model.presets import PRESETS
from bestrq.training.memory import reset_peak, resident_bytes
from common.segments import Segments
from pipelines import memory_formula as formula
from pipelines.live_bytes import LiveBytes, on_gpu, simulated_gpu
from pipelines.memory_formula import Rows


def one_segment_rows(encoder: ConformerEncoder, batch: Rows) -> RowLayout:
    """Layout of rows with a single segment each."""
    return encoder.layout(one_segment(batch))


def one_segment(batch: Rows) -> Segments:
    """Rows with a single segment each."""
    start = torch.zeros(batch.rows, 1, dtype=torch.int64)
    return Segments(start, torch.full_like(start, batch.frames), batch.frames)


def count(part: str, settings: EncoderSettings, batch: Rows, device: str, mode: str = "none") -> LiveBytes:
    """Count the bytes kept by the second block (part 'block') or by the subsampling and its dropout, output included.

    The device 'cuda' is a simulated GPU: operations compute shapes and dtypes only.
    """
    settings = replace(settings, num_layers=2)
    if device == "cpu":
        encoder = ConformerEncoder(settings)
        return _count(part, encoder, batch, one_segment_rows(encoder, batch), device, mode)
    layout = make_layout(
        one_segment(batch), settings, training=True, device=torch.device("cpu"), dtype=torch.float32, backend="dense"
    )
    with simulated_gpu(), torch.device("cuda"):
        return _count(part, ConformerEncoder(settings), batch, on_gpu(layout), device, mode)


def _count(part: str, encoder: ConformerEncoder, batch: Rows, layout: RowLayout, device: str, mode: str) -> LiveBytes:
    log_mel = torch.zeros(batch.rows, batch.frames, encoder.settings.num_mels, device=device)
    with torch.autocast(device, torch.bfloat16):
        x = encoder.blocks[0](encoder.dropout(encoder.subsampling(log_mel, layout)), layout.output).detach()
    with LiveBytes() as live, torch.autocast(device, torch.bfloat16):
        if part == "block":
            live.output = run_block(encoder.blocks[1], mode, x.requires_grad_(), layout.output)
        else:
            live.output = encoder.dropout(encoder.subsampling(log_mel, layout))
    return live


def bytes_per_frame(part: str, settings: EncoderSettings, frames: int, device: str, mode: str = "none") -> float:
    """Bytes per encoder frame, from the count of a second row of `frames` encoder frames."""
    one, two = (count(part, settings, Rows(rows, settings.stride * frames), device, mode).now for rows in (1, 2))
    return (two - one) / frames


def fit(device: str) -> None:
    """Print the coefficients of `memory_formula` from counts at a small size and at sizes with one larger dimension."""
    base, frames = EncoderSettings(dim=128, feedforward_dim=128, num_heads=2), 128
    for mode in MODES:
        base_bytes = bytes_per_frame("block", base, frames, device, mode)
        dim = (bytes_per_frame("block", replace(base, dim=256), frames, device, mode) - base_bytes) / 128
        hidden = (bytes_per_frame("block", replace(base, feedforward_dim=256), frames, device, mode) - base_bytes) / 128
        heads = (bytes_per_frame("block", replace(base, num_heads=4), frames, device, mode) - base_bytes) / 2
        squared = (bytes_per_frame("block", base, 2 * frames, device, mode) - base_bytes) / (2 * frames)
        heads -= squared * frames
        constant = base_bytes - dim * 128 - hidden * 128 - heads * 2 - squared * 2 * frames
        print(f"{device} {mode}: {dim=:g} {hidden=:g} {heads=:g} heads_frames={squared:g} {constant=:g}")
    convolutional = EncoderSettings(dim=64, subsampling_channels=16)
    for base in (convolutional, replace(convolutional, subsampling="striding", subsampling_factor=8)):
        wide_channels = replace(base, subsampling_channels=32)
        base_bytes = bytes_per_frame("subsampling", base, frames, device)
        inner = (bytes_per_frame("subsampling", wide_channels, frames, device) - base_bytes) / (16 * 80)
        dim = (bytes_per_frame("subsampling", replace(base, dim=128), frames, device) - base_bytes) / 64
        mels = (base_bytes - inner * 16 * 80 - dim * 64) / 80
        print(f"{device} {base.subsampling} {base.subsampling_factor}: {inner=:g} {dim=:g} {mels=:g}")


def forward_backward(
    encoder: ConformerEncoder, log_mel: Tensor, layout: RowLayout, autocast: torch.autocast,
    live: LiveBytes | None = None,
) -> int:  # fmt: skip
    """Run a forward and a backward pass; return the live bytes between them (0 without a counter)."""
    with autocast:
        y = encoder(log_mel, layout)
    kept = 0 if live is None else live.now
    y.float().pow(2).mean().backward()
    return kept


def measure(settings: EncoderSettings, batch: Rows, threads: int) -> dict[str, int]:
    """Bytes kept and at the peak, counted, and growth of this process, which must be a new one."""
    torch.set_num_threads(threads)
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    encoder, small = ConformerEncoder(settings), Rows(1, settings.row_multiple * 16)
    for rows in (small, batch):
        layout = one_segment_rows(encoder, rows)
        log_mel = torch.randn(rows.rows, rows.frames, settings.num_mels)
        before = resident_bytes("VmRSS")
        reset_peak()
        forward_backward(encoder, log_mel, layout, bfloat16)  # allocates gradients, which the next pass reuses
        process = resident_bytes("VmHWM") - before
    with LiveBytes() as live:
        kept = forward_backward(encoder, log_mel, layout, bfloat16, live)
    return {"kept": kept, "peak": live.peak, "process": process}


def timings(settings: EncoderSettings, batch: Rows, repeats: int) -> dict[str, float]:
    """Median time of forward and backward relative to mode 'none' in the same round, with alternating modes."""
    encoders = {mode: ConformerEncoder(replace(settings, activation_checkpointing=mode)) for mode in MODES}
    log_mel = torch.randn(batch.rows, batch.frames, settings.num_mels)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(repeats + 1):
        for mode, encoder in encoders.items():
            layout = one_segment_rows(encoder, batch)
            start = time.perf_counter()
            forward_backward(encoder, log_mel, layout, hardware_autocast())
            if repeat:
                times[mode].append(time.perf_counter() - start)
    return {
        mode: statistics.median(seconds / none for seconds, none in zip(times[mode], times["none"], strict=True))
        for mode in MODES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base-120m", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, default=4, help="number of blocks; all blocks are equal")
    parser.add_argument("--shapes", nargs="+", default=["1x60", "4x15"], help="rows x seconds; the last shape is timed")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the timing")
    parser.add_argument("--fit", choices=["cpu", "cuda"], help="print the coefficients counted for a device")
    parser.add_argument(
        "--inventory", choices=["cpu", "cuda"], help="print the tensors that one block keeps on a device"
    )
    parser.add_argument("--table", action="store_true", help="print the batches that fit on a GPU")
    parser.add_argument("--step", action="store_true", help="print counts of steps at full size on a simulated GPU")
    args = parser.parse_args()
    settings = replace(PRESETS[args.preset], num_layers=args.layers)
    if args.fit:
        fit(args.fit)
    elif args.inventory:
        inventory(settings, args.inventory)
    elif args.table:
        print(formula.tables())
    elif args.step:
        print(step_table())
    else:
        shapes = [(int(rows), float(seconds)) for rows, _, seconds in (shape.partition("x") for shape in args.shapes)]
        multiple = settings.row_multiple
        batches = [Rows(rows, round(seconds * 100) // multiple * multiple) for rows, seconds in shapes]
        print_figures(compare(settings, batches, args.repeats), hardware_precision())


def inventory(settings: EncoderSettings, device: str) -> None:
    """Print the tensors that a block keeps for a row of 400 frames, in bytes per frame, for every mode."""
    for mode in MODES:
        live = count("block", settings, Rows(1, settings.stride * 400), device, mode)
        print(f"{mode}: {live.now / 400:.0f} bytes per frame")
        for size, number, origin in live.inventory():
            print(f"  {size / 400:10.1f}  {number} x {origin}")


def step_table(rows: int = 4, frames: int = 6000, num_segments: int = 4) -> str:
    """Markdown table of steps of BEST-RQ on a simulated GPU: counted peak and formula in GB. Masks are dense."""
    # pipelines/cuda_runtime.py needs a machine without a GPU, and the other options do not.
    from benchmarks.fake_step import QuantizerSettings, count_step, filled_rows

    lines = ["| Encoder | Mode | Peak | Formula | Ratio |", "|---|---|---|---|---|"]
    for preset in ("base-120m", "fast-115m", "large-600m"):
        for mode in MODES:
            settings = replace(PRESETS[preset], activation_checkpointing=mode)
            segments = filled_rows(rows, frames, num_segments, settings)
            counted = count_step(settings, QuantizerSettings(num_codebooks=4), segments)
            peak = 16 * counted.parameters + counted.peak
            predicted = formula.weight_bytes(settings, 1) + formula.activation_bytes(
                settings, Rows(rows, frames), mode, dense=True
            )
            cells = f"{peak / 1e9:.2f} | {predicted / 1e9:.2f} | {predicted / peak:.3f}"
            lines.append(f"| `{preset}` | `{mode}` | {cells} |")
    return "\n".join(lines)


def compare(settings: EncoderSettings, batches: list[Rows], repeats: int) -> dict[str, float]:
    """Measure every batch in every mode, print counts and predictions, and return the figures of the JSON line."""
    figures: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    rest = formula.num_parameters(settings) - settings.num_layers * formula.block_weights(settings)
    casts = 2.0 * rest  # the subsampling's weights in bfloat16
    for batch in batches:
        none_blocks = 0.0
        for mode in MODES:
            chosen = replace(settings, activation_checkpointing=mode)
            with context.Pool(1) as pool:
                counted = pool.apply(measure, (chosen, batch, torch.get_num_threads()))
            predicted = casts + formula.encoder_bytes(settings, batch, "cpu", mode)
            predicted_peak = predicted + formula.backward_bytes(settings, batch, "cpu", mode)
            blocks = counted["kept"] - casts - formula.subsampling_bytes(settings, batch, "cpu")
            none_blocks = none_blocks or blocks
            ratio = predicted / counted["kept"]
            if abs(ratio - 1) >= abs(figures.get(f"predicted_over_measured_{mode}", ratio) - 1):
                figures[f"predicted_over_measured_{mode}"] = ratio
            figures[f"predicted_over_measured_peak_{mode}"] = predicted_peak / counted["peak"]
            figures[f"process_over_counted_{mode}"] = counted["process"] / counted["peak"]
            figures[f"memory_{mode}_over_none"] = blocks / none_blocks
            kept, peak, process = (counted[name] / 1e6 for name in ("kept", "peak", "process"))
            print(
                f"{batch.rows} x {batch.frames / 100:g} s, {mode}: kept {kept:.1f} MB (formula {predicted / 1e6:.1f}),"
                f" peak {peak:.1f} (formula {predicted_peak / 1e6:.1f}), process grew by {process:.1f}"
            )
    ratios = timings(settings, batches[-1], repeats)
    figures |= {f"time_{mode}_over_none": ratio for mode, ratio in ratios.items()}
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    main()
