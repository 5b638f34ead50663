"""Forward and backward passes of our encoders and of five others of the same size, alternating.

    python -m benchmarks.encoder_speed        # needs requirements-benchmarks.txt

Two presets: `base-120m` (25 frames per second) and `fast-115m` (12.5). Every system has the width, layers, heads,
feed-forward width, kernel and dropout of the preset (see benchmarks.encoder_peers for the remaining differences); the
numbers of parameters are printed. torchaudio and Wav2Vec2-Conformer have no front end for log-mel, so all systems are
timed as blocks alone, on the same input in the precision of the hardware, as a front end outputs it under autocast. For
the 8x preset, our entire encoder and the entire Parakeet encoder, each with its striding subsampling, are also timed on
log-mel ("whole").

Two workloads, with about the same number of frames per batch for all, drawn from the same pool of lengths:

    mixed    2 to 17 s, uniform. Ours are packed into rows of 20 s (`pack_rows`); the others are padded batches of
             similar length, like those of bucketing samplers, with lengths or masks
    equal    utterances of 10 s, without packing and padding

A pass takes batches (ours: rows) at even distances from the shortest to the longest. The time includes masks and
layouts. Speed is in seconds of audio, without padding, per second. The systems alternate batch by batch; for every
batch the fastest of the repeats counts, since other programs on the machine only add time. The last line is JSON:

    ratio_to_best_peer_mixed, _equal   ours / the fastest other system, the smallest over the presets
    matmul_share                       our model FLOPs per second as a share of the rate of plain matrix products
                                       of the same shapes, measured between the batches; the smallest value.
                                       Model FLOPs are three times those of the forward pass
    PRESET_WORKLOAD_...                per preset: the ratio, and audio-seconds per second of every system
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.encoder_batches import (
    FRAMES_PER_SECOND,
    ROW,
    Batch,
    as_log_mel,
    draw_lengths,
    packed_batches,
    padded_batches,
)
from benchmarks.encoder_peers import PEERS, Encoder, make_parakeet
from benchmarks.machine import hardware_autocast, hardware_dtype, hardware_precision, print_figures
from benchmarks.matmul_rate import matmul_rate
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.presets import PRESETS
from common.segments import Segments

OURS = "ours"
PRESET_NAMES = ["base-120m", "fast-115m"]
WORKLOADS = ["mixed", "equal"]


@dataclass(frozen=True)
class System:
    """Encoder with the batches of one workload."""

    model: nn.Module
    forward: Callable[[Batch], Tensor]
    batches: list[Batch]
    rate: float
    """frames per second of audio in the batches"""

    @property
    def seconds(self) -> float:
        """Seconds of audio in the batches, without padding."""
        return sum(batch.frames for batch in self.batches) / self.rate


def our_encoder(settings: EncoderSettings, whole: bool) -> Encoder:
    """Our encoder on packed rows: its blocks, or the whole encoder."""
    encoder = ConformerEncoder(settings).train()
    factor = settings.subsampling_factor

    def run_blocks(batch: Batch) -> Tensor:
        layout = encoder.layout(Segments(batch.start * factor, batch.length * factor, batch.x.shape[1] * factor))
        x = batch.x
        for block in encoder.blocks:
            x = block(x, layout.stages[0])
        return x

    def run_whole(batch: Batch) -> Tensor:
        return encoder(batch.x, encoder.layout(Segments(batch.start, batch.length, batch.x.shape[1])))

    return Encoder(encoder, run_whole) if whole else Encoder(encoder.blocks, run_blocks)


@dataclass(frozen=True)
class Contest:
    """Encoders to compare: those of one preset, as blocks or as whole encoders."""

    settings: EncoderSettings
    whole: bool
    encoders: dict[str, Encoder]

    def systems(self, workload: str, args: argparse.Namespace) -> dict[str, System]:
        """Encoders with their batches of a workload, by name."""
        settings, stride = self.settings, self.settings.stride
        # The same number of encoder frames per batch at both strides.
        batch_frames = round(args.batch_seconds * FRAMES_PER_SECOND / 4)
        batch_seconds = batch_frames * stride / FRAMES_PER_SECOND
        count = max(2 if workload == "mixed" else 1, round(args.seconds_of_audio / batch_seconds))
        lengths = draw_lengths(workload, stride)
        row = max(lengths) if workload == "equal" else round(ROW * FRAMES_PER_SECOND / stride)
        packed = packed_batches(lengths, row, settings, batch_frames, count)
        padded = padded_batches(lengths, batch_frames, count, settings.dim)
        rate = FRAMES_PER_SECOND / stride
        if self.whole:
            packed, padded = ([as_log_mel(batch, settings) for batch in batches] for batches in (packed, padded))
            rate = FRAMES_PER_SECOND
        return {
            name: System(encoder.model, encoder.forward, packed if name == OURS else padded, rate)
            for name, encoder in self.encoders.items()
        }


def make_contest(preset: str, whole: bool, args: argparse.Namespace) -> Contest:
    """Make the blocks of all systems, or the whole encoders of ours and Parakeet."""
    settings = replace(PRESETS[preset], dropout=args.dropout, attention_dropout=args.dropout)
    settings = replace(settings, num_layers=args.layers or settings.num_layers)
    encoders = {OURS: our_encoder(settings, whole)}
    for name in args.systems:
        if not whole:
            encoders[name] = PEERS[name](settings, args.dropout)
        elif name == "parakeet":
            encoders[name] = make_parakeet(settings, args.dropout, front_end=True)
    for name, encoder in encoders.items():
        count = sum(p.numel() for p in encoder.model.train().parameters())
        print(f"{preset} {'whole' if whole else 'blocks'}, {name}: {count / 1e6:.1f} M parameters")
    return Contest(settings, whole, encoders)


def step_seconds(system: System, batch: Batch) -> float:
    """Seconds of forward and backward of one batch, with the gradient of the input (the output of a front end)."""
    x = batch.x.detach().requires_grad_(batch.x.requires_grad)
    start = time.perf_counter()
    with hardware_autocast():
        out = system.forward(replace(batch, x=x))
    seconds = time.perf_counter() - start
    gradient = torch.randn_like(out)
    start = time.perf_counter()
    out.backward(gradient)
    seconds += time.perf_counter() - start
    system.model.zero_grad(set_to_none=True)
    if not bool(out.isfinite().all()):
        raise RuntimeError("an output is not finite: the timings are invalid")
    return seconds


def model_flops(system: System) -> float:
    """Three times the FLOPs of the forward passes, since torch counts depthwise convolutions wrongly in backward."""
    with torch.no_grad(), hardware_autocast(), FlopCounterMode(display=False) as counter:
        for batch in system.batches:
            system.forward(batch)
    return 3.0 * counter.get_total_flops()


def compare(contest: Contest, workload: str, args: argparse.Namespace) -> dict[str, float]:
    """Audio-seconds per second of every system (by name), and `ratio` and `matmul_share` of ours."""
    systems = contest.systems(workload, args)
    for name, system in systems.items():
        fill = sum(b.frames for b in system.batches) / sum(b.size for b in system.batches)
        shapes = ", ".join("x".join(map(str, b.x.shape[:2])) for b in system.batches)
        print(f"  {name}: {system.seconds:.0f} s, fill {fill:.3f}, batches {shapes}")
        for batch in system.batches:
            step_seconds(system, batch)
    flops, rates = model_flops(systems[OURS]), []
    # By system: for every pass, the seconds of its batches.
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(args.repeats)] for name in systems}
    for repeat in range(args.repeats):
        for i in range(len(systems[OURS].batches)):
            for name, system in systems.items():
                times[name][repeat].append(step_seconds(system, system.batches[i]))
            rates.append(matmul_rate(contest.settings, 1000, hardware_dtype()))
        speeds = (f"{n} {systems[n].seconds / sum(t[repeat]):.2f}" for n, t in times.items())
        print(f"  {repeat}: RTFx " + ", ".join(speeds), flush=True)
    best = {name: sum(map(min, zip(*passes, strict=True))) for name, passes in times.items()}
    result = {name: systems[name].seconds / seconds for name, seconds in best.items()}
    others = [speed for name, speed in result.items() if name != OURS]
    if others:
        result["ratio"] = result[OURS] / max(others)
    result["matmul_share"] = flops / best[OURS] / max(rates)
    result["matmul_gflops"] = max(rates) / 1e9
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESET_NAMES, default=PRESET_NAMES)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--systems", nargs="*", choices=sorted(PEERS), default=list(PEERS), help="other systems")
    parser.add_argument(
        "--seconds-of-audio", type=float, default=40.0, help="audio per pass; at least two mixed batches"
    )
    parser.add_argument("--batch-seconds", type=float, default=40.0, help="audio per batch at 25 frames per second")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="number of layers; 0 for those of the preset")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout of all modules, attention weights included")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    result: dict[str, float] = {}
    for preset in args.preset:
        for whole in (False, True) if PRESETS[preset].stride == 8 and "parakeet" in args.systems else (False,):
            contest, prefix = make_contest(preset, whole, args), f"{preset}_whole" if whole else preset
            for workload in args.workload:
                print(f"{prefix}, {workload}")
                compared = compare(contest, workload, args)
                result |= {f"{prefix}_{workload}_{key}": value for key, value in compared.items()}
    for workload in args.workload:
        ratios = [value for key, value in result.items() if key.endswith(f"_{workload}_ratio")]
        if ratios:
            result[f"ratio_to_best_peer_{workload}"] = min(ratios)
    result["matmul_share"] = min(value for key, value in result.items() if key.endswith("_matmul_share"))
    print_figures({key: round(value, 4) for key, value in result.items()}, hardware_precision())


if __name__ == "__main__":
    main()
