"""Full BEST-RQ pretraining steps of `bestrq-94m` against SpeechBrain's recipe model of the same size.

    python -m benchmarks.pretraining_speed        # needs requirements-benchmarks.txt

A step processes the same 64 utterances of 2 to 17 s: forward, loss and backward of all batches, gradient clipping,
AdamW. Features are precomputed for both, from noise, which takes the same time as speech. SpeechBrain batches with its
DynamicBatchSampler (buckets of similar length), bestrq with packed rows; both with about the same amount of audio per
batch, in the precision of the hardware, with dropout 0.1 in all modules. Speed is in seconds of audio, without padding,
per second. The two systems alternate; the last line is JSON with medians:

    ratio_to_speechbrain   audio-seconds per second, ours / SpeechBrain's
    row_fill               share of audio in the frames of our rows
    matmul_share           our model FLOPs per second of the whole step, as a share of the rate of plain bf16 matrix
                           products of the same shapes, measured between the steps. Model FLOPs are three times the
                           count of torch's flop counter for the forward pass: for the backward pass it counts a
                           depthwise convolution as a full one, 576 times too much
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import hardware_dtype, hardware_precision, print_figures
from benchmarks.matmul_rate import matmul_rate
from benchmarks.pretraining_systems import (
    FRAMES_PER_SECOND,
    collate,
    make_ours,
    make_speechbrain,
    make_utterances,
    speechbrain_batches,
)
from bestrq.model.presets import PRESETS
from data.loading.rows import pack_rows


def time_step(function: Callable[[], float]) -> float:
    """Seconds of a step. Raises RuntimeError if its loss is NaN."""
    start = time.perf_counter()
    loss = function()
    if loss != loss:
        raise RuntimeError("the loss is not a number: the timings are invalid")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=64)
    # 64 utterances fill 20 rows of this length, five batches, without the incomplete last row that a loader avoids too.
    parser.add_argument("--row-seconds", type=float, default=31.2)
    parser.add_argument("--rows", type=int, default=4, help="rows per batch of ours")
    parser.add_argument("--batch-seconds", type=float, default=125.0, help="audio per batch of SpeechBrain")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true", help="skip SpeechBrain and the ratio")
    args = parser.parse_args()

    torch.manual_seed(0)
    utterances = make_utterances(args.utterances, seed=1)
    seconds = sum(map(len, utterances)) / FRAMES_PER_SECOND
    row_frames = round(args.row_seconds * FRAMES_PER_SECOND) // 4 * 4
    lengths = [len(u) for u in utterances]
    rows = pack_rows(lengths, row_frames, PRESETS["bestrq-94m"].row_gap, 4, max_segments=args.utterances)
    fill = sum(lengths) / (len(rows) * row_frames)
    batches = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
    ours = make_ours([collate(batch, utterances, row_frames, seed) for seed, batch in enumerate(batches)])
    systems = {"ours": ours}
    print(f"{len(utterances)} utterances, {seconds:.0f} s; {len(rows)} rows of {row_frames} frames, fill {fill:.3f}")
    if not args.only_ours:
        buckets = speechbrain_batches(utterances, args.batch_seconds)
        padded = sum(len(b) * max(map(len, b)) for b in buckets)
        systems["speechbrain"] = make_speechbrain(buckets)
        print(f"SpeechBrain: {len(buckets)} batches, fill {sum(lengths) / padded:.3f}")
    for name, system in systems.items():
        print(f"{name}: {sum(p.numel() for p in system.model.parameters()) / 1e6:.1f} M parameters")

    assert ours.forward is not None
    with FlopCounterMode(display=False) as counter:
        ours.forward()
    flops = 3 * counter.get_total_flops()
    for system in systems.values():  # warm up
        system.step()
    times: dict[str, list[float]] = {name: [] for name in systems}
    rates = [matmul_rate(PRESETS["bestrq-94m"], args.rows * row_frames // 4, hardware_dtype())]
    for repeat in range(args.repeats):
        for name, system in systems.items():
            times[name].append(time_step(system.step))
        rates.append(matmul_rate(PRESETS["bestrq-94m"], args.rows * row_frames // 4, hardware_dtype()))
        print(f"{repeat}: " + ", ".join(f"{n} RTFx {seconds / t[-1]:.2f}" for n, t in times.items()), flush=True)

    median = {name: statistics.median(values) for name, values in times.items()}
    rate = statistics.median(rates)
    result = {
        "row_fill": round(fill, 4),
        "matmul_share": round(flops / median["ours"] / rate, 4),
        "matmul_gflops": round(rate / 1e9, 1),
        "model_tflop_a_step": round(flops / 1e12, 3),
        **{f"{name}_audio_seconds_per_second": round(seconds / t, 3) for name, t in median.items()},
    }
    if "speechbrain" in median:
        result["ratio_to_speechbrain"] = round(median["speechbrain"] / median["ours"], 4)
    print_figures(result, hardware_precision())


if __name__ == "__main__":
    main()
